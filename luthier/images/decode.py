"""One image file to upright RGB pixels, the same way for training and for predictions."""

import contextlib
import errno
import io
import math
import re
import stat
import struct
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# Raster formats that Pillow decodes itself; EPS, for one, would be handed to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
EXTENSIONS_OF = {  # by what Pillow calls a format; others have their name
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}, "MPO": {".jpg", ".jpeg", ".mpo"}, "TIFF": {".tif", ".tiff"},
    "HEIF": {".heic", ".heif", ".hif"},
}  # fmt: skip
EXTENSIONS = {f".{name.lower()}" for name in FORMATS}.union(*EXTENSIONS_OF.values())
UNREAD = {
    ".jp2", ".jxl", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pbm", ".pgm",
    ".pnm", ".ppm", ".tga", ".dcm",
}  # fmt: skip
UPRIGHT = {  # what turns an image upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
MAX_BYTES = 2**30  # of a file; the largest images that Pillow opens have half of it, uncompressed
MAX_SCANNED = 25_000_000_000  # pixels of a foreign image, times the scans of its JPEG, each of which goes through all
STRIP = 256  # rows of a grey image that are converted at a time: all of them would take eight times their memory
TILE = (322, 323)  # tags of a TIFF: width and height of a tile
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339  # tags of a TIFF: what 0 is; whether numbers have a sign
SUBFILE, PREVIEW, MASK = 254, 1, 4  # tag of a TIFF: what a page is to the others; bits of it
MAX_RATIO = 500  # of an image's sides: a view enlarges the shorter one, and the longer one with it
# By macOS, Windows, Linux, and network disks of Synology, whose @eaDir has thumbnails of all images beside it.
LEFT_BEHIND = {
    "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir",
    "#recycle",
}  # fmt: skip
CONVERT = "convert it to JPEG or PNG"
CLOUD = ".icloud"  # older systems of Apple have .NAME.icloud in the place of a file that is in the cloud alone
HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # bytes 8 to 11 of HEIC files
NOT_OPENED = "cannot be opened: "  # prefix of reasons that may be gone at the next try
# Errors of network disks that pass, and the seconds before each new attempt. An image that is left out of a run
# and can be read when it is resumed makes other splits of its images, and the run does not go on.
PASSING, WAITS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN}, (0.2, 1.0)
# Files in a row that no attempt could read: after so many, there is no waiting until one can be read.
PATIENCE, _lost = 100, list[str | Path]()


class Decoded(NamedTuple):
    """A decoded image file.

    Attributes:
        image: upright, 8-bit RGB.
        changed: it differs from what a plain decoder would give.
        format: of the file, as Pillow names it.
        size: (width, height) in the file, which is larger than `image` where that was decoded at a reduced scale.
    """

    image: Image.Image
    changed: bool
    format: str
    size: tuple[int, int]


def decode_rgb(data: bytes, shorter_side: int | None = None, max_pixels: int | None = None) -> Decoded:
    """Decode an image file to upright 8-bit RGB.

    Transparency is laid on white. Grey of 16 bits, of 12 in a file of 16, and of floating-point numbers is scaled to 8
    bits. Of an animation the first frame is taken. The EXIF orientation is applied.

    Args:
        data: the file.
        shorter_side: the shorter side that is needed, in pixels. A JPEG is then decoded at an eighth, a quarter or a
            half of its size where that leaves at least as much: several times faster for large photographs.
        max_pixels: larger images are refused before they take memory; Pillow itself refuses them above 179 million.

    Raises:
        OSError: the data is damaged, in a format that is not allowed, larger than `max_pixels` or too elongated.
        PIL.Image.DecompressionBombError: the image has more pixels than Pillow itself allows.
        Exception: of any other kind, by Pillow's plugins, where the data is damaged; `reason` puts all into words.
    """
    if not data:
        raise OSError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and above 89 megapixels; above 179 Pillow raises
        image = _open(data)
        size = image.size
        if max_pixels and size[0] * size[1] > max_pixels:
            text = f"{size[0]} x {size[1]} px are more than the {max_pixels:,} pixels that are allowed"
            raise OSError(f"{text}: make it smaller")
        if max(size) > MAX_RATIO * min(size):
            raise OSError(f"{size[0]} x {size[1]} px: one side is more than {MAX_RATIO} times the other")
        scans = data.count(b"\xff\xda") if max_pixels and image.format in ("JPEG", "MPO") else 0
        if scans * size[0] * size[1] > MAX_SCANNED:
            raise OSError(f"a JPEG of {scans:,} scans, which would take minutes to decode")
        most = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if image.format == "TIFF":
            _check_tile(data, image, most)
        if image.format == "HEIF":
            _check_coded_sizes(data, most)
        if shorter_side and min(image.size) > shorter_side and image.format in ("JPEG", "MPO"):
            scale = shorter_side / min(image.size)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        if image.format == "PNG" and "transparency" in image.info:
            _scale_transparent_level(image, data[data.index(b"IHDR") + 12])
        image.load()
        # An AVIF says itself how it is turned. Pillow lets that override EXIF, and not XMP.
        stray = image.format == "AVIF" and image.info.pop("xmp", None) is not None
        changed = image.mode != "RGB" or image.has_transparency_data
        changed |= image.format == "HEIF" or stray  # `datasets` would turn it
        # Not `ImageOps.exif_transpose`, which writes the tags anew, and fails at odd ones that do not matter here.
        try:
            turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
            changed |= turn is not None
        except Exception:  # damaged tags give errors of any kind
            turn, changed = None, True  # and `datasets` would fail at them
        rgb = _to_rgb(image if turn is None else image.transpose(turn))
        rgb.info = {}  # Pillow would store its colour profile or comment again, which a new format may not hold
        return Decoded(rgb, changed, str(image.format), size)


def _open(data: bytes) -> Image.Image:
    """Open an image file without decoding its pixels.

    Raises:
        OSError: its format is not allowed, or the beginning is damaged.
    """
    Image.init()  # without it Pillow knows half of the formats
    with contextlib.suppress(UnidentifiedImageError):
        return Image.open(io.BytesIO(data), formats=FORMATS)
    if data[4:8] == b"ftyp" and data[8:12] in HEIF:  # a plain AVIF may begin so too
        try:
            import pi_heif

            # One thread: all cores decode an image each. Only this fails where its library cannot be loaded.
            pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)
        except ImportError:
            raise OSError(f"{NOT_OPENED}it is HEIC: pip install pi-heif, or {CONVERT}") from None
        with contextlib.suppress(UnidentifiedImageError):
            return Image.open(io.BytesIO(data), formats=["HEIF"])
        raise OSError(f"a damaged HEIC, or one of a kind that is not read: {CONVERT}")
    if data[:4] in (b"II*\0", b"MM\0*"):
        raise OSError("a TIFF with bands or bits that are not read, or a damaged one: convert it to RGB")
    raise OSError(f"not an image in an allowed format ({', '.join(FORMATS)}, HEIC)")


def is_stack(data: bytes) -> bool:
    """Tell whether a TIFF holds several images of one size, such as layers or channels; no previews and masks."""
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # damaged pages give errors of any kind
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            size = image.size
            image.seek(1)
            kind = dict(getattr(image, "tag_v2", {})).get(SUBFILE, 0)
            return image.size == size and not kind & (PREVIEW | MASK)
    return False


def _scale_transparent_level(image: Image.Image, bits: int) -> None:
    """Bring the transparent level of a PNG to 8 bits, as Pillow does with the pixels that it compares to it.

    Args:
        image: opened, and not loaded.
        bits: of a level in the file.
    """
    level = image.info["transparency"]
    if image.mode == "L":
        image.info["transparency"] = level % 2**bits * 255 // (2**bits - 1)
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(each >> (bits - 8) for each in level)


def _check_tile(data: bytes, image: Image.Image, most: float) -> None:
    """Refuse a TIFF whose tiles are too large: each is decoded whole, however small the image is.

    If a tag is there twice, Pillow reads the last one and libtiff the first; some types libtiff alone reads. So tags
    are counted in the file itself.

    Raises:
        OSError: a tile has more than `most` pixels, or a size that cannot be told, or the file is damaged.
    """
    order, is_big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"\x2b\0", b"\0\x2b")  # BigTIFF
    number, first, step = ("Q", 8, 20) if is_big else ("H", 2, 12)
    try:
        (start,) = struct.unpack_from(order + ("Q" if is_big else "L"), data, 8 if is_big else 4)
        (entries,) = struct.unpack_from(order + number, data, start)
        begins = (start + first + step * entry for entry in range(entries))
        tags = [struct.unpack_from(f"{order}H", data, begin)[0] for begin in begins]
    except struct.error:
        raise OSError("the file is truncated") from None
    if any(tag in tags for tag in TILE):
        width, height = (dict(getattr(image, "tag_v2", {})).get(tag, 0) for tag in TILE)
        if any(tags.count(tag) != 1 for tag in TILE) or not 0 < width * height <= most:
            raise OSError(f"a TIFF with tiles of more than {most:,.0f} pixels, or of no clear size: {CONVERT}")


def _check_coded_sizes(data: bytes, most: float) -> None:
    """Refuse a HEIC of which only a part is shown (`clap`), where the whole is too large: that is decoded first.

    Raises:
        OSError: an image in it has more than `most` pixels.
    """
    begin = 0
    while begin + 8 <= len(data):  # through the boxes; pixels may hold any bytes
        size, kind = struct.unpack_from(">L4s", data, begin)
        size = size or len(data) - begin
        if size == 1 and begin + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, begin + 8)
        meta = data[begin : begin + size] if kind == b"meta" else b""
        for found in meta.split(b"ispe")[1:]:
            if len(found) >= 12 and math.prod(struct.unpack_from(">LL", found, 4)) > most:
                raise OSError(f"a HEIC with an image of more than {most:,.0f} pixels: {CONVERT}")
        begin += max(size, 8)


def read_bytes(source: dict | None) -> bytes:
    """Return the file of a row's `image`, a dict of `bytes` and `path` as `datasets` has it.

    Raises:
        OSError: it is not there, or see `read_file`.
    """
    if not source or (source["bytes"] is None and source["path"] is None):
        raise OSError("there is no image")
    return read_file(source["path"]) if source["bytes"] is None else source["bytes"]


def read_file(path: str | Path) -> bytes:
    """Return what a file holds.

    Raises:
        OSError: it is not there, or larger than `MAX_BYTES`, or a device or a pipe, which may never end.
    """
    waits = iter(WAITS if len(_lost) < PATIENCE else ())
    while True:
        try:
            return _read_file(path)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            wait = next(waits, None)
            if wait is None:
                _lost.append(path)
                raise
        time.sleep(wait)


def _read_file(path: str | Path) -> bytes:
    facts = Path(path).stat()
    if not stat.S_ISREG(facts.st_mode):
        raise OSError("it is no regular file")
    if facts.st_size > MAX_BYTES:
        raise OSError(f"it has {facts.st_size / 2**20:,.0f} MB, and more than {MAX_BYTES / 2**20:,.0f} are not read")
    content = Path(path).read_bytes()
    _lost.clear()  # the disk is there
    return content


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden, or one that an operating system leaves behind."""
    return (name.startswith(".") and (name == CLOUD or not name.endswith(CLOUD))) or name in LEFT_BEHIND


def is_image(name: str) -> bool:
    """Tell whether a file's name is that of an image."""
    return Path(name).suffix.lower() in EXTENSIONS and not is_hidden(name)


def is_unread(name: str) -> bool:
    """Tell whether a file's name is that of an image in a format that is not read."""
    return Path(name).suffix.lower() in UNREAD and not is_hidden(name)


def extensions_of(file_format: str) -> set[str]:
    """Return the extensions, in small letters, that files of a format may have."""
    return EXTENSIONS_OF.get(file_format, {f".{file_format.lower()}"})


def reason(error: BaseException) -> str:
    """Return in one line why an image could not be read, without its path, which the caller knows."""
    if isinstance(error, MemoryError):
        return f"{NOT_OPENED}there is not enough memory"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} megapixels: make it smaller"
    if isinstance(error, OSError) and error.errno:
        return f"{NOT_OPENED}{error.strerror}"
    text = "; ".join(filter(None, str(error).splitlines())) or type(error).__name__
    is_damaged = re.search("truncated|broken|end of file", text, re.I)
    return f"the file is damaged or not complete ({text})" if is_damaged else text


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _grey_to_rgb(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # as `inPlace` is not asked for
        return converted
    elif image.has_transparency_data or image.mode in ("La", "RGBa"):
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of 16 or 32 bits a pixel in 8 bits."""
    levels, tags = np.asarray(image), getattr(image, "tag_v2", {})  # a TIFF was turned by Pillow, and is itself here
    if image.mode == "I" and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        levels = levels.view(np.uint32)  # Pillow has no such mode
    transparent = None if image.mode in ("I", "F") else image.info.get("transparency")
    counts = np.isfinite(levels) & (levels != transparent)
    if image.mode in ("I", "F"):  # the largest numbers stand for "no data", and all others would be black
        counts &= levels < (1e30 if image.mode == "F" else np.iinfo(levels.dtype).max)
    highest = float(levels.max(where=counts, initial=0))
    scale = 255 / _white_level(image.mode, highest)
    grey = np.empty(levels.shape, dtype=np.uint8)
    for begin in range(0, len(levels), STRIP):
        part = levels[begin : begin + STRIP].astype(np.float64)
        scaled = np.nan_to_num(part, posinf=highest, neginf=0) * scale
        scaled[part == transparent] = 255
        grey[begin : begin + STRIP] = scaled.round().clip(0, 255)
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds up to 8 bits
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")


def _white_level(mode: str, highest: float) -> int:
    """Return what is shown as white, by the highest level of an image: no file says how many of its bits are used.

    Most medical devices and cameras give 12 bits, which are nearly black on the scale of 16.
    """
    if highest > 65535:
        return 2 ** int(highest).bit_length() - 1
    if mode == "F":
        return 1 if highest <= 1 else 255 if highest <= 255 else 65535
    return 255 if highest <= 255 else 4095 if highest <= 4095 else 65535
