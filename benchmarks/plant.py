"""Faults planted in a dataset, and how many of them the audit finds.

    python -m benchmarks.plant
    python -m benchmarks.plant path/to/instruments

It plants faults among drawn images, or in a copy of a folder of class folders: 20 duplicates (other bytes, the same
pixels), 20 near-duplicates (re-encoded, resized, slightly cropped), 20 wrong labels and 10 broken files. It prints
recall and precision of each. On photographs, faults that were there before count as false, so the precision is a lower
bound.
"""

import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import audit
from benchmarks._common import build_parser, directory
from luthier.errors import exit_on_user_error

SHAPES = ("disc", "bar", "triangle", "ring")


@exit_on_user_error
def main() -> None:
    """Plant, audit, print the table."""
    parser = build_parser(__doc__)
    parser.add_argument("folder", nargs="?", type=directory, help="of class folders, for the faults (default: drawn)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "images")
        if args.folder:
            shutil.copytree(args.folder, root, ignore=shutil.ignore_patterns(".*"))
        else:
            draw_set(root, per_class=100)
        planted = plant(root)
        reported = find(root)
    print("| fault | planted | detected | all reported | recall | precision |\n|---|---|---|---|---|---|")
    for kind, names in planted.items():
        detected, n = len(names & reported[kind]), len(reported[kind])
        precision = f"{detected / n:.0%}" if n else "none reported"
        print(f"| {kind} | {len(names)} | {detected} | {n} | {detected / len(names):.0%} | {precision} |")


def draw_set(root: Path, per_class: int) -> Path:
    """Draw scenes of four kinds of shapes, a folder for each kind."""
    for number, kind in enumerate(SHAPES):
        (root / kind).mkdir(parents=True)
        for index in range(per_class):
            draw_scene(kind, 10_000 * number + index).save(root / kind / f"{index:03}.png")
    return root


def draw_scene(kind: str, seed: int) -> Image.Image:
    """Draw three to six shapes of a kind, in random colours, sizes and places, on a background of random colours."""
    generator = np.random.default_rng(seed)
    width, height = (int(side) for side in generator.integers(160, 260, 2))
    background = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(background).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(generator.integers(3, 7)):
        size = int(generator.integers(25, 70))
        x, y = (int(generator.integers(0, side - size)) for side in (width, height))
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        if kind == "disc":
            pen.ellipse((x, y, x + size, y + size), fill=colour)
        elif kind == "bar":
            pen.rectangle((x, y, x + size, y + size // 4), fill=colour)
        elif kind == "triangle":
            pen.polygon([(x, y + size), (x + size // 2, y), (x + size, y + size)], fill=colour)
        else:
            pen.ellipse((x, y, x + size, y + size), outline=colour, width=6)
    noise = generator.normal(0, 4, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def plant(root: Path, copies: int = 20, broken: int = 10) -> dict[str, set]:
    """Plant faults in a folder of class folders; return the names of the files, or pairs of names, by kind."""
    generator = random.Random(1)
    files = sorted(path for path in root.rglob("*.*") if path.is_file())
    chosen = generator.sample(files, 3 * copies + broken)
    exact, near, moved, spoiled = (chosen[k : k + copies] for k in range(0, 3 * copies + 1, copies))
    planted = {"exact duplicates": set(), "near-duplicates": set(), "wrong labels": set(), "broken files": set()}

    def name(path: Path) -> str:
        return str(path.relative_to(root))

    for path in exact:
        copy = path.with_name(f"copy-{path.stem}.png")
        Image.open(path).convert("RGB").save(copy, compress_level=1)
        planted["exact duplicates"].add(frozenset({name(path), name(copy)}))
    for number, path in enumerate(near):
        copy = path.with_name(f"near-{path.stem}.jpg")
        image = Image.open(path).convert("RGB")
        width, height = image.size
        if number % 4 != 1:  # cropped by up to 5% on each side
            left, top, right, bottom = (generator.uniform(0, 0.05) for _ in range(4))
            image = image.crop((left * width, top * height, (1 - right) * width, (1 - bottom) * height))
        if number % 4 != 2:
            scale = generator.uniform(0.6, 1.3)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image.save(copy, quality=generator.randint(60, 90))
        planted["near-duplicates"].add(frozenset({name(path), name(copy)}))
    folders = sorted({path.parent for path in files})
    for path in moved:
        other = generator.choice([folder for folder in folders if folder != path.parent])
        target = other / f"moved-{path.parent.name}-{path.name}"
        path.rename(target)
        planted["wrong labels"].add(name(target))
    for number, path in enumerate(spoiled):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], b"", b"<html></html>")[number % 3])
        planted["broken files"].add(name(path))
    return planted


def find(root: Path, *options: str) -> dict[str, set]:
    """Audit a folder with audit.py and its options; return what it reports, in the form of `plant`."""
    output_dir = root.parent / "audit"
    audit.main([str(root), "--output_dir", str(output_dir), "--disable_tqdm", "True", *options])
    findings = json.loads((output_dir / "audit.json").read_text(encoding="utf-8"))
    exact = pairs(findings["exact_duplicates"])
    return {
        "exact duplicates": exact,
        "near-duplicates": pairs(findings["near_duplicates"]) - exact,
        "wrong labels": {image["name"] for image in findings["suspect_labels"]},
        "broken files": {image["name"] for image in findings["unreadable"]},
    }


def pairs(groups: Iterable[list[dict]]) -> set[frozenset]:
    """Return every pair of names within a group."""
    return {frozenset({a["name"], b["name"]}) for group in groups for a, b in itertools.combinations(group, 2)}


if __name__ == "__main__":
    main()
