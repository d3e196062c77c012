"""What predict.py costs: a cold start beside a bare process, a folder beside a bare loop and `pipeline`.

    python benchmarks/predict.py outputs/my_run [FOLDER]

Cold start: `predict.py MODEL picture.jpg`, and a process that imports torch and transformers, loads the model and
runs it once on zeros. Folder: images per second of predict.py's loop over FOLDER (or 2,000 drawn JPEGs of 320 x 240),
of the model as it is loaded, in the same batches on tensors that are ready, in torch's default and in the
channels_last memory format, and of `pipeline` over the same files. By turns.
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

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))
from classifier import Classifier
from images import EXTENSIONS
from models import load_trained

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
    parser.add_argument("folder", nargs="?", type=Path, help="pictures (default: draws some)")
    parser.add_argument("--images", type=int, default=2000, help="how many (default: 2,000)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        if args.folder is None:
            draw(Path(drawn), args.images)
        found = sorted(path for path in (args.folder or Path(drawn)).rglob("*") if path.suffix.lower() in EXTENSIONS)
        files = list(map(str, itertools.islice(itertools.cycle(found), args.images)))
        cold(args.model, files[0], args.rounds)
        folder(args.model, files, args.rounds)


def draw(folder: Path, images: int) -> None:
    """Draw JPEGs of noise on a gradient, about as hard to decode as photographs."""
    gradient = np.linspace(0, 200, 240)[:, None, None]
    for seed in range(images):
        noise = np.random.default_rng(seed).normal(0, 15, (240, 320, 3))
        Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{seed:05}.jpg", quality=85)


def cold(model: str, file: str, rounds: int) -> None:
    """Time the start to one answer."""
    size = str(Classifier(model).see(file).shape[-1])
    ways = {
        "predict.py, one picture": [sys.executable, str(PROJECT / "predict.py"), model, file],
        "bare process, zeros": [sys.executable, "-c", BARE, model, size],
    }
    by_turns(ways, rounds, lambda line: subprocess.run(line, check=True, capture_output=True), "s", 1, inverse=False)


def folder(model_name: str, files: list[str], rounds: int) -> None:
    """Time a folder."""
    classifier = Classifier(model_name)
    batch = torch.stack([classifier.see(file) for file in files[: classifier.batch_size]])
    model, _ = load_trained(model_name)
    plain = AutoModelForImageClassification.from_pretrained(model_name).eval()
    classify = pipeline("image-classification", model=model_name, trust_remote_code=True)

    def ours() -> None:
        for _ in classifier.answers(((file, None) for file in files), 5):
            pass

    @torch.inference_mode()
    def bare(model: PreTrainedModel, memory_format: torch.memory_format) -> None:
        ready = batch.to(memory_format=memory_format)
        for _ in range(len(files) // len(batch)):
            model(pixel_values=ready)

    def pipelined() -> None:
        for _ in classify((file for file in files), batch_size=classifier.batch_size):
            pass

    ways = {
        "predict.py": ours,
        "bare loop, ready tensors": lambda: bare(plain, torch.contiguous_format),
        "bare loop, ready tensors, channels_last": lambda: bare(model, torch.channels_last),
        "pipeline": pipelined,
    }
    by_turns(ways, rounds, lambda way: way(), "images/s", len(files), inverse=True)


def by_turns(ways: dict, rounds: int, run: Callable, unit: str, work: int, inverse: bool) -> None:
    """Run the ways by turns; print what each took, and its ratio to predict.py's in the same turn."""
    found = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            run(way)
            seconds = time.perf_counter() - start
            found[name].append(work / seconds if inverse else seconds)
    first = next(iter(found.values()))
    print(f"| way | {unit}, median of {rounds} (lowest to highest) | predict.py to it |\n|---|---|---|")
    for name, values in found.items():
        ratios = sorted(a / b for a, b in zip(first, values, strict=True))
        shown = f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        print(f"| {name} | {shown} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(flush=True)


if __name__ == "__main__":
    main()
