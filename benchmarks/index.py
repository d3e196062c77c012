"""How many changed copies of photographs the index of hashes finds, as many images as there may be.

    python -m benchmarks.index path/to/suite path/to/instruments

Every image of the folders is searched for its copy: cropped by up to 5% on each side, resized, compressed again. Six
parts of every image, of 30 to 55% of its sides and turned at random, are searched too, as images of the same kind.
`duplicates.CELL` is lowered, so that the same share of the index is searched as among 100,000, 300,000 or a million
images. A pair counts as found that is compared in detail.
"""

import io
import random
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks._common import build_parser, directory
from luthier.images import duplicates
from luthier.images.decode import decode_rgb, is_image
from luthier.images.duplicates import BITS, BORDERS, CELL, CELLS, find_candidates, fingerprint

AS_MANY = (0, 100_000, 300_000, 1_000_000)  # images; 0 searches everything
PARTS = 6


def main() -> None:
    """Print the share of the copies that are found, by the number of images."""
    parser = build_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=directory, metavar="FOLDER", help="with images at any depth")
    args = parser.parse_args()
    files = [path for folder in args.folders for path in sorted(folder.rglob("*")) if is_image(path.name)]
    if not files:
        parser.error(f"there are no images below {args.folders[0]}")
    with ProcessPoolExecutor() as pool:
        hashes = np.concatenate(list(pool.map(hashes_of, files, range(len(files)), chunksize=20)))
    copies = np.arange(len(files)) * (PARTS + 2)
    print(f"{len(files):,} images, {len(hashes):,} hashes\n")
    print("| searched as among | cells of the index | of them searched | copies found | pairs | s |")
    print("|---|---|---|---|---|---|")
    for images in AS_MANY:
        cells = images // CELL
        duplicates.CELL = max(1, len(hashes) // cells) if cells else len(hashes)
        begin = time.perf_counter()
        pairs = find_candidates(hashes)
        seconds, pairs = time.perf_counter() - begin, pairs[pairs[:, 2] == 0]  # without those in the mirror
        found = share_found(pairs, copies)
        searched = f"{cells:,} | {min(1, CELLS / cells):.0%}" if cells else "- | 100%"
        name = f"{images:,} images" if images else "all pairs"
        print(f"| {name} | {searched} | {found:.1%} | {len(pairs):,} | {seconds:.0f} |", flush=True)


def hashes_of(path: Path, seed: int) -> np.ndarray:
    """Return the hashes of an image, of a changed copy, and of parts of it, uint8 [PARTS + 2, ...]."""
    generator, image = random.Random(seed), decode_rgb(path.read_bytes(), 256).image
    images = [image, changed_copy(image, generator), *parts_of(image, generator)]
    prints = [fingerprint(each).hashes for each in images]
    return np.frombuffer(b"".join(prints), np.uint8).reshape(len(images), len(BORDERS), BITS // 8)


def changed_copy(image: Image.Image, generator: random.Random) -> Image.Image:
    """Return an image slightly cropped, resized and compressed again."""
    width, height = image.size
    left, top, right, bottom = (generator.uniform(0, 0.05) for _ in range(4))
    copy = image.crop((left * width, top * height, (1 - right) * width, (1 - bottom) * height))
    scale, file = generator.uniform(0.6, 1.3), io.BytesIO()
    copy = copy.resize((max(8, round(copy.width * scale)), max(8, round(copy.height * scale))))
    copy.save(file, "JPEG", quality=generator.randint(60, 90))
    return Image.open(file).convert("RGB")


def parts_of(image: Image.Image, generator: random.Random) -> Iterable[Image.Image]:
    """Yield parts of an image, turned or mirrored."""
    for _ in range(PARTS):
        width, height = (generator.uniform(0.3, 0.55) * side for side in image.size)
        left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
        yield image.crop((left, top, left + width, top + height)).transpose(generator.choice(list(Image.Transpose)))


def share_found(pairs: np.ndarray, copies: np.ndarray) -> float:
    """Return which share of the images is paired with the one after it, its copy."""
    found = pairs[(pairs[:, 1] == pairs[:, 0] + 1), 0]
    return float(np.isin(copies, found).mean())


if __name__ == "__main__":
    main()
