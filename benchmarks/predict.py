"""What predict.py costs: a cold start compared with a bare process, a folder compared with a bare loop and `pipeline`.

    pip install -r requirements-export.txt
    python -m benchmarks.predict [MODEL ...] [--folder FOLDER]

MODEL is the output directory of a run; without one, EfficientNet-Lite0, ResNet-18 and ViT-S with random weights.

Cold start: `predict.py MODEL image.jpg`, the same with the exported model, and a process that imports torch and
transformers, loads the model and runs it once on zeros.

Folder: images per second of predict.py's loop over FOLDER (or drawn JPEGs of 320 x 240), with torch, and with ONNX
Runtime and OpenVINO in float32 and in 8 bits. They are compared with the model as it is loaded, in the same batches of
ready tensors, in torch's default and in the channels_last memory format, and with BatchNorm fused, as predict.py
runs it; with ONNX Runtime and OpenVINO on ready pixels; and with `pipeline` over the same files. All run in turns,
each in a process of its own.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel, pipeline

from benchmarks._common import PROJECT, build_parser, directory, run_command
from benchmarks._networks import save_network
from luthier.images.decode import decode_rgb, is_image
from luthier.machine import keep_freed_memory
from luthier.serving.classifier import Classifier, open_network
from luthier.serving.export import export_precisions
from luthier.serving.parity import Images
from luthier.serving.torch_network import TorchNetwork
from models import load_trained

NETWORKS = ("efficientnet_lite0", "resnet18", "vit_small_patch16_224")
CALIBRATION = 50  # images
BATCH = 16
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
    parser = build_parser(__doc__)
    parser.add_argument("models", nargs="*", type=directory, metavar="MODEL", help="folders with saved models")
    parser.add_argument("--folder", type=directory, help="a folder of images (default: draws some)")
    parser.add_argument("--images", type=int, default=640, help="how many (default: 640)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        drawn = Path(scratch, "images")
        drawn.mkdir()
        if args.folder is None:
            draw(drawn, args.images)
        images = sorted(path for path in (args.folder or drawn).rglob("*") if is_image(path.name))
        if not images:
            parser.error(f"there are no images below {args.folder}")
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
    run_in_turns(ways, rounds, time_process, "s", base="bare process, zeros")


def time_process(command: list[str]) -> float:
    """Return the seconds that a command takes."""
    start = time.perf_counter()
    run_command(command)
    return time.perf_counter() - start


def time_folder(model: str, exported: dict[str, Path], files: list[str], rounds: int) -> None:
    """Print the images per second of a folder."""
    networks = {"torch": (model, None)}
    for backend, name in (("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")):
        networks |= {f"{name}, {precision}": (str(path), backend) for precision, path in exported.items()}
    ways = {f"predict.py, {name}": (predict_files, *network) for name, network in networks.items()}
    ways |= {
        "bare loop, ready tensors": (loop_plain, model, None),
        LOOP: (loop_channels_last, model, None),
        "the same, BatchNorm fused": (loop_network, model, None),
    }
    ways |= {
        f"{name}, ready pixels": (loop_network, *network) for name, network in networks.items() if name != "torch"
    }
    ways["pipeline"] = (run_pipeline, model, None)

    def run_alone(way: tuple) -> float:
        # In a process of its own, because the libraries' threads get in each other's way.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return len(files) / process.submit(time_way, *way, files).result()

    run_in_turns(ways, rounds, run_alone, "images/s", base=LOOP)


def time_way(way: Callable, model: str, backend: str | None, files: list[str]) -> float:
    """Return the seconds that a way takes for all files, once it has worked on a few."""
    run = way(model, backend, files)
    run(files[:BATCH])
    start = time.perf_counter()
    run(files)
    return time.perf_counter() - start


def predict_files(model: str, backend: str | None, files: list[str]) -> Callable[[list[str]], None]:
    """Return predict.py's loop over files."""
    classifier = Classifier(open_network(model, backend))
    return lambda files: deque(classifier.predict_files(((file, None) for file in files), 5), maxlen=0)


def loop_network(model: str, backend: str | None, files: list[str]) -> Callable[[list[str]], None]:
    """Return a loop over the same batch, by the network of predict.py."""
    network = open_network(model, backend)
    views = [network.view(decode_rgb(Path(file).read_bytes()).image) for file in files[:BATCH]]
    return lambda files: [network.rate(views) for _ in range(len(files) // BATCH)]


def loop_plain(model: str, backend: None, files: list[str]) -> Callable[[list[str]], None]:
    """Return a loop over the same batch, by torch in its default memory format."""
    keep_freed_memory()  # as the other loops do, so that the format is all that differs
    plain = AutoModelForImageClassification.from_pretrained(model, trust_remote_code=True).eval()
    return loop_tensors(plain, model, files, torch.contiguous_format)


def loop_channels_last(model: str, backend: None, files: list[str]) -> Callable[[list[str]], None]:
    """Return a loop over the same batch, by torch in the channels_last memory format."""
    keep_freed_memory()
    return loop_tensors(load_trained(model)[0], model, files, torch.channels_last)


def loop_tensors(
    network: PreTrainedModel, model: str, files: list[str], memory_format: torch.memory_format
) -> Callable[[list[str]], None]:
    """Return a loop over a batch of ready tensors."""
    view = AutoImageProcessor.from_pretrained(model)
    images = [decode_rgb(Path(file).read_bytes()).image for file in files[:BATCH]]
    ready = torch.cat([view(image, return_tensors="pt")["pixel_values"] for image in images]).to(
        memory_format=memory_format
    )

    @torch.inference_mode()
    def run(files: list[str]) -> None:
        for _ in range(len(files) // BATCH):
            network(pixel_values=ready)

    return run


def run_pipeline(model: str, backend: None, files: list[str]) -> Callable[[list[str]], None]:
    """Return transformers' pipeline over files."""
    classify = pipeline("image-classification", model=model, trust_remote_code=True)
    return lambda files: deque(classify((file for file in files), batch_size=BATCH), maxlen=0)


def run_in_turns(ways: dict, rounds: int, run: Callable, unit: str, base: str) -> None:
    """Run the ways in turns; print what each took, and its ratio to that of `base` in the same turn.

    Args:
        ways: what `run` takes, by name.
        rounds: how many turns.
        run: runs a way; returns its figure.
        unit: of the figures.
        base: the way that all are compared with.
    """
    figures = {name: list[float]() for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            figures[name].append(run(way))
    print(f"| way | {unit}, median of {rounds} (lowest to highest) | ratio to {base} |\n|---|---|---|")
    for name, values in figures.items():
        ratios = sorted(a / b for a, b in zip(values, figures[base], strict=True))
        shown = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {shown} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(flush=True)


if __name__ == "__main__":
    main()
