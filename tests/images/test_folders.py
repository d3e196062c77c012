"""A folder of class folders: class names, splits, hidden files, and folders that cannot be used."""

import logging
import os
from pathlib import Path

import pytest
from conftest import draw, draw_folder, labels_of, load

from luthier.errors import UserError


def test_class_keeps_its_index_if_a_split_lacks_other_classes(tmp_path):
    draw_folder(tmp_path / "p/train", 3)
    draw_folder(tmp_path / "p/val", 2, first=20)
    draw_folder(tmp_path / "p/test", 2, classes=("red",), first=40)
    (tmp_path / "p/test/blue").mkdir()
    splits = load(data_dir=str(tmp_path / "p"))
    assert splits["test"].features["label"].names == ["blue", "green", "red"]
    assert set(splits["test"]["label"][:]) == {2}


def test_folder_names_that_imagefolder_misreads(tmp_path):
    for number, name in enumerate(("freight train", "test tubes", "Çalgı")):
        (tmp_path / name / "deep/er").mkdir(parents=True)
        for seed in range(4):
            draw("red", 10 * number + seed).save(tmp_path / name / ("deep/er" if seed else "") / f"{seed}.png")
    splits = load(data_dir=str(tmp_path))
    assert labels_of(splits) == ["freight train", "test tubes", "Çalgı"]
    assert sum(len(dataset) for dataset in splits.values()) == 12


def test_other_files_are_reported_and_hidden_files_are_not(images, caplog):
    (images / "red/notes.txt").write_text("no image")
    (images / "drawing.eps").write_text("%!PS")
    (images / "red/.DS_Store").write_text("")
    (images / ".git").mkdir()
    with caplog.at_level(logging.WARNING):
        splits = load(data_dir=str(images))
    assert sum(len(dataset) for dataset in splits.values()) == 24
    assert "2 files" in caplog.text and "notes.txt" in caplog.text and ".DS_Store" not in caplog.text


def empty_class(root: Path) -> None:
    draw_folder(root)
    (root / "violet").mkdir()


def splits_without_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split).mkdir()
        draw("red", 1).save(root / split / "1.png")


def test_classes_with_the_names_of_splits(tmp_path):
    for number, name in enumerate(("bus", "test", "train")):
        (tmp_path / name).mkdir()
        for seed in range(4):
            draw("red", 10 * number + seed).save(tmp_path / name / f"{seed}.png")
    assert labels_of(load(data_dir=str(tmp_path))) == ["bus", "test", "train"]


def splits_and_another_folder(root: Path) -> None:
    draw_folder(root / "train")
    draw_folder(root / "test")
    draw_folder(root / "scratch")


def empty_split(root: Path) -> None:
    draw_folder(root / "train")
    (root / "test/red").mkdir(parents=True)


def test_class_missing_from_train_is_refused(tmp_path):
    draw_folder(tmp_path / "p/train", 4, classes=("red", "blue"))
    draw_folder(tmp_path / "p/test", 2)
    with pytest.raises(UserError, match="no training image has the class 'green'"):
        load(data_dir=str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "no images in class folders"),
        (empty_class, "violet has no images: fill it or remove it"),
        (splits_without_classes, "no class folders in them"),
        (lambda root: draw_folder(root, classes=("red",)), "the one class 'red'"),
        (lambda root: draw_folder(root, 2), "'blue' has 2 images, too few"),
        (empty_split, "test has no images: fill it, or remove it"),
        (splits_and_another_folder, "holds the splits test, train and beside them scratch"),
        (lambda root: [draw_folder(root / s) for s in ("train", "val", "dev")], "two folders for one split"),
    ],
)
def test_unusable_folder_is_refused(tmp_path, build, message):
    build(tmp_path)
    with pytest.raises(UserError, match=message):
        load(data_dir=str(tmp_path))


def test_file_name_that_is_not_utf8_is_refused(images):
    Path(os.fsdecode(os.fsencode(images / "red") + b"/\xff.png")).touch()
    with pytest.raises(UserError, match=r"xff.png' is not valid UTF-8: rename the file"):
        load(data_dir=str(images))


def test_broken_link_is_refused(images):
    (images / "red/gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone.png cannot be read: .*Replace or remove it"):
        load(data_dir=str(images))


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        load(data_dir=str(tmp_path / "nowhere"))
