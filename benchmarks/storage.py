"""What an evaluation view costs, stored in several ways: bytes, and milliseconds to make, to store and to read it.

    python -m benchmarks.storage path/to/instruments path/to/suite/steel [--image_size 256]

The ways: its levels as they are, as PNG, as lossless WebP, and not at all, when the file is kept and decoded again.
Every way gives the same pixel values, bit for bit. Each is measured in one thread, on 100 images of a folder.
"""

import io
import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from benchmarks._common import build_parser, directory
from luthier.images.decode import decode_rgb, is_image
from luthier.images.views import EvaluationView
from models import build_model

IMAGES = 100


def main() -> None:
    """Print a row for each folder and way."""
    parser = build_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=directory, metavar="FOLDER", help="with images at any depth")
    parser.add_argument("--image_size", type=int, help="side of the view in pixels (default: the model's own)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    view = EvaluationView(build_model("efficientnet_lite0", {0: "a", 1: "b"}, args.image_size)[1]).measure()
    print("| images | pixels, median | way | bytes an image | make and store, ms | read, ms |")
    print("|---|---|---|---|---|---|")
    for folder in args.folders:
        paths = sorted(path for path in folder.rglob("*") if is_image(path.name))
        if not paths:
            parser.error(f"there are no images below {folder}")
        files = [path.read_bytes() for path in paths[:: max(1, len(paths) // IMAGES)][:IMAGES]]
        side = np.median([min(decode_rgb(data).size) for data in files])
        for way, (store, read) in ways(view).items():
            size, made, taken = measure(files, view, store, read)
            print(f"| {folder.name} | {side:.0f} | {way} | {size:,.0f} | {made:.1f} | {taken:.1f} |", flush=True)


def ways(view: EvaluationView) -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], torch.Tensor]]]:
    """Return the functions from a file to what is stored of it, and from that to the pixel values."""

    def make(data: bytes) -> torch.Tensor:
        return view(decode_rgb(data).image)

    def encode(data: bytes, **options) -> bytes:
        file = io.BytesIO()
        Image.fromarray(view.levels(make(data)).permute(1, 2, 0).numpy()).save(file, **options)
        return file.getvalue()

    def decode(stored: bytes) -> torch.Tensor:
        levels = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB")).transpose(2, 0, 1)
        return view.unpack(np.ascontiguousarray(levels).tobytes())

    return {
        "levels": (lambda data: view.pack(make(data)), view.unpack),
        "PNG": (lambda data: encode(data, format="PNG", compress_level=1), decode),
        "lossless WebP": (lambda data: encode(data, format="WEBP", lossless=True, quality=0, method=0), decode),
        "the file": (lambda data: data, make),
    }


def measure(
    files: list[bytes], view: EvaluationView, store: Callable[[bytes], bytes], read: Callable[[bytes], torch.Tensor]
) -> tuple[float, float, float]:
    """Return the bytes of an image, and the milliseconds to store and to read it; check the pixel values."""
    begin = time.perf_counter()
    stored = [store(data) for data in files]
    middle = time.perf_counter()
    for data in stored:
        read(data)
    end = time.perf_counter()
    for data, kept in itertools.islice(zip(files, stored, strict=True), 10):
        assert torch.equal(read(kept), view(decode_rgb(data).image))
    seconds = (middle - begin, end - middle)
    return float(np.mean([len(data) for data in stored])), *(1000 * each / len(files) for each in seconds)


if __name__ == "__main__":
    main()
