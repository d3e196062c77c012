"""What predict.py costs: a cold start compared with a bare process, a folder compared with a bare loop and `pipeline`.

    python -m benchmarks.predict outputs/my_run [FOLDER]

Cold start: `predict.py MODEL image.jpg`, and a process that imports torch and transformers, loads the model and runs
it once on zeros. Folder: images per second of predict.py's loop over FOLDER (or 2,000 drawn JPEGs of 320 x 240); of
the model as it is loaded, in the same batches of ready tensors, in torch's default and in the channels_last memory
format; and of `pipeline` over the same files. All ways run in turns.
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

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, PreTrainedModel, pipeline

from luthier.images.decode import is_image
from luthier.serving.classifier import Classifier
from models import load_trained

PROJECT = Path(__file__).parent.parent

BARE = """
import sys, torch, transformers
from transformers import AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.inference_mode():
    print(model(pixel_values=torch.zeros(1, 3, int(sys.argv[2]), int(sys.argv[2]))).logits.argmax().item())
"""


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a saved model")
    parser.add_argument("folder", nargs="?", type=Path, help="a folder of images (default: draws some)")
    parser.add_argument("--images", type=int, default=2000, help="how many (default: 2,000)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        if args.folder is None:
            draw(Path(drawn), args.images)
        images = sorted(path for path in (args.folder or Path(drawn)).rglob("*") if is_image(path.name))
        files = list(map(str, itertools.islice(itertools.cycle(images), args.images)))
        time_cold_start(args.model, files[0], args.rounds)
        time_folder(args.model, files, args.rounds)


def draw(folder: Path, images: int) -> None:
    """Draw JPEGs of noise on a gradient, which take about as long to decode as photographs."""
    gradient = np.linspace(0, 200, 240)[:, None, None]
    for seed in range(images):
        noise = np.random.default_rng(seed).normal(0, 15, (240, 320, 3))
        Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{seed:05}.jpg", quality=85)


def time_cold_start(model: str, file: str, rounds: int) -> None:
    """Print the seconds from the start of a process to one prediction."""
    size = str(Classifier(model).load_view(file).shape[-1])
    ways = {
        "predict.py, one image": [sys.executable, str(PROJECT / "predict.py"), model, file],
        "bare process, zeros": [sys.executable, "-c", BARE, model, size],
    }
    run_in_turns(
        ways, rounds, lambda command: subprocess.run(command, check=True, capture_output=True), "s", 1, inverse=False
    )


def time_folder(model_name: str, files: list[str], rounds: int) -> None:
    """Print the images per second of a folder."""
    classifier = Classifier(model_name)
    batch = torch.stack([classifier.load_view(file) for file in files[: classifier.batch_size]])
    model, _ = load_trained(model_name)
    plain = AutoModelForImageClassification.from_pretrained(model_name).eval()
    classify = pipeline("image-classification", model=model_name, trust_remote_code=True)

    def predict_files() -> None:
        for _ in classifier.predict_files(((file, None) for file in files), 5):
            pass

    @torch.inference_mode()
    def run_bare_loop(model: PreTrainedModel, memory_format: torch.memory_format) -> None:
        ready = batch.to(memory_format=memory_format)
        for _ in range(len(files) // len(batch)):
            model(pixel_values=ready)

    def run_pipeline() -> None:
        for _ in classify((file for file in files), batch_size=classifier.batch_size):
            pass

    ways = {
        "predict.py": predict_files,
        "bare loop, ready tensors": lambda: run_bare_loop(plain, torch.contiguous_format),
        "bare loop, ready tensors, channels_last": lambda: run_bare_loop(model, torch.channels_last),
        "pipeline": run_pipeline,
    }
    run_in_turns(ways, rounds, lambda way: way(), "images/s", len(files), inverse=True)


def run_in_turns(ways: dict, rounds: int, run: Callable, unit: str, work: int, inverse: bool) -> None:
    """Run the ways in turns; print what each took, and the ratio of predict.py to it in the same turn.

    Args:
        ways: what `run` takes, by name; predict.py first.
        rounds: how many turns.
        run: runs a way.
        unit: of the figures.
        work: how much a way does.
        inverse: the figures are work per second, not seconds.
    """
    figures = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            run(way)
            seconds = time.perf_counter() - start
            figures[name].append(work / seconds if inverse else seconds)
    first = next(iter(figures.values()))
    print(f"| way | {unit}, median of {rounds} (lowest to highest) | predict.py to it |\n|---|---|---|")
    for name, values in figures.items():
        ratios = sorted(a / b for a, b in zip(first, values, strict=True))
        shown = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {shown} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(flush=True)


if __name__ == "__main__":
    main()
