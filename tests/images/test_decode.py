"""Decoding an image file to upright RGB: Pillow modes, transparency, EXIF, animations, decompression bombs."""

import errno
import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded
from PIL import Image as PILImage
from PIL import ImageCms, ImageOps

from luthier.images import decode
from luthier.images.decode import decode_rgb, reason

HEIC = Path(__file__).with_name("phone.heic").read_bytes()  # 48 x 64 px when upright: red, and blue at the upper right


def lab_red() -> PILImage.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(PILImage.new("RGB", (8, 8), (200, 40, 40)), srgb, lab, outputMode="LAB")


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (PILImage.new("RGB", (8, 8), (200, 40, 40)), "png", (200, 40, 40)),
        (PILImage.new("RGB", (8, 8), (200, 40, 40)).quantize(4), "png", (200, 40, 40)),
        (PILImage.new("1", (8, 8), 1), "png", (255, 255, 255)),
        (PILImage.new("L", (8, 8), 77), "png", (77, 77, 77)),
        (PILImage.new("LA", (8, 8), (0, 0)), "png", (255, 255, 255)),
        (PILImage.new("RGBA", (8, 8), (200, 40, 40, 0)), "png", (255, 255, 255)),
        (PILImage.new("RGBA", (8, 8), (0, 0, 0, 128)), "png", (127, 127, 127)),
        (PILImage.new("RGBA", (8, 8), (200, 40, 40, 0)), "webp", (255, 255, 255)),
        (PILImage.fromarray(np.full((8, 8), 0x8000, np.uint16)), "png", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 0x8000, np.int32)), "tiff", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 0.5, np.float32)), "tiff", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 128, np.float32)), "tiff", (128, 128, 128)),
        (PILImage.fromarray(np.where(np.eye(8), np.inf, 0.5).astype(np.float32)), "tiff", (128, 128, 128)),
        (PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", (254, 0, 0)),
        (PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff", (255, 0, 0)),
        (PILImage.new("YCbCr", (8, 8), (128, 128, 128)), "jpg", (128, 128, 128)),
        (lab_red(), "tiff", (200, 40, 40)),
    ],
    ids=lambda value: value.mode if isinstance(value, PILImage.Image) else None,
)
def test_every_mode_becomes_the_right_rgb(tmp_path, image, suffix, expected):
    decoded = decode_rgb(encoded(image, tmp_path, suffix)).image
    assert decoded.mode == "RGB"
    assert np.abs(np.median(np.asarray(decoded), axis=(0, 1)) - expected).max() <= 2
    finite = np.isfinite(np.asarray(image, dtype=float)) if image.mode == "F" else np.ones((8, 8), bool)
    assert np.abs(np.asarray(decoded)[finite].astype(int) - expected).max() <= 2


def test_palette_with_transparency_gets_a_white_background(tmp_path):
    image = PILImage.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 40, 40])
    decoded, changed, *_ = decode_rgb(encoded(image, tmp_path, transparency=1))
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and changed


def test_transparent_level_of_16_bits_gets_a_white_background(tmp_path):
    levels = np.where(np.eye(8), 0, 0x8000).astype(np.uint16)
    decoded = decode_rgb(encoded(PILImage.fromarray(levels), tmp_path, transparency=0)).image
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((1, 0)) == (128, 128, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(tmp_path, orientation):
    image = PILImage.fromarray(np.arange(600, dtype=np.uint16).reshape(10, 20, 3).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    data = encoded(image, tmp_path, "png", exif=exif)
    decoded, changed, *_ = decode_rgb(data)
    assert decoded.tobytes() == ImageOps.exif_transpose(PILImage.open(io.BytesIO(data))).tobytes()
    assert changed == (orientation != 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0", b"Exif\0\0" + bytes(20)])
def test_damaged_tags_do_no_harm(tmp_path, suffix, exif):
    image, changed, *_ = decode_rgb(encoded(PILImage.new("RGB", (20, 10), "white"), tmp_path, suffix, exif=exif))
    assert image.size == (20, 10) and (changed or suffix == "jpg")


def test_odd_tag_beside_the_orientation_does_no_harm(tmp_path):
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0213, 2, 4, b"odd\0")]  # a text instead of a number
    tags = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    image = PILImage.open(io.BytesIO(encoded(PILImage.new("RGB", (20, 10), "white"), tmp_path, "jpg", exif=exif)))
    with pytest.raises(Exception, match="integer"):  # so Pillow's own function fails
        ImageOps.exif_transpose(image)
    assert decode_rgb((tmp_path / "image.jpg").read_bytes()).image.size == (10, 20)


def test_exif_orientation_is_applied(tmp_path):
    image = PILImage.new("RGB", (20, 10), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    decoded, changed, *_ = decode_rgb(encoded(image, tmp_path, "jpg", exif=exif))
    assert decoded.size == (10, 20) and changed


def test_animation_gives_its_first_frame(tmp_path):
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_rgb(encoded(frames[0], tmp_path, "gif", save_all=True, append_images=frames[1:])).image
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_what_is_no_file_of_an_image_is_refused(tmp_path, monkeypatch, kind):
    """Reading a pipe or /dev/zero would never end."""
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(bytes(3 * 2**20))
        monkeypatch.setattr(decode, "MAX_BYTES", 2**20)
    with pytest.raises(OSError, match="it has 3 MB, and more than 1 are" if kind == "large" else "no regular file"):
        decode.read_bytes({"bytes": None, "path": str(path)})


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_grey_of_many_rows_is_converted_alike(mode):
    levels = np.arange(600 * 40).reshape(600, 40)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    file = io.BytesIO()
    PILImage.fromarray((levels * 2).astype(kind)).save(file, "TIFF")
    expected = np.round(levels * 2 / 257).clip(0, 255)
    assert np.array_equal(np.asarray(decode_rgb(file.getvalue()).image)[..., 1], expected)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(PILImage.DecompressionBombError) as refusal:
        decode_rgb(encoded(PILImage.new("RGB", (8, 8)), tmp_path))
    assert reason(refusal.value) == "more than 0 megapixels: make it smaller"


def test_very_elongated_image_is_refused():
    for size, refused in (((1, 501), True), ((1002, 2), True), ((1, 500), False)):
        file = io.BytesIO()
        PILImage.new("L", size).save(file, "PNG")
        if refused:
            with pytest.raises(OSError, match="px: one side is more than 500 times the other"):
                decode_rgb(file.getvalue())
        else:
            assert decode_rgb(file.getvalue()).image.size == size


@pytest.mark.parametrize(("highest", "shown"), [(255, 255), (4095, 255), (65535, 255), (8191, 32)])
def test_grey_of_12_bits_in_16_is_not_black(highest, shown):
    levels = np.linspace(0, highest, 40 * 40).round().astype(np.uint16).reshape(40, 40)
    file = io.BytesIO()
    PILImage.fromarray(levels).save(file, "PNG")
    image = np.asarray(decode_rgb(file.getvalue()).image)
    assert image.max() == shown and len(np.unique(image)) > shown / 2


def tiled_tiff(tile: int, more: tuple = (), kind: int = 4) -> bytes:
    """A grey TIFF of 16 x 16 px in one tile; the tags of its size are of a type, and may be there twice."""
    content = zlib.compress(bytes(tile * tile), 1)
    tags = [
        (256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, kind, tile),
        (323, kind, tile), *more, (324, 4, 0), (325, 4, len(content)),
    ]  # fmt: skip
    tags.sort(key=lambda tag: tag[0])
    end = 8 + 2 + 12 * len(tags) + 4
    file = b"II*\0" + struct.pack("<LH", 8, len(tags))
    for tag, type_, value in tags:
        where = end + 8 if tag == 324 else end if type_ == 17 else value  # 8 bytes do not fit into a tag
        file += struct.pack("<HHLL", tag, type_, 1, where)
    return file + struct.pack("<LQ", 0, tile) + content


@pytest.mark.parametrize("odd", [{}, {"more": ((322, 4, 64), (323, 4, 64))}, {"kind": 17}])
def test_large_tile_of_a_small_tiff_is_refused(odd):
    with pytest.raises(OSError, match="a TIFF with tiles of more than"):
        decode_rgb(tiled_tiff(1024, **odd), max_pixels=500_000)


def test_tile_that_is_larger_than_its_image_is_read():
    assert decode_rgb(tiled_tiff(64), max_pixels=500_000).image.size == (16, 16)


def test_tiff_whose_tags_are_cut_off_is_refused():
    with pytest.raises(OSError, match="a TIFF with bands or bits that are not read, or a damaged one"):
        decode_rgb(tiled_tiff(64)[:30])


def test_tiff_that_ends_within_its_tags_is_refused():
    """Pillow reads the tags that are there, and opens it."""
    whole = tiled_tiff(64)
    with pytest.raises(OSError, match="the file is truncated"):
        decode_rgb(whole[:8] + struct.pack("<H", 60_000) + whole[10:])


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_12_bits_are_read_alike_whatever_type_holds_them(kind):
    file = io.BytesIO()
    PILImage.fromarray(np.full((8, 8), 4000, kind)).save(file, "TIFF")
    assert np.asarray(decode_rgb(file.getvalue()).image).max() == 249


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"\0\0\0\x18ftypheic" + bytes(99), "a damaged HEIC"), (b"II*\0" + bytes(99), "a TIFF with bands")],
)
def test_format_that_is_not_read_is_named(data, why):
    with pytest.raises(OSError, match=why):
        decode_rgb(data)


def test_heic_of_a_phone_is_read_upright():
    decoded = decode_rgb(HEIC)
    assert (decoded.image.size, decoded.format, decoded.changed) == ((48, 64), "HEIF", True)
    for place, colour in [((40, 10), (20, 40, 220)), ((10, 10), (200, 30, 40)), ((40, 50), (200, 30, 40))]:
        assert np.abs(np.array(decoded.image.getpixel(place)) - colour).max() <= 4


def test_heic_that_cannot_be_read_says_why(monkeypatch):
    with pytest.raises(OSError, match="48 x 64 px are more than the 3,000 pixels"):
        decode_rgb(HEIC, max_pixels=3_000)
    with pytest.raises((OSError, ValueError)) as found:
        decode_rgb(HEIC[:-20])
    assert "damaged" in reason(found.value)
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(OSError, match="cannot be opened: it is HEIC: pip install pi-heif, or convert it to JPEG"):
        decode_rgb(HEIC)


def test_heic_that_shows_a_small_part_of_a_huge_image_is_refused():
    sides = b"ispe" + bytes(4) + struct.pack(">LL", 64, 64)
    assert HEIC.count(sides) == 1
    for side, most in ((8_000, 51_000_000), (20_000, None)):
        huge = HEIC.replace(sides, b"ispe" + bytes(4) + struct.pack(">LL", side, side))
        with pytest.raises(OSError, match="a HEIC with an image of more than"):  # it says that it is 48 x 64
            decode_rgb(huge, max_pixels=most)


def test_pi_heif_without_its_library_is_named(monkeypatch):
    def fail(**_):
        raise ImportError("libheif.so: cannot open shared object file")

    monkeypatch.setattr("pi_heif.register_heif_opener", fail)
    with pytest.raises(OSError, match="cannot be opened: it is HEIC: pip install pi-heif"):
        decode_rgb(HEIC)


def test_jpeg_of_too_many_scans_is_refused(monkeypatch):
    file = io.BytesIO()
    PILImage.new("RGB", (64, 48)).save(file, "JPEG", progressive=True)
    head, marker, scan = file.getvalue().rpartition(b"\xff\xda")
    hostile = head + 1_000 * (marker + scan[:-2]) + b"\xff\xd9"
    monkeypatch.setattr(decode, "MAX_SCANNED", 500 * 64 * 48)
    assert decode_rgb(file.getvalue(), max_pixels=10_000).image.size == (64, 48)
    with pytest.raises(OSError, match=r"JPEG of 1,\d+ scans"):
        decode_rgb(hostile, max_pixels=10_000)


def test_network_disk_may_also_refuse_to_describe_a_file_for_a_moment(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"image")
    failures, look = [errno.ETIMEDOUT, errno.ESTALE], Path.stat

    def look_at_last(path, **options):
        if failures and path.name == "a.png":
            raise OSError(failures.pop(), "away")
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", look_at_last)
    monkeypatch.setattr(decode.time, "sleep", lambda _: None)
    assert decode.read_file(tmp_path / "a.png") == b"image"


def test_disk_that_is_gone_is_not_waited_for_at_every_file(monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "away")

    waited, lost = [], []
    monkeypatch.setattr(decode, "_read_file", fail)
    monkeypatch.setattr(decode, "_lost", lost)
    monkeypatch.setattr(decode.time, "sleep", waited.append)
    for number in range(decode.PATIENCE + 5):
        with pytest.raises(OSError, match="away"):
            decode.read_file(f"{number}.png")
    assert len(waited) == decode.PATIENCE * len(decode.WAITS)


def test_disk_that_has_come_back_is_waited_for_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"image")
    monkeypatch.setattr(decode, "_lost", decode.PATIENCE * ["lost.png"])
    assert decode.read_file(tmp_path / "a.png") == b"image" and decode._lost == []


def test_error_of_a_network_disk_that_passes_is_none(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"image")
    failures, read = [errno.EIO, errno.ESTALE], Path.read_bytes

    def read_at_last(path):
        if failures:
            raise OSError(failures.pop(), "away")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_at_last)
    monkeypatch.setattr(decode.time, "sleep", lambda _: None)
    assert decode.read_file(tmp_path / "a.png") == b"image"


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_grey_of_16_bits_whose_zero_is_white_is_not_inverted(compression):
    file = io.BytesIO()
    levels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    PILImage.fromarray(levels).save(file, "TIFF", tiffinfo={262: 0}, compression=compression)
    shown = np.asarray(decode_rgb(file.getvalue()).image)[..., 0]
    assert np.abs(shown - (255 - levels / 257)).max() <= 1 and (shown[0, 0], shown[7, 7]) == (255, 0)


def test_grey_of_32_bits_is_not_white():
    file = io.BytesIO()
    PILImage.fromarray(np.array([[0, 2**19], [2**18, 2**20 - 1]], np.int32)).save(file, "TIFF")
    assert np.asarray(decode_rgb(file.getvalue()).image)[..., 0].tolist() == [[0, 128], [64, 255]]
    sign = struct.pack("<HHLH", 339, 3, 1, 2)  # the tag that says so
    file = io.BytesIO()
    PILImage.fromarray(np.array([[0, 2**31], [2**30, 2**32 - 1]], np.uint32).view(np.int32)).save(file, "TIFF")
    assert file.getvalue().count(sign) == 1
    unsigned = file.getvalue().replace(sign, struct.pack("<HHLH", 339, 3, 1, 1))
    assert np.asarray(decode_rgb(unsigned).image)[..., 0].tolist() == [[0, 128], [64, 255]]


@pytest.mark.parametrize(
    ("bits", "colours", "row", "transparent"),
    [
        (2, 0, b"\x6f", b"\0\1"),  # levels 1, 2, 3, 3
        (4, 0, b"\x5a\xff", b"\0\5"),
        (8, 0, b"\x55\xaa\xff\xff", b"\0\x55"),
        (16, 2, b"\x12\x34" * 3 + b"\xaa\xaa" * 3 + b"\xff\xff" * 6, b"\x12\x34" * 3),
    ],
)
def test_transparent_level_of_any_bits_gets_a_white_background(bits, colours, row, transparent):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 4, 1, bits, colours, 0, 0, 0))
    parts = head, chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")
    decoded = decode_rgb(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert [decoded.image.getpixel((x, 0))[0] for x in range(4)] == [255, 170, 255, 255] and decoded.changed


@pytest.mark.parametrize(
    "levels",
    [np.array([[0, 32768], [65535, 2**31 - 1]], np.int32), np.array([[0, 0.5], [1, 3.4e38]], np.float32)],
)
def test_number_that_stands_for_no_data_does_not_make_an_image_black(levels):
    file = io.BytesIO()
    PILImage.fromarray(levels).save(file, "TIFF")
    assert np.asarray(decode_rgb(file.getvalue()).image)[..., 0].tolist() == [[0, 128], [255, 255]]


def test_grey_of_floating_point_numbers_whose_zero_is_white_is_not_inverted():
    file = io.BytesIO()
    PILImage.fromarray(np.array([[0, 1]], np.float32)).save(file, "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode_rgb(file.getvalue()).image)[..., 0].tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("bits", "colours", "row", "transparent"), [(2, 0, b"\x6f", b"\0\1"), (8, 2, bytes(range(12)), b"\0\1\0\2\0\3")]
)
def test_transparent_png_may_begin_with_a_chunk_of_its_program(bits, colours, row, transparent):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 4, 1, bits, colours, 0, 0, 0))
    image = chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"prIv", b"abcd") + head + b"".join(image)
    assert decode_rgb(data).image.size == (4, 1)


def test_avif_is_not_turned_by_its_xmp():
    file = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    PILImage.new("RGB", (20, 10), "white").save(file, "AVIF", xmp=xmp)
    decoded = decode_rgb(file.getvalue())
    assert decoded.image.size == (20, 10) and decoded.changed
