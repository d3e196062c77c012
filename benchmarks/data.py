"""What large photographs cost: prepared once and stored small, or decoded and transformed again on every access.

    python -m benchmarks.data
    python -m benchmarks.data --accuracy path/to/instruments --image_size 64

The first command draws 399 JPEGs of 12 megapixels (1 GB, in a temporary folder). It measures images per second of
`data.load_splits` and `data.prepare`, the first time, from the cache, and with a twentieth more images; and of the
training view. It compares them with the transformers example (run_image_classification.py: `with_transform` on the
files as they are). Each way runs in a process of its own, with 80 and with 300 images; its peak memory is measured.

The second command shows what storing small training images costs in accuracy. It fits one probe on the stored images
and one on the files, and scores both on the validation files. The view must be small enough for images to shrink.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from benchmarks._common import PROJECT, build_parser, directory, own_caches, run_command
from data import load_splits, prepare, with_transforms
from luthier.images.decode import decode_rgb, read_bytes
from luthier.images.views import EvaluationView
from models import build_model, linear_head

SIDE, COUNTS = (4000, 3000), (80, 300)
MORE = "prepare with 5% more"
WAYS = ("prepare", "prepare again", MORE, "training view", "as the transformers example")


def main() -> None:
    """Draw, measure each way in a process of its own, print the table."""
    parser = build_parser(__doc__)
    parser.add_argument("--image_size", type=int, default=224, help="side of the view in pixels (default: 224)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--accuracy", type=directory, metavar="FOLDER", help="compare stored images with files, by a probe"
    )
    args = parser.parse_args()
    if args.accuracy:
        compare_probes(args.accuracy, args.image_size)
        return
    if args.measure:
        print(json.dumps(measure(*args.measure, args.image_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            draw(Path(folder, str(count)), range(count))
            draw(Path(folder, f"more-{count}"), range(count, count + count // 20))
        print("| round | images | way | seconds | images/s | peak memory, MB |")
        print("|---|---|---|---|---|---|")
        for number in range(1, args.rounds + 1):
            for count in COUNTS:
                cache = Path(folder, f"cache-{number}-{count}")
                for way in WAYS:
                    images, more = Path(folder, str(count)), Path(folder, f"more-{count}")
                    if way == MORE:
                        shutil.copytree(more, images, dirs_exist_ok=True)
                    result = measure_in_process(way, images, cache, args.image_size)
                    if way == MORE:
                        for path in more.rglob("*.jpg"):
                            (images / path.relative_to(more)).unlink()
                    print(
                        f"| {number} | {count} | {way} | {result['seconds']:.2f} | {result['speed']:.1f} "
                        f"| {result['memory']:.0f} |",
                        flush=True,
                    )


def draw(folder: Path, numbers: Iterable[int]) -> None:
    """Draw photographs with these numbers: blurred colours, different in each, with the same grain."""
    grain = np.random.default_rng(0).normal(0, 5, (SIDE[1], SIDE[0], 3)).astype(np.int8)

    def draw_one(number: int) -> None:
        coarse = np.random.default_rng(number).integers(0, 255, (40, 54, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(SIDE, Image.Resampling.BICUBIC), dtype=np.int16)
        path = folder / ("even", "odd")[number % 2] / f"{number:03}.jpg"
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)

    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw_one, numbers))


def measure_in_process(way: str, folder: Path, cache: Path, image_size: int) -> dict:
    """Return what `measure` returns, from a process of its own with its own cache."""
    command = [sys.executable, "-m", "benchmarks.data", "--measure", way, str(folder), "--image_size", str(image_size)]
    return json.loads(run_command(command, PROJECT, own_caches(cache)).splitlines()[-1])


def measure(way: str, folder: str, image_size: int) -> dict:
    """Return seconds, images per second and this process's peak memory in MB."""
    import resource  # POSIX only

    if way == "as the transformers example":
        rows = load_as_example(folder, image_size)
    else:
        view = EvaluationView(build_model("efficientnet_lite0", {0: "even", 1: "odd"}, image_size)[1])
        if way == "training view":
            splits, _ = load_splits(data_dir=folder)
            rows = with_transforms(prepare(splits, view), view, "flip_crop", "evaluation")["train"]
    start = time.perf_counter()
    if way.startswith("prepare"):
        splits, _ = load_splits(data_dir=folder)  # it inspects every image
        n = sum(len(split) for split in prepare(splits, view).values())
    else:
        n = min(len(rows), 48)
        for row in range(n):
            rows[row]["pixel_values"]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "speed": n / seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def load_as_example(folder: str, image_size: int) -> Dataset:
    """Return a dataset that is decoded and transformed on access, as the example does with its defaults."""
    transform = Compose(
        [RandomResizedCrop(image_size), RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]
    )

    def transform_batch(batch: dict) -> dict:
        return {"pixel_values": [transform(image.convert("RGB")) for image in batch["image"]]}

    return load_dataset("imagefolder", data_dir=folder, split="train").with_transform(transform_batch)


def compare_probes(folder: Path, image_size: int) -> None:
    """Print the validation score of a probe on stored training images and of one on the files."""
    # Here, because what it imports would count in the memory of `measure`.
    from luthier.training.probe import fit_probes

    files, _ = load_splits(data_dir=folder)
    labels = dict(enumerate(files["train"].features["label"].names))
    model, image_processor = build_model("efficientnet_lite0", labels, image_size)
    model.set_submodule(linear_head(model), torch.nn.Identity())
    view = EvaluationView(image_processor)
    stored = prepare(files, view)

    def features(views: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(torch.stack(views[i : i + 16])).logits for i in range(0, len(views), 16)])

    validation = features([view.unpack(row["view"]) for row in stored["validation"]])
    train = {
        "stored": [view(row["image"]) for row in stored["train"]],
        "files": [view(decode_rgb(read_bytes(row["image"])).image) for row in files["train"]],
    }
    print("| training images | validation loss | accuracy | strength |")
    print("|---|---|---|---|")
    references = {split: torch.tensor(stored[split]["label"][:]) for split in stored}
    for name, views in train.items():
        probe, _ = fit_probes(features(views), references["train"], validation, references["validation"])
        accuracy = (probe.logits(validation).argmax(dim=1) == references["validation"]).float().mean()
        print(f"| {name} | {probe.loss:.4f} | {accuracy:.1%} | {probe.strength} |")
    pairs = zip(*train.values(), strict=True)
    differences = [(one - other).abs().mean() / view.contrast.mean() * 255 for one, other in pairs]
    print(f"\nMean difference of a view: {torch.stack(differences).mean():.2f} of 255 levels.")


if __name__ == "__main__":
    main()
