"""Training images that stay in their files: labels, the sample, the other splits; what cannot be streamed."""

import gzip
import hashlib
import io
import logging
import math
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COLOURS, encode
from datasets import ClassLabel, Dataset, Features, Image, Value

from data import load_images
from luthier.errors import UserError
from luthier.images import shards, streams
from luthier.images.shards import Block, StreamedRows
from luthier.images.streams import open_stream
from luthier.training.block_batches import BlockBatches

NAMES = sorted(COLOURS)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Blocks of four rows, and a sample of a few of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "BLOCK", 4)
    monkeypatch.setattr(streams, "SAMPLE", 12)


def write(path: str, labels: list[int], first: int = 0, typed: bool = True, **columns) -> dict[str, int]:
    """Write images of some labels; return the labels by the images' digests."""
    images = [encode(NAMES[label % 3], first + row) for row, label in enumerate(labels)]
    label = ClassLabel(names=NAMES) if typed else Value("string")
    features = Features({"photo": Image(), "label": label} | {name: Value("string") for name in columns})
    rows = {"photo": [{"bytes": image, "path": None} for image in images], **columns}
    rows["label"] = labels if typed else [NAMES[label] for label in labels]
    Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=4)
    return {hashlib.sha256(image).hexdigest(): label for image, label in zip(images, labels, strict=True)}


def mixed(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).permutation(np.arange(n) % 3).tolist()


def digest_of(data: bytes) -> torch.Tensor:
    return torch.tensor(list(hashlib.sha256(data).digest()), dtype=torch.uint8)


def learned(stream) -> dict[str, int]:
    rows = stream.rows(digest_of)
    all_rows = [rows[row] for row in range(len(rows))]
    return {bytes(row["pixel_values"].tolist()).hex(): row["labels"] for row in all_rows}


@pytest.mark.parametrize("typed", [True, False])
def test_every_image_has_its_label(typed):
    truth = write("train-0.parquet", mixed(30), 0, typed) | write("train-1.parquet", mixed(15, 1), 100, typed)
    write("validation.parquet", mixed(9), 200, typed)
    write("test.parquet", mixed(9), 300, typed)
    stream = open_stream(".")
    assert learned(stream) == truth
    assert [len(stream.splits[split]) for split in ("validation", "test")] == [9, 9]
    images, unreadable = load_images(data_dir=".", stream=stream)
    assert not unreadable and images["train"].features["label"].names == NAMES
    sample = dict(zip(images["train"]["digest"], images["train"]["label"], strict=True))
    assert 12 <= len(sample) < 20 and sample.items() <= truth.items()
    write("train-1.parquet", mixed(15, 1), 500, typed)  # other images in the same file
    assert learned(open_stream(".")).keys() != truth.keys()


def test_sample_has_every_class():
    rare = mixed(60)
    rare[rare.index(2) :] = [label % 2 for label in rare[rare.index(2) :]]
    rare[41] = 2
    write("train.parquet", rare)
    write("test.parquet", mixed(9), 300)
    write("validation.parquet", mixed(9), 200)
    assert set(open_stream(".").splits["train"]["label"]) == {0, 1, 2}


def test_blocks_are_set_apart_for_validation():
    truth = write("train.parquet", mixed(80))
    write("test.parquet", mixed(9), 300)
    stream = open_stream(".", validation_fraction=0.2)
    images, _ = load_images(data_dir=".", stream=stream)
    apart = set(images["validation"]["digest"][:])
    assert 16 <= len(apart) < 20 and apart | learned(stream).keys() == truth.keys()
    assert not apart & learned(stream).keys() and not apart & set(images["train"]["digest"][:])
    assert len(open_stream(".").labels) == 72  # a tenth, in whole blocks
    with pytest.raises(UserError, match="too few row groups to set some apart"):
        open_stream(".", validation_fraction=0.02)
    assert open_stream(".").fingerprint == open_stream(".").fingerprint != stream.fingerprint


def test_validation_is_test_where_there_is_none(capsys):
    write("train.parquet", mixed(40))
    write("validation.parquet", mixed(9), 300)
    stream = open_stream(".")
    assert len(stream.splits["test"]) == 9 and len(stream.splits["validation"]) == 4
    assert "that of validation takes its place" in capsys.readouterr().out


def test_groups_are_read_with_the_images():
    write("train.parquet", mixed(40), patient=[f"p{row // 4}" for row in range(40)])
    write("validation.parquet", mixed(9), 200, patient=["p98"] * 9)
    write("test.parquet", mixed(9), 300, patient=["p99"] * 9)
    stream = open_stream(".", group_column="patient")
    images, _ = load_images(data_dir=".", stream=stream, group_column="patient")
    assert len(set(images["test"]["group"][:])) == 1 < len(set(images["train"]["group"][:]))


def test_image_that_cannot_be_read_is_replaced_by_the_next_of_its_block(caplog):
    write("train.parquet", mixed(12))
    write("validation.parquet", mixed(9), 200)
    write("test.parquet", mixed(9), 300)
    stream = open_stream(".")
    whole = [stream.rows(digest_of)[row] for row in range(12)]
    broken = bytes(whole[7]["pixel_values"].tolist())

    def transform(data: bytes) -> torch.Tensor:
        if hashlib.sha256(data).digest() == broken:
            raise OSError("the file is empty")
        return digest_of(data)

    with caplog.at_level(logging.WARNING):
        row = stream.rows(transform)[7]
    assert torch.equal(row["pixel_values"], whole[4]["pixel_values"]) and row["labels"] == whole[4]["labels"]
    assert "Not used: row 7 of train, in train.parquet: the file is empty" in caplog.text
    with pytest.raises(UserError, match=r"no image of the 4 rows of a block of .*train.parquet can be read"):
        stream.rows(lambda data: torch.tensor([][1]))[3]


class Table(list):
    """What stands in for a block that was read."""

    def column(self, number: int) -> "Table":
        return self


@pytest.mark.parametrize("workers", [0, 2, 6, shards.LANES, 16])
@pytest.mark.parametrize("sizes", [(128,), (128,) * 7 + (104,), (250,), (30,), (100, 5, 700)])
def test_each_block_is_read_about_once_and_few_stay_in_memory(monkeypatch, workers, sizes):
    monkeypatch.undo()  # the real sizes
    sizes = (sizes * (24_000 // sum(sizes)))[: 24_000 // 8]
    reads: list[int] = []

    def read(block: Block, columns: list[str]) -> Table:
        reads.append(block.first)
        return Table([b""] * block.rows)

    monkeypatch.setattr(Block, "read", read)
    monkeypatch.setattr(shards, "get_worker_info", lambda: SimpleNamespace(num_workers=workers) if workers else None)
    blocks = [Block("train.parquet", "", number, number + 1, size) for number, size in enumerate(sizes)]
    ordered, most = list(BlockBatches(sizes, 32, 1, torch.tensor(0), 0, 1)), 0
    for worker in range(max(1, workers)):
        rows = StreamedRows(blocks, np.zeros(sum(sizes), int), "image", digest_of)
        for number in np.concatenate([[], *ordered[worker :: max(1, workers)]]).astype(int):
            rows.images_of(int(np.searchsorted(rows._ends, number, side="right")))
        most = max(most, sum(map(len, rows._kept.values())))
    lanes = shards.LANES // math.gcd(shards.LANES, workers or 1)
    # Workers that share a lane read its blocks each.
    assert len(reads) <= 1.25 * len(sizes) * max(1, workers) * lanes / shards.LANES + 20 * lanes
    assert most <= lanes * (2 * shards.WINDOW + 2 * max(sizes))


def test_changed_and_damaged_files_are_named():
    truth = write("train.parquet", mixed(40))
    write("validation.parquet", mixed(9), 200)
    write("test.parquet", mixed(9), 300)
    stream = open_stream(".")
    assert learned(stream) == truth
    write("train.parquet", mixed(40), 500)
    with pytest.raises(UserError, match=r"train.parquet cannot be read: it has changed since the run began"):
        learned(stream)
    whole = Path("test.parquet").read_bytes()
    Path("test.parquet").write_bytes(whole[:4] + b"\0" * 40 + whole[44:])  # the first page of images
    with pytest.raises(UserError, match=r"cannot load .: .*test.parquet cannot be read"):
        open_stream(".")


def test_odd_files_give_one_message():
    write("train-0.parquet", mixed(20))
    write("validation.parquet", mixed(9), 200)
    write("test.parquet", mixed(9), 300)
    other = Dataset.from_dict(
        {"photo": [], "kind": []}, features=Features({"photo": Image(), "kind": Value("string")})
    )
    other.to_parquet("train-1.parquet")
    with pytest.raises(UserError, match=r"train-1.parquet has no column 'label', which other files have"):
        open_stream(".")
    write("train-1.parquet", mixed(8), typed=False)
    with pytest.raises(UserError, match=r"has the label '[a-z]+', which is none of its classes"):
        open_stream(".")
    with pytest.raises(UserError, match=r"the column 'photo' holds Image.* and no class names or numbers"):
        open_stream(".", label_column="photo")
    for number in (0, 1):
        write(f"train-{number}.parquet", [])
    with pytest.raises(UserError, match="has no training images"):
        open_stream(".")


def test_groups_need_a_validation_split():
    write("train.parquet", mixed(40), patient=[f"p{row // 4}" for row in range(40)])
    write("test.parquet", mixed(9), 300, patient=["p99"] * 9)
    with pytest.raises(UserError, match=r"--group_column needs a validation split, which . lacks. .*prepare.py"):
        open_stream(".", group_column="patient")


@pytest.mark.parametrize(
    ("train", "others", "options", "message"),
    [
        (sorted(mixed(40)), ("test",), {}, "ordered by class, which a stream does not mix. .*prepare.py"),
        (mixed(40), (), {}, "--streaming needs a test split, which .* lacks. .*prepare.py"),
        (mixed(3), ("test",), {}, "too few row groups to set some apart"),
        (mixed(40), ("test",), {"label_column": "species"}, "there is no column 'species'"),
        (mixed(40), ("test",), {"config": "small"}, "cannot load|BuilderConfig"),
    ],
)
def test_what_cannot_be_streamed_gives_one_message(train, others, options, message):
    write("train.parquet", train)
    for number, split in enumerate(others):
        write(f"{split}.parquet", mixed(9), 200 + 100 * number)
    with pytest.raises(UserError, match=message):
        open_stream(".", **options)


def test_other_files_cannot_be_streamed(images):
    with pytest.raises(UserError, match=r"--streaming reads Parquet files and .*, and .* has others. .*prepare.py"):
        open_stream(str(images))


# --- archives


def pack(path: str, labels: list[int], first: int = 0, label: str = "cls", folder: str = "") -> dict[str, int]:
    """Write images of some labels into an archive, each with its label beside it; return the labels by digest."""
    truth = {}
    with tarfile.open(path, "w") as archive:
        for row, number in enumerate(labels):
            image = encode(NAMES[number % 3], first + row)
            value = str(number) if label == "cls" else NAMES[number]
            for column, data in (("png", image), (label, value.encode())):
                add(archive, f"{folder}{first + row:05}.{column}", data)
            truth[hashlib.sha256(image).hexdigest()] = number
    return truth


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


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
            add(archive, f"part{row}/._{row}.png", b"of a Macintosh")
            add(archive, f"part{row}/{row}.cls", f"{label}\n".encode())
            add(archive, f"part{row}/{row}.json", b"{}")
            add(archive, f"part{row}/{row}.png", images[row])
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
    ],
)  # fmt: skip
def test_archive_that_is_damaged_gives_one_message(damage, message):
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    whole = Path("train.tar").read_bytes()
    Path("train.tar").write_bytes(damage(whole))
    with pytest.raises(UserError, match=message):
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
                add(archive, f"{first + row:05}.png", encode("red", first + row))
                add(archive, f"{first + row:05}.json", str(row % 12).encode())
    stream = open_stream(".", label_column="json")
    images, _ = load_images(data_dir=".", stream=stream, label_column="json")
    names = images["train"].features["label"].names
    assert names == [str(number) for number in range(12)]
    truth = {hashlib.sha256(encode("red", row)).hexdigest(): str(row % 12) for row in range(48)}
    assert {digest: names[label] for digest, label in learned(stream).items()} == truth


@pytest.mark.parametrize("streamed", [True, False])
def test_files_that_number_the_classes_in_other_ways_are_refused(streamed):
    write("train.parquet", mixed(30))
    write("validation.parquet", mixed(9), 200)
    images = [{"bytes": encode("red", row), "path": None} for row in range(4)]
    features = Features({"photo": Image(), "label": ClassLabel(names=["blue", "red"])})
    Dataset.from_dict({"photo": images, "label": [1] * 4}, features=features).to_parquet("test.parquet")
    with pytest.raises(
        UserError, match=r"test.parquet numbers the classes of the column 'label' by the names blue, red"
    ):
        open_stream(".") if streamed else load_images(data_dir=".")


def test_large_row_groups_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "MAX_GROUP", 20_000)
    write("train.parquet", mixed(30))
    write("test.parquet", mixed(9), 200)
    with pytest.raises(UserError, match=r"train.parquet has a row group with 0 MB of images. .* prepare.py"):
        open_stream(".")


def test_archive_that_is_damaged_later_is_named():
    pack("train.tar", mixed(30))
    pack("test.tar", mixed(9), 300)
    stream, (block, *_) = open_stream("."), open_stream(".").blocks
    status = Path("train.tar").stat()
    with Path("train.tar").open("r+b") as file:
        file.seek(block.first)
        file.write(b"\1" * 512)
    os.utime("train.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"train.tar cannot be read: .*Mend it, and resume"):
        learned(stream)


def test_compressed_archives_are_refused():
    for split in ("train", "test"):
        pack(f"{split}.tar", mixed(9))
        Path(f"{split}.tar.gz").write_bytes(gzip.compress(Path(f"{split}.tar").read_bytes()))
        Path(f"{split}.tar").unlink()
    with pytest.raises(UserError, match=r"--streaming reads Parquet files and WebDataset archives \(.tar\), and"):
        open_stream(".")
