"""What predict.py costs: a cold start compared with a bare process, a folder compared with a bare loop and `pipeline`.

    pip install -r requirements-export.txt
    python -m benchmarks.predict [MODEL ...] [--folder FOLDER]

MODEL is the output directory of a run; without one, EfficientNet-Lite0, ResNet-18 and ViT-S with random weights.

Cold start: `predict.py MODEL image.jpg`, the same with the exported model, and a process that imports torch and
transformers, loads the model and runs it once on zeros.

Folder: images per second of predict.py's loop over FOLDER (or drawn JPEGs of 320 x 240), with torch, and with ONNX
Runtime and OpenVINO in float32 and in 8 bits. They are compared with the model as it is loaded, in the same batches of
ready tensors, in torch's default and in the channels_last memory format, and with BatchNorm fused, as train.py
evaluates; with ONNX Runtime and OpenVINO on ready pixels; and with `pipeline` over the same files. All run in turns.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel, pipeline

from benchmarks.networks import save_network
from luthier.images.decode import decode_rgb, is_image
from luthier.serving.classifier import Classifier
from luthier.serving.export import export_precisions
from luthier.serving.onnx_network import OnnxNetwork
from luthier.serving.parity import Images
from luthier.serving.torch_network import TorchNetwork
from models import load_trained

PROJECT = Path(__file__).parent.parent
NETWORKS = ("efficientnet_lite0", "resnet18", "vit_small_patch16_224")
CALIBRATION = 50  # images
LOOP = "bare loop, ready tensors, channels_last"  # what the folder is compared with

BARE = """
import sys, torch, transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.inference_mode():
    print(model(pixel_values=torch.zeros(1, 3, int(sys.argv[2]), int(sys.argv[2]))).logits.argmax().item())
"""


def main() -> None:
    """Print both tables of every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="folders with saved models")
    parser.add_argument("--folder", type=Path, help="a folder of images (default: draws some)")
    parser.add_argument("--images", type=int, default=600, help="how many (default: 600)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch, "images")
        drawn.mkdir()
        if args.folder is None:
            draw(drawn, args.images)
        images = sorted(path for path in (args.folder or drawn).rglob("*") if is_image(path.name))
        files = list(map(str, itertools.islice(itertools.cycle(images), args.images)))
        for model in args.models or [save_network(name, Path(scratch, name)) for name in NETWORKS]:
            print(f"{model.name}\n")
            exported = export(model, Path(scratch, f"{model.name} exported"), files)
            time_cold_start(str(model), exported["fp32"], files[0], args.rounds)
            time_folder(str(model), exported, files, args.rounds)


def draw(folder: Path, images: int) -> None:
    """Draw JPEGs of noise on a gradient, which take about as long to decode as photographs."""
    gradient = np.linspace(0, 200, 240)[:, None, None]
    for seed in range(images):
        noise = np.random.default_rng(seed).normal(0, 15, (240, 320, 3))
        Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{seed:05}.jpg", quality=85)


def export(model: Path, folder: Path, files: list[str]) -> dict[str, Path]:
    """Export a model in float32 and in 8 bits; return the files by precision."""
    folder.mkdir()
    images = Images(files[:CALIBRATION], lambda number: Path(files[number]).read_bytes())
    return export_precisions(TorchNetwork(str(model)), folder, ["int8"], images)


def time_cold_start(model: str, exported: Path, file: str, rounds: int) -> None:
    """Print the seconds from the start of a process to one prediction."""
    size = str(TorchNetwork(model).view(Image.new("RGB", (64, 64))).shape[-1])
    ways = {
        "predict.py, one image": [sys.executable, str(PROJECT / "predict.py"), model, file],
        "predict.py with model.onnx, one image": [sys.executable, str(PROJECT / "predict.py"), str(exported), file],
        "bare process, zeros": [sys.executable, "-c", BARE, model, size],
    }
    run_in_turns(
        ways, rounds, lambda command: subprocess.run(command, check=True, capture_output=True), "s", 1, inverse=False,
        base="bare process, zeros",
    )  # fmt: skip


def time_folder(model_name: str, exported: dict[str, Path], files: list[str], rounds: int) -> None:
    """Print the images per second of a folder."""
    networks: dict[str, Any] = {"torch": TorchNetwork(model_name)}
    networks |= {f"ONNX Runtime, {precision}": OnnxNetwork(path) for precision, path in exported.items()}
    networks |= {f"OpenVINO, {precision}": OnnxNetwork(path, "openvino") for precision, path in exported.items()}
    first = [decode_rgb(Path(file).read_bytes()).image for file in files[:16]]
    batch = torch.stack([networks["torch"].view(image) for image in first])
    pixels = np.stack([networks["ONNX Runtime, fp32"].view(image) for image in first])
    model, _ = load_trained(model_name)
    plain = AutoModelForImageClassification.from_pretrained(model_name).eval()
    classify = pipeline("image-classification", model=model_name, trust_remote_code=True)

    def predict_files(classifier: Classifier) -> None:
        for _ in classifier.predict_files(((file, None) for file in files), 5):
            pass

    @torch.inference_mode()
    def run_bare_loop(model: PreTrainedModel, memory_format: torch.memory_format) -> None:
        ready = batch.to(memory_format=memory_format)
        repeat(lambda: model(pixel_values=ready))

    def repeat(run: Callable) -> None:
        for _ in range(len(files) // len(first)):
            run()

    def run_pipeline() -> None:
        for _ in classify((file for file in files), batch_size=len(first)):
            pass

    ways = {
        f"predict.py, {name}": lambda n=network: predict_files(Classifier(n)) for name, network in networks.items()
    }
    ways |= {
        "bare loop, ready tensors": lambda: run_bare_loop(plain, torch.contiguous_format),
        LOOP: lambda: run_bare_loop(model, torch.channels_last),
        "the same, BatchNorm fused": lambda: run_bare_loop(networks["torch"].model, torch.channels_last),
    }
    ways |= {
        f"{name}, ready pixels": lambda n=network: repeat(lambda: n.rate(list(pixels)))
        for name, network in networks.items()
        if name != "torch"
    }
    ways["pipeline"] = run_pipeline
    run_in_turns(ways, rounds, lambda way: way(), "images/s", len(files), inverse=True, base=LOOP)


def run_in_turns(ways: dict, rounds: int, run: Callable, unit: str, work: int, inverse: bool, base: str) -> None:
    """Run the ways in turns; print what each took, and its ratio to that of `base` in the same turn.

    Args:
        ways: what `run` takes, by name.
        rounds: how many turns.
        run: runs a way.
        unit: of the figures.
        work: how much a way does.
        inverse: the figures are work per second, not seconds.
        base: the way that all are compared with.
    """
    figures = {name: list[float]() for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            run(way)
            seconds = time.perf_counter() - start
            figures[name].append(work / seconds if inverse else seconds)
    print(f"| way | {unit}, median of {rounds} (lowest to highest) | ratio to {base} |\n|---|---|---|")
    for name, values in figures.items():
        ratios = sorted(a / b for a, b in zip(values, figures[base], strict=True))
        shown = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {shown} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(flush=True)


if __name__ == "__main__":
    main()
