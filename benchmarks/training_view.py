"""The training view: images a second of one process, beside the same recipe on Pillow's images.

    python -m benchmarks.training_view [--data_dir FOLDER] [--rounds 5]

Images are drawn with 768 px, or taken from FOLDER, and stored as a run stores them. Both ways read the same rows with
one thread, as a data worker does: train.py's, and `RandomResizedCrop`, `RandomHorizontalFlip`, `ToTensor` and
`Normalize` on decoded images, which is how most examples do it. Both end with pixel values: the 8-bit levels of
train.py are scaled here, as the device does in a run. They take turns, and a round counts as the ratio of its two
speeds.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from PIL import Image
from torchvision import transforms

from benchmarks._common import build_parser, directory
from data import load_splits, prepare, training_rows
from luthier.images.views import AUGMENTATIONS, EvaluationView
from models import build_model

DRAWN, SIDE = 120, 768


def main() -> None:
    """Print a row for each augmentation."""
    parser = build_parser(__doc__)
    parser.add_argument("--data_dir", type=directory, metavar="FOLDER", help="of class folders (default: draws some)")
    parser.add_argument("--images", type=int, default=200, help="of a round (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        if args.data_dir is None:
            draw(Path(folder))
        measure(args.data_dir or Path(folder), args.images, args.rounds)


def draw(folder: Path) -> None:
    """Draw two classes of JPEGs with as many bytes a pixel as photographs have."""
    for number in range(DRAWN):
        generator = np.random.default_rng(number)
        smooth = Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8)).resize((SIDE, SIDE))
        noise = generator.normal(0, 8, (SIDE, SIDE, 1))
        path = folder / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(smooth) + noise).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure(folder: Path, images: int, rounds: int) -> None:
    """Print the table of the images in a folder."""
    splits, _ = load_splits(data_dir=str(folder))
    view = EvaluationView(build_model("efficientnet_lite0", {0: "a", 1: "b"})[1])
    stored = prepare(splits, view, quiet=True)["train"]
    pillow = with_pillow(stored, view)
    print("| augmentation | train.py, images/s | with Pillow, flip_crop | ratio, median | lowest to highest |")
    print("|---|---|---|---|---|")
    for augmentation in (name for name in AUGMENTATIONS if name != "none"):
        rows, pairs = training_rows(stored, view, augmentation), []

        def own(row: int, rows: Dataset = rows) -> torch.Tensor:
            return view.scale(rows[row]["pixel_values"])

        for _ in range(rounds):
            pairs.append([images_a_second(row, images, len(stored)) for row in (own, pillow)])
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        ours, theirs = (median(column) for column in zip(*pairs, strict=True))
        print(f"| {augmentation} | {ours:.0f} | {theirs:.0f} | {median(ratios):.2f} | ", end="")
        print(f"{ratios[0]:.2f} to {ratios[-1]:.2f} |", flush=True)


def with_pillow(stored: Dataset, view: EvaluationView) -> Callable[[int], torch.Tensor]:
    """Return the function from a row's number to its pixel values, as most examples make them."""
    bicubic = transforms.InterpolationMode.BICUBIC
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, scale=(0.35, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((-view.black / view.contrast).tolist(), (1 / view.contrast).tolist()),
        ]
    )
    return lambda row: transform(stored[row]["image"])


def images_a_second(row: Callable, images: int, rows: int) -> float:
    """Return how fast rows are made."""
    begin = time.perf_counter()
    for number in range(images):
        row(number % rows)
    return images / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
