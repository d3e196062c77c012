"""Training images that stay in their files: labels, the sample, the other splits; what cannot be streamed."""

import hashlib
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import COLOURS, digest_of, encode, learned, mixed
from datasets import ClassLabel, Dataset, Features, Image, Value
from pyarrow import parquet

from data import list_images, load_images
from luthier.errors import UserError
from luthier.images import shards
from luthier.images.shards import Block, StreamedRows
from luthier.images.streams import _draw_sample, _set_apart, open_stream
from luthier.training.block_batches import BlockBatches

NAMES = sorted(COLOURS)
pytestmark = pytest.mark.usefixtures("small_blocks")


def save(dataset: Dataset, path: str) -> None:
    if len(dataset):
        dataset.to_parquet(path, batch_size=4)
    else:  # `datasets` before 5.1 cannot
        parquet.write_table(dataset.data.table, path)


def write(path: str, labels: list[int], first: int = 0, typed: bool = True, **columns) -> dict[str, int]:
    """Write images of some labels; return the labels by the images' digests."""
    images = [encode(NAMES[label % 3], first + row) for row, label in enumerate(labels)]
    label = ClassLabel(names=NAMES) if typed else Value("string")
    features = Features({"photo": Image(), "label": label} | {name: Value("string") for name in columns})
    rows = {"photo": [{"bytes": image, "path": None} for image in images], **columns}
    rows["label"] = labels if typed else [NAMES[label] for label in labels]
    save(Dataset.from_dict(rows, features=features), path)
    return {hashlib.sha256(image).hexdigest(): label for image, label in zip(images, labels, strict=True)}


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


def test_validation_that_was_set_apart_is_no_split_of_ones_own(capsys):
    write("train.parquet", [2, *(row % 2 for row in range(79))])
    write("test.parquet", mixed(9), 300)
    stream = open_stream(".")
    splits, _ = list_images(data_dir=".", stream=stream)
    assert set(splits["train"]["label"][:]) == {0, 1, 2}
    assert "of your own" not in capsys.readouterr().out


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
    for share in (15, 0, -1):
        with pytest.raises(UserError, match=f"--validation_fraction is {share}, but must lie between 0 and 1"):
            open_stream(".", validation_fraction=share)
    assert open_stream(".").fingerprint == open_stream(".").fingerprint != stream.fingerprint


def test_validation_is_test_where_there_is_none(capsys):
    write("train.parquet", mixed(40))
    write("validation.parquet", mixed(9), 300)
    stream = open_stream(".")
    assert len(stream.splits["test"]) == 9 and len(stream.splits["validation"]) == 4
    assert "that of validation takes its place" in capsys.readouterr().out


def test_groups_are_read_with_the_images():
    truth = write("train.parquet", mixed(40), patient=[f"p{row // 4}" for row in range(40)])
    write("validation.parquet", mixed(9), 200, patient=["p98"] * 9)
    write("test.parquet", mixed(9), 300, patient=["p99"] * 9)
    stream = open_stream(".", group_column="patient")
    images, _ = load_images(data_dir=".", stream=stream, group_column="patient")
    assert len(set(images["test"]["group"][:])) == 1
    patients, train = {digest: row // 4 for row, digest in enumerate(truth)}, images["train"]
    found = {(patients[digest], group) for digest, group in zip(train["digest"][:], train["group"][:], strict=True)}
    assert len(found) == len({patient for patient, _ in found}) == len({group for _, group in found}) > 1


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
        reads.append(block.begin)
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
    save(other, "train-1.parquet")
    with pytest.raises(UserError, match=r"train-1.parquet has no column 'label', which other files have"):
        open_stream(".")
    one = {"photo": [{"bytes": encode("red", 500), "path": None}], "label": ["violet"]}
    save(Dataset.from_dict(one, features=Features({"photo": Image(), "label": Value("string")})), "train-1.parquet")
    with pytest.raises(UserError, match=r"has the label 'violet', which is none of its classes"):
        open_stream(".")
    with pytest.raises(
        UserError, match=r"the column 'photo' holds no class names or numbers, but Image.*: name another"
    ):
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


def test_stream_whose_rows_name_files_is_refused():
    """They could be any of this machine, and end in a report or in a published model."""
    write("train.parquet", mixed(40))
    write("validation.parquet", mixed(9), 200)
    features = Features({"photo": Image(), "label": ClassLabel(names=NAMES)})
    rows = {"photo": [{"bytes": None, "path": "/etc/hosts"}] * 9, "label": mixed(9)}
    parquet.write_table(Dataset.from_dict(rows, features=features).data.table, "test.parquet")
    with pytest.raises(UserError, match=r"the split test of \. names a file instead of an image \(/etc/hosts\)"):
        open_stream(".")


def test_stream_whose_readme_names_files_of_others_is_refused(tmp_path):
    for folder in ("others", "set"):
        Path(folder).mkdir()
    for split, n in (("train", 40), ("validation", 9), ("test", 9)):
        write(f"others/{split}.parquet", mixed(n))
    card = f"configs:\n- config_name: default\n  data_files: {tmp_path}/others/*.parquet\n"
    Path("set/README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(UserError, match="names a file that is not its own"):
        open_stream("set")


def test_large_row_groups_are_refused(monkeypatch):
    monkeypatch.setattr(shards, "MAX_GROUP", 20_000)
    write("train.parquet", mixed(30))
    write("test.parquet", mixed(9), 200)
    with pytest.raises(UserError, match=r"train.parquet has a row group with 0 MB of images. .* prepare.py"):
        open_stream(".")


def test_block_that_has_other_rows_than_before_is_refused(tmp_path):
    path = str(tmp_path / "train.parquet")
    write(path, [0, 1, 2])
    block = Block(path, shards._version_of(path), 0, 1, 3)
    assert len(block.read(["label"])) == 3
    with pytest.raises(UserError, match="4 rows were there before, and now 3"):
        block._replace(rows=4).read(["label"])


def test_small_row_groups_are_read_together(monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 6)  # groups have four rows, and the last one two
    truth = write("train.parquet", mixed(30))
    write("validation.parquet", mixed(9), 200)
    write("test.parquet", mixed(9), 300)
    stream = open_stream(".")
    assert sorted(stream.rows(digest_of).sizes) == [6, 8, 8, 8] and learned(stream) == truth


def arrays(*blocks: list[int]) -> list[np.ndarray]:
    return [np.array(labels) for labels in blocks]


def test_last_block_of_a_class_is_not_set_apart():
    blocks = arrays([0, 1, 1], [0, 1, 2], [1, 0, 0], [0, 1, 0])
    assert _set_apart(blocks, np.array([1, 0, 2, 3]), 4) == [0, 2]  # 1 has the only image of a class
    assert _set_apart(arrays([0, 1], [0, 1], [0, 0]), np.arange(3), 3) == [0, 2]  # 1 has the last one, then


def test_sample_has_three_images_of_a_rare_class():
    frequent = [[0, 0, 1, 1]] * 3
    blocks = arrays(*frequent, [0, 1, 0, 2], [0, 0, 1, 1], [2, 0, 1, 1], [1, 0, 2, 1], [2, 0, 0, 1])
    assert _draw_sample(blocks, np.arange(8)) == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("streamed", [True, False])
def test_numbered_classes_beside_texts_are_refused(streamed):
    """They would be classes called 0, 1 and 2."""
    write("train-0.parquet", mixed(20), typed=False)
    write("train-1.parquet", mixed(8), 100)
    write("validation.parquet", mixed(9), 200, typed=False)
    write("test.parquet", mixed(9), 300, typed=False)
    with pytest.raises(UserError, match=r"train-1.parquet has numbers in the column 'label', and names for them"):
        open_stream(".") if streamed else load_images(data_dir=".")


def test_row_groups_that_are_read_together_are_not_too_large(monkeypatch):
    truth = write("train.parquet", mixed(30))
    write("validation.parquet", mixed(9), 200)
    write("test.parquet", mixed(9), 300)
    metadata = parquet.read_metadata("train.parquet")
    sizes = [shards._size_of(metadata.row_group(group), "photo") for group in range(metadata.num_row_groups)]
    monkeypatch.setattr(shards, "BLOCK", 100)
    monkeypatch.setattr(shards, "MAX_GROUP", 2 * max(sizes))
    stream = open_stream(".")
    assert learned(stream) == truth and len(stream.blocks) >= 3
    assert all(sum(sizes[block.begin : block.end]) <= 2 * max(sizes) for block in stream.blocks)


def test_file_of_a_bucket_has_a_version(monkeypatch):
    """Its address has no revision, and what is kept of it would be that of an earlier file."""
    kept = {"train/0.tar": "a"}

    def look(self, bucket: str, paths: list[str]) -> list:
        return [SimpleNamespace(size=9, xet_hash=kept[path]) for path in paths if bucket == "me/set" and path in kept]

    monkeypatch.setattr(shards.HfApi, "get_bucket_paths_info", look)
    before = shards._version_of("hf://buckets/me/set/train/0.tar")
    kept["train/0.tar"] = "b"
    assert shards._version_of("hf://buckets/me/set/train/0.tar") != before
    with pytest.raises(FileNotFoundError, match=r"there is no file hf://buckets/me/set/1\.tar"):
        shards._version_of("hf://buckets/me/set/1.tar")
    assert shards._version_of("hf://datasets/me/set@1/0.tar") == ""


def test_files_of_another_server_cannot_be_streamed(monkeypatch):
    files = {"train": ["https://example.org/train.parquet"], "test": ["https://example.org/test.parquet"]}
    builder = SimpleNamespace(name="parquet", config=SimpleNamespace(data_files=files), info=None)
    monkeypatch.setattr(shards, "load_dataset_builder", lambda *_: builder)
    with pytest.raises(UserError, match=r"of this machine and of the Hub, not https://example.org/train.*prepare.py"):
        open_stream("me/set")
