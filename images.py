"""One picture file to upright RGB pixels; apart from data.py, because a prediction decodes as training does."""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# Raster formats that Pillow decodes itself; EPS, for one, would be handed to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
UNOPENED = "cannot be opened: "  # begins the reasons that may be gone the next time
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"}


class Decoded(NamedTuple):
    """A decoded picture file.

    Attributes:
        image: upright, 8-bit RGB.
        changed: it differs from what a plain decoder would give.
        format: of the file, as Pillow names it.
        size: (width, height) of the file's picture, which is larger where it was decoded at a part of its size.
    """

    image: Image.Image
    changed: bool
    format: str
    size: tuple[int, int]


def decode_rgb(data: bytes, shortest: int | None = None, most_pixels: int | None = None) -> Decoded:
    """Decode a picture file to upright 8-bit RGB.

    Transparency is laid on white; 16-bit and floating-point grey is brought to the range of 8 bits; of an animation
    the first frame is taken; the EXIF orientation is applied.

    Args:
        data: the file.
        shortest: the shorter side that will be used, in pixels. A JPEG is then decoded at an eighth, a quarter or a
            half of its size where that leaves at least so much: several times faster for large photographs.
        most_pixels: refuses larger pictures before they take memory; Pillow itself does so above 179 million.

    Raises:
        OSError: the data is damaged, of no allowed format, or too large.
    """
    if not data:
        raise OSError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata and of more than 89 megapixels; above 179 Pillow raises
        Image.init()  # without it Pillow knows half of the formats
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise OSError(f"not a picture in an allowed format ({', '.join(FORMATS)})") from None
        size = image.size
        if most_pixels and size[0] * size[1] > most_pixels:
            raise OSError(f"{size[0]} x {size[1]} px are more than the {most_pixels:,} that are allowed")
        if shortest and min(image.size) > shortest and image.format in ("JPEG", "MPO"):
            scale = shortest / min(image.size)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
        upright = ImageOps.exif_transpose(image)
        changed = image.mode != "RGB" or image.has_transparency_data or image.getexif().get(0x0112, 1) != 1
        return Decoded(_to_rgb(upright), changed, image.format, size)


def read(source: dict | None) -> bytes:
    """Return the file of a row's `image` (bytes or path), as `datasets` has it.

    Raises:
        OSError: it is not there.
    """
    if not source or (source["bytes"] is None and source["path"] is None):
        raise OSError("there is no picture")
    return Path(source["path"]).read_bytes() if source["bytes"] is None else source["bytes"]


def hidden(name: str) -> bool:
    """Tell whether a file or folder is one that its owner does not see, or that a system leaves about."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_picture(name: str) -> bool:
    """Tell whether a file's name is a picture's."""
    return Path(name).suffix.lower() in EXTENSIONS and not hidden(name)


def reason(error: Exception) -> str:
    """Say in a line why a picture could not be read, without the path, which is told beside it."""
    if isinstance(error, OSError) and error.errno:
        return f"{UNOPENED}{error.strerror}"
    return "; ".join(str(error).splitlines()) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.float64) / 257
    elif image.mode in ("I", "F"):  # the range is not written anywhere, so it is taken from the values
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        highest = grey.max()
        scale = 255 if image.mode == "F" and highest <= 1 else 1 if highest <= 255 else 1 / 257
        grey = grey * scale
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    elif image.has_transparency_data or image.mode in ("La", "RGBa"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    else:
        return image.convert("RGB")
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
