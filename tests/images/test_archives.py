"""Streams of WebDataset archives: labels, the index, other files in them, damage."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import COLOURS, add_file, encode, learned, mixed

from data import load_images
from luthier.errors import UserError
from luthier.images import shards
from luthier.images.streams import open_stream

NAMES = sorted(COLOURS)
pytestmark = pytest.mark.usefixtures("small_blocks")


def pack(
    path: str, labels: list[int], first: int = 0, label: str = "cls", folder: str = "", end: str = ""
) -> dict[str, int]:
    """Write images of some labels into an archive, each with its label beside it; return the labels by digest."""
    truth = {}
    with tarfile.open(path, "w") as archive:
        for row, number in enumerate(labels):
            image = encode(NAMES[number % 3], first + row)
            value = str(number) if label == "cls" else NAMES[number]
            for column, data in (("png", image), (label, f"{value}{end}".encode())):
                add_file(archive, f"{folder}{first + row:05}.{column}", data)
            truth[hashlib.sha256(image).hexdigest()] = number
    return truth


@pytest.mark.parametrize("folder", ["", "images.v2/" + 30 * "long-name/"])
@pytest.mark.parametrize("label", ["cls", "txt"])
def test_archives_give_every_image_its_label(folder, label):
    truth = pack("train-0.tar", mixed(30), 0, label, folder) | pack("train-1.tar", mixed(15, 1), 100, label, folder)
    pack("validation.tar", mixed(9), 200, label, folder)
    pack("test.tar", mixed(9), 300, label, folder)
    column = None if label == "cls" else label
    stream = open_stream(".", label_column=column)
    assert learned(stream) == truth and [block.rows for block in stream.blocks] == [4] * 7 + [2] + [4] * 3 + [3]
    images, unreadable = load_images(data_dir=".", stream=stream, label_column=column)
    whole, _ = load_images(data_dir=".", label_column=column)
    assert not unreadable and images["test"]["name"][:] == whole["test"]["name"][:]
    assert images["test"]["digest"][:] == whole["test"]["digest"][:]
    assert images["train"].features["label"] == whole["train"].features["label"]


@pytest.mark.parametrize("end", ["", "\n"])
def test_readme_may_say_which_classes_the_texts_name(end):
    truth = pack("train.tar", mixed(30), 0, "txt", end=end)
    pack("validation.tar", mixed(9), 200, "txt", end=end)
    pack("test.tar", mixed(9), 300, "txt", end=end)
    features = [{"name": "png", "dtype": "image"}, {"name": "txt", "dtype": {"class_label": {"names": NAMES}}}]
    Path("README.md").write_text(f"---\ndataset_info: {json.dumps({'features': features})}\n---\n")
    stream = open_stream(".")
    assert learned(stream) == truth
    assert load_images(data_dir=".", stream=stream)[0]["test"]["label"][:] == mixed(9)


def test_archive_with_names_of_classes_where_numbers_belong_says_where_names_go():
    pack("train-0.tar", mixed(9), 0, "txt")
    Path("train-0.tar").write_bytes(renamed(Path("train-0.tar").read_bytes(), ".txt", ".cls"))
    with pytest.raises(
        UserError, match=r"\.cls files hold numbers: write names into \.txt files \(--label_column txt\)"
    ):
        load_images(data_dir=".")


def test_points_in_names_are_told_in_a_short_message():
    with tarfile.open("train.tar", "w") as archive:
        for number in range(40):
            add_file(archive, f"IMG.{number}.png", encode("red", number))
    message = r"^0\.png or 1\.png or 2\.png could be the image column.* and 22 more\. In an archive, what follows"
    with pytest.raises(UserError, match=message):
        load_images(data_dir=".")


def test_archive_is_indexed_once(monkeypatch):
    truth = pack("train.tar", mixed(30)) | pack("validation.tar", mixed(9), 200) | pack("test.tar", mixed(9), 300)
    first = open_stream(".")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "index_archive", None)  # not called
        assert open_stream(".").blocks == first.blocks and learned(first).items() <= truth.items()
    pack("train.tar", mixed(30), 500)
    with pytest.raises(UserError, match=r"train.tar cannot be read: it has changed since the run began"):
        learned(first)


def test_archive_may_hold_other_files_too():
    pack("validation.tar", mixed(9), 200)
    pack("test.tar", mixed(9), 300)
    labels, images = mixed(10), [encode(NAMES[row % 3], row) for row in range(10)]
    with tarfile.open("train.tar", "w") as archive:
        for row, label in enumerate(labels):
            folder = tarfile.TarInfo(f"part{row}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            add_file(archive, f"part{row}/._{row}.png", b"of a Macintosh")
            add_file(archive, f"part{row}/{row}.cls", f"{label}\n".encode())
            add_file(archive, f"part{row}/{row}.json", b"{}")
            add_file(archive, f"part{row}/{row}.png", images[row])
    stream = open_stream(".")
    assert learned(stream) == {
        hashlib.sha256(image).hexdigest(): label for image, label in zip(images, labels, strict=True)
    }


def renamed(data: bytes, old: str, new: str) -> bytes:
    """Return an archive with another name of one of its files."""
    changed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=changed, mode="w") as target:
        for entry in source:
            entry.name = entry.name.replace(old, new)
            target.addfile(entry, source.extractfile(entry))
    return changed.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000], "train.tar cannot be read: unexpected end of data"),
        (lambda data: data[:512].replace(b"ustar", b"\0\0\0\0\0") + data[600:], "cannot be read: bad checksum"),
        (lambda data: b"", "train.tar cannot be read: empty file"),
        (lambda data: renamed(data, "00014.cls", "00014.txt"), "1 row of the train split has no label"),
        (lambda data: data[: data.index(b"00014.cls") + 512] + b"x" + data[data.index(b"00014.cls") + 513 :],
         "train.tar cannot be read: 00014.cls holds 'x' where a whole number was expected"),
        (lambda data: renamed(data, "00014.png", "00014.PNG"), "00014 has no image 00014.png, but .PNG, .cls. Give"),
        (lambda data: data.replace(b"00014.png", b"00014.pn\xff"), "cannot be read: the header at byte .* is damaged"),
        (lambda data: data + data, "train.tar cannot be read: the header .* is damaged, or another archive follows"),
        (gzip.compress, "train.tar cannot be read: invalid header"),
        (lambda data: renamed(data, "00014.", "00013."), "cannot be read: two files of 00013 that follow each other"),
    ],
)  # fmt: skip
def test_archive_that_is_damaged_gives_one_message(damage, message):
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    whole = Path("train.tar").read_bytes()
    Path("train.tar").write_bytes(damage(whole))
    with pytest.raises(UserError, match=message):
        open_stream(".")


def test_sparse_file_in_an_archive_is_refused():
    """A few bytes may stand for gigabytes of zeros."""
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    header = bytearray(tarfile.TarInfo("00029.cls").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[148:156] = b"S", b" " * 8  # its type
    header[483:495] = b"%011o\0" % 2**33  # its real size
    header[148:156] = b"%06o\0 " % sum(header)
    whole = renamed(Path("train.tar").read_bytes(), "00029.cls", "00029.txt").rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    Path("train.tar").write_bytes(whole + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"00029.cls is a sparse file"):
        open_stream(".")


@pytest.mark.parametrize(
    "damage", [lambda data: data.replace(b"00014.png", b"00014.pn\xff"), lambda data: data + data]
)
def test_archive_that_would_be_read_in_part_is_refused_without_streaming_too(damage):
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    assert len(load_images(data_dir=".")[0]["train"]) == 30
    Path("train.tar").write_bytes(damage(Path("train.tar").read_bytes()))
    with pytest.raises(UserError, match=r"train.tar cannot be read: the header .* is damaged, or another"):
        load_images(data_dir=".")


def test_numbers_in_text_files_are_the_classes_of_every_split():
    """`datasets` reads the files as numbers: 10 is after 2."""
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        with tarfile.open(f"{split}.tar", "w") as archive:
            for row in np.random.default_rng(first).permutation(48).tolist():
                add_file(archive, f"{first + row:05}.png", encode("red", first + row))
                add_file(archive, f"{first + row:05}.json", str(row % 12).encode())
    stream = open_stream(".", label_column="json")
    images, _ = load_images(data_dir=".", stream=stream, label_column="json")
    names = images["train"].features["label"].names
    assert names == [str(number) for number in range(12)]
    truth = {hashlib.sha256(encode("red", row)).hexdigest(): str(row % 12) for row in range(48)}
    assert {digest: names[label] for digest, label in learned(stream).items()} == truth


def test_archive_that_is_damaged_later_is_named():
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    stream, (block, *_) = open_stream("."), open_stream(".").blocks
    status = Path("train.tar").stat()
    with Path("train.tar").open("r+b") as file:
        file.seek(block.begin)
        file.write(b"\1" * 512)
    os.utime("train.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"train.tar cannot be read: .*Mend it, and resume with --output_dir"):
        learned(stream)


def test_compressed_archives_are_refused():
    for split in ("train", "test"):
        pack(f"{split}.tar", mixed(9))
        Path(f"{split}.tar.gz").write_bytes(gzip.compress(Path(f"{split}.tar").read_bytes()))
        Path(f"{split}.tar").unlink()
    with pytest.raises(UserError, match=r"--streaming reads Parquet files and WebDataset archives \(.tar\), and"):
        open_stream(".")


def test_texts_in_json_are_the_classes_that_they_are_without_streaming():
    truth = {}
    for split, first, count in (("train", 0, 30), ("validation", 100, 9), ("test", 200, 9)):
        with tarfile.open(f"{split}.tar", "w") as archive:
            for row, label in enumerate(mixed(count)):
                image = encode(NAMES[label], first + row)
                add_file(archive, f"{first + row:05}.png", image)
                add_file(archive, f"{first + row:05}.json", json.dumps(NAMES[label]).encode())
                if split == "train":
                    truth[hashlib.sha256(image).hexdigest()] = label
    stream = open_stream(".", label_column="json")
    assert learned(stream) == truth
    streamed, _ = load_images(data_dir=".", stream=stream, label_column="json")
    whole, _ = load_images(data_dir=".", label_column="json")
    assert streamed["train"].features["label"].names == whole["train"].features["label"].names == NAMES


def test_blocks_of_large_images_have_fewer_rows(monkeypatch):
    monkeypatch.setattr(shards, "MAX_GROUP", 3000)
    truth = pack("train.tar", mixed(30))
    pack("validation.tar", mixed(9), 200)
    pack("test.tar", mixed(9), 300)
    stream = open_stream(".")
    assert learned(stream) == truth and {block.rows for block in stream.blocks} == {1}
