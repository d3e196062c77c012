"""Datasets in shards, as Parquet files and WebDataset archives: loaded like folders; one message where damaged."""

from pathlib import Path

import pytest
from conftest import COLOURS, draw, encode, load, write_archive
from datasets import ClassLabel, Dataset, Features, Image

from luthier.errors import UserError
from luthier.images.metadata import has_shards
from luthier.images.streams import open_stream

NAMES = sorted(COLOURS)


def write_parquet(folder: Path, split: str, n: int, seed: int) -> None:
    """Write images in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"photo": Image(), "label": ClassLabel(names=NAMES)})
    for part in range(2):
        rows = [
            {"photo": {"bytes": encode(NAMES[row % 3], seed + 100 * part + row), "path": None}, "label": row % 3}
            for row in range(n)
        ]
        Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{split}-0000{part}-of-00002.parquet"))


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_files_are_loaded_with_their_splits_and_names(tmp_path, below):
    write_parquet(tmp_path / below, "train", 15, 0)
    write_parquet(tmp_path / below, "test", 6, 1000)
    splits = load(data_dir=str(tmp_path))
    assert splits["train"].features["label"].names == NAMES
    assert len(splits["test"]) == 12 and len(splits["train"]) + len(splits["validation"]) == 30


@pytest.mark.parametrize("name", ["photos.parquet", "photos.csv", "photos.tar"])
def test_file_is_not_taken_for_a_dataset(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    for load_it in (lambda: load(dataset_name=str(tmp_path / name)), lambda: open_stream(str(tmp_path / name))):
        with pytest.raises(UserError, match=rf"{name} is a file, and not a dataset: give the folder"):
            load_it()


def test_webdataset_archives_are_loaded_and_named(tmp_path):
    for part in range(3):
        write_archive(tmp_path / f"train-{part:03}.tar", 12, 100 * part)
    splits = load(data_dir=str(tmp_path), label_names=NAMES)
    assert sum(map(len, splits.values())) == 36 and splits["train"].features["label"].names == NAMES
    assert splits["train"]["name"][0].endswith(".png")


def test_class_folders_images_and_tables_come_before_an_archive_that_lies_beside_them(images, tmp_path):
    assert not has_shards(images)
    write_archive(images / "backup.tar", 3, 0)
    assert not has_shards(images)
    flat = tmp_path / "flat"
    write_archive(flat / "backup.tar", 3, 0)
    assert has_shards(flat)
    rows = ["file_name,label,split"]
    for row in range(24):
        draw(NAMES[row % 3], row).save(flat / f"{row}.png")
        rows.append(f"{row}.png,{NAMES[row % 3]},{'test' if row < 6 else 'train'}")
    assert not has_shards(flat)
    (flat / "labels.csv").write_text("\n".join(rows))
    assert len(load(data_dir=str(flat), labels=str(flat / "labels.csv"))["test"]) == 6
    (flat / "labels.csv").rename(flat / "metadata.csv")
    assert len(load(data_dir=str(flat))["test"]) == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("train-0.parquet", {}, "cannot load .*: .*Parquet"),
        ("train-0.tar", {}, "cannot load .*unexpected end of data"),
        ("train-0.tar", {"split_column": "split"}, "are for image files in a folder: .* holds Parquet or tar files"),
    ],
)
def test_damaged_shards_and_options_of_folders_give_one_message(tmp_path, name, options, message):
    write_parquet(tmp_path / "whole", "train", 5, 0)
    write_archive(tmp_path / "whole" / "train.tar", 5, 0)
    whole = next((tmp_path / "whole").glob(f"*{Path(name).suffix}"))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / name).write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match=message):
        load(data_dir=str(tmp_path / "damaged"), **options)
