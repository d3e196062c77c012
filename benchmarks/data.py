"""What large photographs cost: prepared once and seen small, against decoded and transformed anew on every access.

    python benchmarks/data.py
    python benchmarks/data.py --accuracy path/to/instruments --image_size 64

Draws 300 JPEGs of 12 megapixels (1 GB, in a temporary folder) and measures images per second through
`data.load_splits` and `data.prepare`, the first time and from the cache, and through the training view; beside them
the way of the transformers example (run_image_classification.py: `with_transform` on the files as they are). Each in a
process of its own, whose peak memory is measured too, for 75 and for 300 pictures.

The second command tells what storing training pictures small costs in accuracy: two probes, fitted on the pictures as
stored and on the files, both scored on the files of validation. The view must be small enough for something to shrink.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

PROJECT = Path(__file__).parent.parent
SIDE, COUNTS = (4000, 3000), (75, 300)


def main() -> None:
    """Draw, measure each way in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=224, help="side of the view in pixels (default: 224)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--accuracy", metavar="FOLDER", help="compare stored pictures with files, by a probe")
    args = parser.parse_args()
    if args.accuracy:
        compare_probes(args.accuracy, args.image_size)
        return
    if args.measure:
        print(json.dumps(measure(*args.measure, args.image_size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            draw(Path(folder, str(count)), count)
        print("| round | pictures | way | images/s | peak memory, MB |")
        print("|---|---|---|---|---|")
        for number in range(1, args.rounds + 1):
            for count in COUNTS:
                cache = Path(folder, f"cache-{number}-{count}")
                for way in ("prepare", "prepare again", "training view", "as the transformers example"):
                    command = [sys.executable, __file__, "--measure", way, str(Path(folder, str(count)))]
                    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
                    command += ["--image_size", str(args.image_size)]
                    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                    result = json.loads(answer.stdout.splitlines()[-1])
                    print(
                        f"| {number} | {count} | {way} | {result['speed']:.1f} | {result['memory']:.0f} |", flush=True
                    )


def draw(folder: Path, count: int) -> None:
    """Draw photographs: blurred colours, others in each, with the same grain."""
    grain = np.random.default_rng(0).normal(0, 5, (SIDE[1], SIDE[0], 3)).astype(np.int8)

    def draw_one(number: int) -> None:
        coarse = np.random.default_rng(number).integers(0, 255, (40, 54, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(SIDE, Image.Resampling.BICUBIC), dtype=np.int16)
        path = folder / ("even", "odd")[number % 2] / f"{number:03}.jpg"
        Image.fromarray((image + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)

    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw_one, range(count)))


def measure(way: str, folder: str, image_size: int) -> dict:
    """Return images per second and this process's peak memory in MB."""
    sys.path.insert(0, str(PROJECT))
    from data import load_splits, prepare, with_views
    from models import build_model
    from views import EvaluationView

    if way == "as the transformers example":
        seen = reference(folder, image_size)
    else:
        view = EvaluationView(build_model("efficientnet_lite0", {0: "even", 1: "odd"}, image_size)[1])
        if way == "training view":
            splits, _ = load_splits(data_dir=folder)
            seen = with_views(prepare(splits, view), view, "flip_crop", "evaluation")["train"]
    start = time.perf_counter()
    if way.startswith("prepare"):
        splits, _ = load_splits(data_dir=folder)  # which looks every picture through
        n = sum(len(split) for split in prepare(splits, view).values())
    else:
        n = min(len(seen), 48)
        for row in range(n):
            seen[row]["pixel_values"]
    speed = n / (time.perf_counter() - start)
    return {"speed": speed, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def compare_probes(folder: str, image_size: int) -> None:
    """Print the validation score of a probe on stored training pictures and of one on the files."""
    sys.path.insert(0, str(PROJECT))
    import torch
    from torch import nn

    from data import load_splits, prepare
    from images import decode_rgb
    from models import build_model, linear_head
    from probe import fit_probe
    from views import EvaluationView

    files, _ = load_splits(data_dir=folder)
    labels = dict(enumerate(files["train"].features["label"].names))
    model, image_processor = build_model("efficientnet_lite0", labels, image_size)
    model.set_submodule(linear_head(model), nn.Identity())
    view = EvaluationView(image_processor)
    stored = prepare(files, view)

    def features(views: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(torch.stack(views[i : i + 16])).logits for i in range(0, len(views), 16)])

    validation = features([view.unpack(row["view"]) for row in stored["validation"]])
    train = {
        "stored": [view(row["image"]) for row in stored["train"]],
        "files": [view(decode_rgb(Path(row["image"]["path"]).read_bytes())[0]) for row in files["train"]],
    }
    print("| training pictures | validation loss | accuracy | strength |")
    print("|---|---|---|---|")
    targets = {split: torch.tensor(stored[split]["label"][:]) for split in stored}
    for name, views in train.items():
        probe = fit_probe(features(views), targets["train"], validation, targets["validation"])
        hits = (probe.logits(validation).argmax(dim=1) == targets["validation"]).float().mean()
        print(f"| {name} | {probe.loss:.4f} | {hits:.1%} | {probe.strength} |")
    pairs = zip(*train.values(), strict=True)
    apart = [(one - other).abs().mean() / view.contrast.mean() * 255 for one, other in pairs]
    print(f"\nMean difference of a view: {torch.stack(apart).mean():.2f} of 255 levels.")


def reference(folder: str, image_size: int):
    """Return a data set that is decoded and transformed on access, as the example does with its defaults."""
    from datasets import load_dataset
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    transform = Compose(
        [RandomResizedCrop(image_size), RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]
    )

    def see(batch: dict) -> dict:
        return {"pixel_values": [transform(image.convert("RGB")) for image in batch["image"]]}

    return load_dataset("imagefolder", data_dir=folder, split="train").with_transform(see)


if __name__ == "__main__":
    main()
