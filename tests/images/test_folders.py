"""A folder of class folders: class names, splits, hidden files, and folders that cannot be used."""

import logging
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import COLOURS, draw, draw_folder, labels_of, load

import data
from luthier.errors import UserError
from luthier.images.image_files import walk


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
        put(tmp_path / name, 10 * number)
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
        (
            lambda root: draw_folder(root / "all", 2),
            r"folder, all, .*3 folders, such as blue.*give --data_dir .*/all",
        ),
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
    with pytest.raises(UserError, match=r"xff.png' is not valid UTF-8: rename it or its folder"):
        load(data_dir=str(images))


def test_broken_link_is_an_image_that_cannot_be_read(images):
    (images / "red/gone.png").symlink_to("nowhere.png")
    splits, unreadable = data.load_images(data_dir=str(images), max_unreadable=0.5)
    assert [(image.name, image.reason) for image in unreadable] == [
        ("red/gone.png", "cannot be opened: No such file or directory")
    ]
    draw("red", 77).save(images / "red/nowhere.png")
    assert len(data.load_images(data_dir=str(images))[0]["train"]) == len(splits["train"]) + 2, "it is tried again"


@pytest.mark.parametrize("names", [("Training", "Testing"), ("train", "testing"), ("training", "validate", "test")])
def test_common_names_of_splits_are_known(tmp_path, names):
    for number, name in enumerate(names):
        draw_folder(tmp_path / name, 3, first=20 * number)
    splits = load(data_dir=str(tmp_path))
    assert labels_of(splits) == ["blue", "green", "red"]
    assert len(splits["test"]) == 9


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train", "seg_test"),
        ("val", "test"),
        ("train", "test-2024"),
        ("trainset", "testset"),
        ("TrainData", "TestData"),
        ("traindataset", "testdataset"),
    ],
)
def test_folders_that_look_like_splits_are_not_taken_for_classes(tmp_path, names):
    for number, name in enumerate(names):
        draw_folder(tmp_path / name, 3, first=20 * number)
    with pytest.raises(UserError, match=f"{', '.join(sorted(names))}, which look like splits"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("HAM10000_images_part_1", "HAM10000_images_part_2"), True), (("images_001", "images_002"), True),
        (("Batch 1", "batch 2"), True), (("part-1", "chunk-2"), False), (("spare part 1", "flower"), False),
        (("apart1", "apart2"), False), (("mark1", "mark2"), False),
    ],
)  # fmt: skip
def test_parts_of_a_set_beside_a_table_are_not_taken_for_classes(tmp_path, names, refused):
    for number, name in enumerate(names):
        put(tmp_path / name, 10 * number)
    assert labels_of(load(data_dir=str(tmp_path))) == sorted(names)
    (tmp_path / "metadata_of_all.csv").touch()
    if not refused:
        assert labels_of(load(data_dir=str(tmp_path))) == sorted(names)
        return
    with pytest.raises(UserError, match=r"which look like parts of one set of images\. If metadata_of_all\.csv holds"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize("other", ["eval", "unlabelled"])
def test_split_beside_a_folder_that_is_none_is_not_taken_for_a_class(tmp_path, other):
    draw_folder(tmp_path / "train", 3)
    draw_folder(tmp_path / other, 3, first=20) if other == "eval" else put(tmp_path / other, 20)
    with pytest.raises(UserError, match=f"holds train, which looks like a split, and beside it {other}: call the"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize("names", [("train", "test"), ("seg_train", "seg_test", "seg_pred")])
def test_splits_that_archives_have_doubled_are_seen(tmp_path, names):
    for number, name in enumerate(names):
        draw_folder(tmp_path / name / name, 3, first=20 * number)
    if "train" in names:
        splits = load(data_dir=str(tmp_path))
        assert labels_of(splits) == ["blue", "green", "red"] and len(splits["test"]) == 9
        return
    with pytest.raises(UserError, match="seg_test, seg_train, which look like splits, and beside them seg_pred"):
        load(data_dir=str(tmp_path))


def test_splits_in_class_folders_are_refused(tmp_path):
    for number, name in enumerate(("cat/train", "cat/test", "dog/train")):
        put(tmp_path / name, 10 * number)
    with pytest.raises(UserError, match=r"hold the splits test, train. Put the splits first: .*/train/CLASS"):
        load(data_dir=str(tmp_path))


def test_image_beside_a_doubled_folder_is_not_lost_in_silence(tmp_path, caplog):
    for number, name in enumerate(("train/train/a", "train/train/b", "test/a", "test/b")):
        put(tmp_path / name, 10 * number)
    assert labels_of(load(data_dir=str(tmp_path))) == ["a", "b"]
    draw("red", 99).save(tmp_path / "train/loose.png")
    with pytest.raises(UserError, match="no training image has the class 'a', 'b'"):
        load(data_dir=str(tmp_path))
    assert "such as train/loose.png" in caplog.text


@pytest.mark.parametrize("names", [("assets", "data"), ("train", "test")])
def test_folder_of_parquet_files_is_no_class(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "part-0.parquet").touch()
    if "assets" in names:
        (tmp_path / "assets/part-0.parquet").unlink()
        draw("red", 1).save(tmp_path / "assets/1.png")
    with pytest.raises(UserError, match=r"holds Parquet or tar files: give --dataset_name"):
        load(data_dir=str(tmp_path))


def test_message_of_images_outside_of_folders_names_the_table(tmp_path):
    put(tmp_path / "photos", 0)
    with pytest.raises(UserError, match=r"no images in class folders.* as in the file names, give a table"):
        load(data_dir=str(tmp_path / "photos"))
    (tmp_path / "photos/list.xlsx").touch()
    with pytest.raises(UserError, match=r"If list.xlsx holds the classes, save it as CSV"):
        load(data_dir=str(tmp_path / "photos"))


def test_message_of_a_folder_without_images_says_what_is_there(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    draw_folder(folder / "train")
    (folder / "train").rename(folder / "test")
    put(folder / "train", 50)
    with pytest.raises(UserError, match="train have no labels, because they are in no class folders"):
        load(data_dir=str(folder))
    (images / "violet").mkdir()
    (images / "violet/1.png_large").touch()
    with pytest.raises(UserError, match=r"violet has no images in the formats .*\.png.*, but 1.png_large"):
        load(data_dir=str(images))


@pytest.mark.parametrize("name", ["test", "val"])
def test_split_without_labels_is_not_used_for_training(tmp_path, caplog, name):
    """As in a competition, whose test images have no labels. To score a model on them is a mistake."""
    draw_folder(tmp_path / "p/train", 8)
    put(tmp_path / "p" / name / name, 90)
    splits = load(data_dir=str(tmp_path / "p"))
    assert sum(len(dataset) for dataset in splits.values()) == 24
    assert {*splits} == {"train", "validation", "test"}, "cut from train"
    assert f"Not used: the images in {tmp_path / 'p' / name / name}, which have no labels" in caplog.text
    assert "90.png" not in caplog.text
    with pytest.raises(UserError, match="have no labels"):
        data.list_images(data_dir=str(tmp_path / "p"), to_train=False)


def put(folder: Path, first: int) -> None:
    """Write three images into a folder."""
    folder.mkdir(parents=True)
    for seed in range(first, first + 3):
        draw("red", seed).save(folder / f"{seed}.png")


@pytest.mark.parametrize(
    ("names", "below"),
    [
        (("freight train", "passenger train"), ("day", "night")),
        (("a_test", "b_test"), ("day", "night")),
        (("bus stop", "test tube", "train station", "x", "y"), ("day", "night")),
        (("bus", "car", "plane", "ship", "train", "tram"), ("day", "night")),
        (("train 1", "test, red"), ("NAME",)),
        (("bus", "train"), ("NAME", "NAME 2")),
    ],
)
def test_classes_that_share_words_of_splits_or_folders_are_classes(tmp_path, names, below):
    for number, name in enumerate(names):
        for place in below:
            put(tmp_path / name / place.replace("NAME", name), 20 * number + len(place))
    assert labels_of(load(data_dir=str(tmp_path))) == sorted(names)


def test_classes_within_folders_of_days_are_pointed_at(tmp_path, capsys):
    for number, day in enumerate(("monday", "tuesday")):
        for kind in ("healthy", "sick"):
            put(tmp_path / day / kind, 20 * number + len(kind))
    for group_by in ("folder", "^[0-9]"):
        data.list_images(data_dir=str(tmp_path), group_by=group_by)
        assert "careful" not in capsys.readouterr().out, "the user has said what belongs together"
    data.list_images(data_dir=str(tmp_path))
    said = " ".join(capsys.readouterr().out.split())
    assert "such as healthy. If those are the classes, move the folders" in said and "--group_by folder" in said
    assert "videos or places, add that alone. If they are views, such as front and back, change nothing" in said


def test_train_is_a_class_beside_classes_without_folders(tmp_path):
    for number, name in enumerate(("bus", "car", "train/freight", "train/passenger")):
        put(tmp_path / name, 10 * number)
    assert labels_of(load(data_dir=str(tmp_path))) == ["bus", "car", "train"]


@pytest.mark.parametrize(("names", "more"), [(("test",), 0), (("Val", "test"), 0), (("test",), 6)])
def test_split_beside_the_class_folders_is_not_taken_for_a_class(tmp_path, names, more):
    draw_folder(tmp_path, 3)
    for number in range(more):
        put(tmp_path / f"class{number}", 100 * number)
    for number, name in enumerate(names):
        draw_folder(tmp_path / name, 3, first=20 + 20 * number)
    with pytest.raises(UserError, match=f"holds {names[0]}, which looks like a split: .* such as blue. Put the other"):
        load(data_dir=str(tmp_path))


def test_class_folders_beside_those_in_train_are_not_to_be_put_there(tmp_path):
    draw_folder(tmp_path, 3)
    draw_folder(tmp_path / "train", 3)
    with pytest.raises(UserError, match=r"holds train, .* such as blue\. Give --data_dir .*train\. If train is a"):
        load(data_dir=str(tmp_path))


def test_classes_with_names_of_splits_can_be_scored(tmp_path):
    put(tmp_path / "dev", 0)
    put(tmp_path / "test", 10)
    splits, _ = data.list_images(data_dir=str(tmp_path), to_train=False)
    assert labels_of(splits) == ["dev", "test"]
    put(tmp_path / "prod/2024", 20)
    put(tmp_path / "dev/2024", 30)
    splits, _ = data.list_images(data_dir=str(tmp_path), to_train=False)
    assert labels_of(splits) == ["dev", "prod", "test"]


def test_folder_with_test_images_alone_can_be_scored(tmp_path):
    draw_folder(tmp_path / "test", 3)
    splits, _ = data.list_images(data_dir=str(tmp_path), to_train=False)
    assert labels_of(splits) == ["blue", "green", "red"] and len(splits["train"]) == 9


@pytest.mark.parametrize("name", ["photos", "dev"])
def test_every_class_to_learn_has_an_image_whatever_the_folder_is_called(tmp_path, name):
    draw_folder(tmp_path / name, 2)
    (tmp_path / name / "violet").mkdir()
    with pytest.raises(UserError, match="violet has no images: fill it or remove it"):
        data.list_images(data_dir=str(tmp_path / name))
    splits, _ = data.list_images(data_dir=str(tmp_path / name), to_train=False)
    assert labels_of(splits) == ["blue", "green", "red"] and len(splits["train"]) == 6


def test_linked_folders_are_read_and_rings_end(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    draw_folder(elsewhere, 2, classes=("red",), first=70)
    (images / "red/more").symlink_to(elsewhere)
    (images / "red/ring").symlink_to(images)
    (images / "red/more/red/again").symlink_to(elsewhere)
    (images / "red/same").symlink_to(elsewhere)
    splits, _ = data.list_images(data_dir=str(images))
    assert len(splits["train"]) == 26


def test_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the folder .*nowhere cannot be read: No such file"):
        list(walk(tmp_path / "nowhere"))
    errors: list[OSError] = []
    assert list(walk(tmp_path / "nowhere", errors.append)) == [] and len(errors) == 1


@pytest.mark.parametrize("given", [".", "outputs/run"])
def test_folder_of_a_run_is_no_folder_of_images(images, given):
    (images / "outputs/run/checkpoint-5").mkdir(parents=True)
    (images / "outputs/run/race.json").touch()
    draw("red", 90).save(images / "outputs/run/figure.png")
    with pytest.raises(UserError, match=r"outputs/run holds a run of Luthier, .*: name another folder, or move"):
        load(data_dir=str(images / given))


@pytest.mark.parametrize("name", ["race.json", "learned_from.txt", "trainer_state.json"])
def test_file_that_is_called_like_one_of_a_run_is_no_run(images, name):
    for folder in (images, images / "red"):
        (folder / name).touch()
    assert labels_of(load(data_dir=str(images))) == sorted(COLOURS)


def test_class_race_beside_a_file_of_labels_is_no_run(images):
    put(images / "race", 90)
    (images / "race.json").touch()
    assert labels_of(load(data_dir=str(images))) == sorted([*COLOURS, "race"])
    (images / "race/full/checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run of Luthier"):
        load(data_dir=str(images))


def test_model_beside_the_images_that_are_scored_is_no_class(images):
    (images / "model").mkdir()
    for name in ("config.json", "learned_from.txt", "model.safetensors"):
        (images / "model" / name).touch()
    splits, _ = data.list_images(data_dir=str(images), to_train=False)
    assert labels_of(splits) == sorted(COLOURS)
    with pytest.raises(UserError, match="model holds a run of Luthier"):
        load(data_dir=str(images))


@pytest.mark.parametrize("name", ["instances.json", "1.xml", "1.txt"])
def test_annotations_are_not_to_be_removed(images, name):
    (images / "labels").mkdir()
    (images / "labels" / name).touch()
    with pytest.raises(UserError, match=f"labels has no .*but {name}: add some, .*annotations .* move this folder"):
        load(data_dir=str(images))


def test_images_that_icloud_has_not_loaded_are_named(images, caplog):
    (images / "red/.a.jpg.icloud").touch()
    put(images / ".icloud", 90)
    assert labels_of(load(data_dir=str(images))) == sorted(COLOURS)
    assert "in iCloud alone (download it in the Finder): 1 file, such as red/.a.jpg.icloud" in caplog.text
    (images / "violet/days").mkdir(parents=True)
    (images / "violet/notes.txt").touch()
    (images / "violet/days/.a.jpg.icloud").touch()
    with pytest.raises(UserError, match=r"but notes.txt: some files are in iCloud alone. Download the folder"):
        load(data_dir=str(images))


def test_image_in_a_format_that_is_not_read_says_so(images, caplog):
    (images / "red/photo.NEF").write_bytes(b"raw")
    load(data_dir=str(images))
    assert "a format that is not read (convert it to JPEG or PNG): 1 file, such as red/photo.NEF" in caplog.text


def test_class_folder_of_images_in_a_format_that_is_not_read_says_so(images):
    (images / "violet").mkdir()
    for number in range(2):
        (images / f"violet/IMG_{number}.DNG").write_bytes(b"raw")
    with pytest.raises(
        UserError, match=r"violet has 2 images in a format that is not read, such as IMG_0\.DNG: convert"
    ):
        load(data_dir=str(images))


def test_folders_that_systems_leave_behind_are_no_classes_and_their_thumbnails_no_images(images):
    for name in ("$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "#recycle"):
        (images / name).mkdir()
    thumbnails = images / "red/@eaDir/000.png"
    thumbnails.mkdir(parents=True)
    draw("red", 500).save(thumbnails / "SYNOPHOTO_THUMB_M.jpg")
    splits = load(data_dir=str(images))
    assert labels_of(splits) == sorted(COLOURS)
    assert sum(len(dataset) for dataset in splits.values()) == 24


@pytest.mark.parametrize("name", ["St.Bernard", "v1.0", "violet"])
def test_link_to_a_class_that_is_not_there_is_refused_whatever_its_name(images, name):
    (images / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name} is a link to what is not there: mend or remove it"):
        load(data_dir=str(images))


@pytest.mark.parametrize("name", ["README.md", "red/notes.txt"])  # as where not all files of a data set were fetched
def test_link_to_a_file_that_is_not_there_is_reported(images, caplog, name):
    (images / name).symlink_to("nowhere")
    assert labels_of(load(data_dir=str(images))) == sorted(COLOURS)
    assert f"such as {name}" in caplog.text


@pytest.mark.parametrize("names", [("train_images", "test_images"), ("train", "test")])
def test_table_beside_folders_of_a_competition_is_pointed_at(tmp_path, names):
    for number, name in enumerate(names):
        put(tmp_path / name, 10 * number)
    for name in ("sample_submission", "test", "train"):
        (tmp_path / f"{name}.csv").write_text("id,label\n")
    with pytest.raises(UserError, match=r"no class folders in them.*\. If train\.csv holds the classes, give"):
        load(data_dir=str(tmp_path))


def test_table_beside_class_folders_is_pointed_at(tmp_path, capsys):
    draw_folder(tmp_path, 3)
    data.list_images(data_dir=str(tmp_path))
    assert "of the class folders" not in capsys.readouterr().out
    for name in ("metadata.ndjson", "labels.csv"):  # the first one is not found without --labels
        (tmp_path / name).write_text("id,label\n")
        data.list_images(data_dir=str(tmp_path))
        assert f"of the class folders. If {name} holds the classes, give --labels " in capsys.readouterr().out


@pytest.mark.parametrize("folder", [".", "images", "train"])
def test_table_beside_the_images_is_pointed_at(tmp_path, folder):
    root = tmp_path / "set"
    (root / folder).mkdir(parents=True)
    rows = []
    for row in range(12):
        draw(sorted(COLOURS)[row % 3], row).save(root / folder / f"{row}.png")
        rows.append(f"{row}.png,{sorted(COLOURS)[row % 3]}")
    (root / "train.csv").write_text("\n".join(["file,label", *rows]))
    with pytest.raises(UserError, match=r"If train.csv holds the classes, give --labels .*train.csv"):
        load(data_dir=str(root))
    assert labels_of(load(data_dir=str(root), labels=str(root / "train.csv"))) == sorted(COLOURS)


def test_folder_comes_under_its_own_name_before_a_link_to_it(tmp_path):
    (tmp_path / "v3/parts").mkdir(parents=True)
    (tmp_path / "v3/x.jpg").touch()
    (tmp_path / "current").symlink_to("v3")
    found = [(path.relative_to(tmp_path).as_posix(), names) for path, names in walk(tmp_path)]
    assert found == [(".", []), ("v3", ["x.jpg"]), ("v3/parts", [])]


@pytest.mark.skipif(sys.platform == "darwin", reason="takes both forms of a name for one")
def test_group_with_an_accent_in_two_forms_is_one(tmp_path):
    for number, (label, form) in enumerate((("red", "NFC"), ("blue", "NFD"))):
        for group in ("José", "Ana"):
            folder = tmp_path / label / unicodedata.normalize(form, group)
            folder.mkdir(parents=True)
            draw(label, number).save(folder / "1.png")
    splits, _ = data.list_images(data_dir=str(tmp_path), group_by="folder")
    assert set(splits["train"]["luthier_given_group"][:]) == {"José", "Ana"}


def test_archive_that_is_not_unpacked_is_named(tmp_path):
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UserError, match=r"no images in class folders.* If photos\.zip holds the images, unpack it"):
        load(data_dir=str(tmp_path))


def test_link_that_leads_to_itself_is_no_folder(tmp_path, caplog):
    draw_folder(tmp_path, 4)
    (tmp_path / "red/again").symlink_to("again")
    assert sum(map(len, load(data_dir=str(tmp_path)).values())) == 12
    assert "such as red/again" in caplog.text
    (tmp_path / "again").symlink_to("again")
    with pytest.raises(UserError, match="again is a link to what is not there: mend or remove it"):
        load(data_dir=str(tmp_path))


def test_folders_around_the_classes_are_named(tmp_path):
    draw_folder(tmp_path / "dataset/images", 2)
    with pytest.raises(UserError, match=r"has one folder, dataset/images, .* give --data_dir .*dataset/images"):
        load(data_dir=str(tmp_path))


def test_folder_around_the_classes_of_a_split_is_named(tmp_path):
    draw_folder(tmp_path / "train/seg_train", 3)
    draw_folder(tmp_path / "test/seg_test", 2, first=50)
    with pytest.raises(UserError, match=r"train has one folder, seg_train, .* such as blue\. .* move them to"):
        load(data_dir=str(tmp_path))


def test_split_with_a_class_that_train_lacks_is_named(tmp_path):
    draw_folder(tmp_path / "train", 3)
    put(tmp_path / "test/unknown", 50)
    with pytest.raises(UserError, match="no training image has the class 'unknown', which is in test: add some, or"):
        load(data_dir=str(tmp_path))


def test_class_in_other_capitals_than_in_train_is_named(tmp_path):
    draw_folder(tmp_path / "train", 2)
    draw_folder(tmp_path / "test", 2, first=50)
    (tmp_path / "train/red").rename(tmp_path / "train/Red")
    with pytest.raises(UserError, match="the class 'red', which is in test: write it as in train, 'Red'"):
        load(data_dir=str(tmp_path))


@pytest.mark.parametrize("written", ["red ", "Re d", "r\N{NO-BREAK SPACE}ed"])
def test_class_with_other_spaces_than_in_train_is_named(tmp_path, written):
    draw_folder(tmp_path / "train", 2)
    draw_folder(tmp_path / "test", 2, first=50)
    (tmp_path / "test/red").rename(tmp_path / "test" / written)
    with pytest.raises(UserError, match="write it as in train, 'red'"):
        load(data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"The model writes 'r.*' as 'red'|The model writes 'Re d' as 'red'"):
        data.load_labelled(["blue", "green", "red"], data_dir=str(tmp_path / "test"))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("nowhere", "--data_dir nowhere is not a folder, .*because there is nothing of that name"),
        ("/nowhere", "--data_dir /nowhere is not a folder"),
        ("a.zip", "--data_dir a.zip is not a folder, .*but an archive"),
        ("a.jpg", "--data_dir a.jpg is not a folder, .*a file: give"),
        ("'images'", "leave out the quotes or spaces around images"),
        ("https://example.org/b.zip", "but an address: download and unpack it first"),
        ("https://example.org/b.zip?dl=1", "but an address: download and unpack it first"),
        ("smb://server/photos", "but an address: .*or mount it as a folder"),
        ("file:///home/me/photos", "but an address: give the path alone, without file://"),
        ("images/*.png", "but a pattern: give the folder that holds these images"),
        ("images\r", "leave out the quotes or spaces around images"),
        ("my\\ photos", "within quotes write my photos, without backslashes"),
        ("C:UsersAnnImages", "takes backslashes away: put the path into quotes"),
        ("someone/their-set", "A dataset of the Hub is given as --dataset_name"),
        ("../their-set", "Check the spelling, or give the whole path"),
    ],
)
def test_what_is_no_folder_is_explained(tmp_path, monkeypatch, given, found):
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "images", 2)
    (tmp_path / "my photos").mkdir()
    for file in ("a.zip", "a.jpg"):
        Path(file).touch()
    with pytest.raises(UserError, match=found):
        load(data_dir=given)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_folder_whose_name_is_no_text_is_refused_at_the_start(tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/fotos\xe9"))
    draw_folder(odd, 3)
    (tmp_path / "link").symlink_to(odd)
    with pytest.raises(UserError, match="not valid UTF-8: rename it or its folder"):
        load(data_dir=str(tmp_path / "link"))
