"""A dataset by name: which columns hold images and labels, which classes there are, and how they are ordered."""

import hashlib
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COLOURS, draw, draw_folder, encode, labels_of, load, save_dataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub.utils import httpx

import data
from data import prepare
from luthier.errors import UserError
from luthier.images.columns import _names_of_labels, add_numbers, fixed_width, label_and_image
from luthier.images.description import describe
from luthier.images.listed_images import GIVEN_GROUP
from luthier.images.loading import check_holds_images, check_own_files, explain_loading, named_splits, resolved


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (ClassLabel(names=["zither", "banjo"]), [0, 1], ["banjo", "zither"]),
        (Value("string"), ["zither", "banjo"], ["banjo", "zither"]),
        (Value("int64"), [10, 9], ["9", "10"]),
    ],
)
def test_labels_may_be_class_labels_strings_or_numbers(tmp_path, feature, values, names):
    path = save_dataset(tmp_path / "set", feature, {"train": values * 10, "test": values * 2}, ("image", "class"))
    splits = load(dataset_name=path)
    assert labels_of(splits) == names
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 18, "validation": 2, "test": 4}
    assert splits["test"]["label"][:] == [1, 0, 1, 0]  # zither and 10 sort last


def test_image_and_label_columns_can_be_named(tmp_path, view):
    features = Features({"photo": Image(), "thumbnail": Image(), "kind": Value("string"), "label": Value("string")})
    rows = {"photo": [draw("red", i) for i in range(20)], "thumbnail": [draw("blue", i) for i in range(20)]}
    rows |= {"kind": ["a", "b"] * 10, "label": ["c", "d"] * 10}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    path = str(tmp_path / "set")
    with pytest.raises(UserError, match=r"photo or thumbnail could be the image column: name it with --image_column"):
        load(dataset_name=path)
    assert labels_of(load(dataset_name=path, image_column="photo")) == ["c", "d"]
    splits = prepare(load(dataset_name=path, image_column="photo", label_column="kind"), view)
    assert labels_of(splits) == ["a", "b"]
    assert np.asarray(splits["train"][0]["image"])[..., 0].mean() > 150
    with pytest.raises(UserError, match="no column 'nothing'"):
        load(dataset_name=path, image_column="nothing")
    with pytest.raises(UserError, match=r"holds no images, .*\. If it names image files, give a table with --labels"):
        load(dataset_name=path, image_column="kind")


@pytest.mark.parametrize("untyped", [lambda data: data, lambda data: {"bytes": data, "path": None}])
def test_only_image_column_is_found_without_its_type(tmp_path, images, untyped):
    """As pandas writes it."""
    paths = sorted(images.rglob("*.png"))
    rows = {"label": [path.parent.name for path in paths], "photo": [untyped(path.read_bytes()) for path in paths]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set/train.parquet")
    splits = load(data_dir=str(tmp_path / "set"))
    assert sum(map(len, splits.values())) == len(paths) and labels_of(splits) == sorted(set(rows["label"]))
    rows["mask"] = rows["photo"]
    pq.write_table(pa.table(rows), tmp_path / "set/train.parquet")
    with pytest.raises(UserError, match="photo or mask could be the image column"):
        load(data_dir=str(tmp_path / "set"))


def test_columns_of_splits_and_groups_are_not_ignored_in_silence(tmp_path, capsys, caplog):
    rows = {"image": [draw("red", row) for row in range(20)], "label": ["a", "b"] * 10}
    features = Features({"image": Image(), "label": Value("string")})
    (tmp_path / "set").mkdir()

    def write(typed=None, **columns):
        for name, values in columns.items():
            kind = Value("int64") if isinstance(values[0], int) else Value("string")
            features[name] = ClassLabel(names=sorted({*values})) if name == typed else kind
        Dataset.from_dict(rows | columns, features=Features(features)).to_parquet(tmp_path / "set/train.parquet")
        for name in columns:
            del features[name]

    def said(**options):
        data.list_images(data_dir=str(tmp_path / "set"), **options)
        text = caplog.text + capsys.readouterr().out
        caplog.clear()
        return text

    hint = "share values in the column"
    patients = [f"p{row // 4}" for row in range(20)]
    write(split=["train"] * 12 + ["test"] * 8, patient_id=patients)
    assert "Not used: the column 'split'" in (text := said()) and f"{hint} 'patient_id'" in text
    assert hint not in said(group_column="patient_id")
    assert "Not used" not in said(to_train=False)
    write(split=["train"] * 20, patient_id=[f"p{row}" for row in range(20)], subset=["train", "other"] * 10)
    assert said() == ""
    write("person", person=["ann", "bob"] * 10)  # the label, which is found by its type
    assert said() == ""
    write("split", split=["train", "test"] * 10)
    assert "Not used: the column 'split'" in said()
    splits, _ = data.list_images(data_dir=str(tmp_path / "set"))
    assert splits["train"].features["label"].names == ["a", "b"]
    write(group=[row // 4 for row in range(20)])
    assert f"{hint} 'group'" in said()
    write(group=[max(row, 3) for row in range(20)])  # near-duplicates alone, as prepare.py numbers them too
    assert said() == ""


def test_split_of_ones_own_that_lacks_a_class_is_named(tmp_path, capsys):
    labels = {"train": ["a", "b", "c"] * 10, "validation": ["a", "b", "c"] * 2, "test": ["b", "b"]}
    path = save_dataset(tmp_path / "set", Value("string"), labels)
    data.list_images(dataset_name=path)
    out = " ".join(capsys.readouterr().out.split())
    assert "test, which is a split of your own, has no image of 'a', 'c': add some, or remove the split" in out
    assert "validation, which" not in out
    data.list_images(dataset_name=path, to_train=False)
    assert "has no image" not in capsys.readouterr().out


def test_image_column_may_hold_plain_bytes(tmp_path, images, view):
    raw = [path.read_bytes() for path in sorted(images.rglob("*.png"))]
    names = [path.parent.name for path in sorted(images.rglob("*.png"))]
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"image": raw, "label": names}).to_parquet(tmp_path / "set/train.parquet")
    splits = prepare(load(dataset_name=str(tmp_path / "set"), image_column="image"), view)
    folder = prepare(load(data_dir=str(images)), view)
    assert describe(splits, "drawn")["fingerprint"] == describe(folder, "drawn")["fingerprint"]


@pytest.mark.parametrize("named", [slice(None), slice(5, 6)])
def test_dataset_that_names_files_is_refused(images, named):
    """Or whoever made it could have any image of this machine trained on, and written into shards."""
    paths = sorted(str(path) for path in images.rglob("*.png"))
    sources = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    sources[named] = [{"bytes": None, "path": path} for path in paths[named]]
    rows = {"image": sources, "label": [Path(path).parent.name for path in paths]}
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("string")})
    folder = images.parent / "shards"
    folder.mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train-0.parquet")
    with pytest.raises(UserError, match=rf"train of .* names a file instead of an image \({paths[named][0]}\)"):
        data.load_images(data_dir=str(folder), image_column="image")  # it has lost its type
    typed = Dataset.from_dict(rows, features=features).cast_column("image", Image(decode=False))
    with pytest.raises(UserError, match="names a file instead of an image"):
        check_holds_images({"train": typed}, "set")


def test_single_split_is_the_training_split_whatever_its_name(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"test": ["a", "b"] * 10})
    assert len(load(dataset_name=path)["train"]) == 14


def test_test_split_without_labels_is_replaced(tmp_path):
    names = ClassLabel(names=["a", "b"])
    path = save_dataset(tmp_path / "set", names, {"train": [0, 1] * 10, "test": [-1, -1]})
    assert len(load(dataset_name=path)["test"]) == 4


def test_some_rows_without_label_are_refused(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"train": ["a", "b", None] * 10})
    with pytest.raises(UserError, match=r"10 rows of the train split have no label in the column 'label': add labels"):
        load(dataset_name=path)
    path = save_dataset(tmp_path / "numbers", Value("int64"), {"train": [1, -1] * 10})
    with pytest.raises(UserError, match="-1 stands for none: if it is a class, write names"):
        load(dataset_name=path)


def test_class_without_images_is_left_out(tmp_path, caplog):
    feature = ClassLabel(names=["background", "cat", "dog"])
    path = save_dataset(tmp_path / "set", feature, {"train": [1, 2] * 10})
    assert labels_of(load(dataset_name=path)) == ["cat", "dog"]
    assert "1 class of the column 'label' without images, such as 'background'" in caplog.text
    path = save_dataset(tmp_path / "more", Value("string"), {"train": ["a", "b"] * 10, "test": ["a", "c"] * 10})
    with pytest.raises(UserError, match="no training image has the class 'c'"):
        load(dataset_name=path)
    images, _ = data.load_labelled(["a", "b", "c"], dataset_name=path)
    assert images["test"].features["label"].names == ["a", "b", "c"] and images["test"]["label"][:2] == [0, 2]
    folder = tmp_path / "folder"
    draw_folder(folder / "train", 20, classes=("red", "blue"))
    draw_folder(folder / "test", 20, first=100)
    (folder / "test/red/100.png").write_bytes(b"no image")
    images, unreadable = data.load_labelled(["blue", "green", "red"], data_dir=str(folder))
    assert len(images["test"]) == 59 and len(unreadable) == 1


def test_label_names_rename_the_classes_in_order(images):
    assert labels_of(load(data_dir=str(images), label_names=["mavi", "yeşil", "kırmızı"])) == [
        "mavi", "yeşil", "kırmızı",
    ]  # fmt: skip
    with pytest.raises(UserError, match="label_names has 2 names, but the data has 3 classes: blue, green, red"):
        load(data_dir=str(images), label_names=["a", "b"])
    with pytest.raises(UserError, match="'a' twice"):
        load(data_dir=str(images), label_names=["a", "b", "a"])
    with pytest.raises(UserError, match="would swap them: blue, green, red"):
        load(data_dir=str(images), label_names=["red", "green", "blue"])


def test_unreachable_dataset_is_a_user_error():
    with pytest.raises(UserError, match=r"someone/their-set.*--data_dir"):
        load(dataset_name="someone/their-set")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("file:///photos", "without file://"),
        ("https://example.org/b.zip", "but an address: download and unpack it first"),
        ("https://example.org/datasets/me/set?row=3", "or name a dataset of the Hub as OWNER/NAME"),
        ("../their-set", "Check the spelling"),
        ("./their-set/train", "Check the spelling"),
        ("photos/*.jpg", "but a pattern"),
        ("my photos", "there is nothing of that name"),
        ("photos/of/cats", "there is nothing of that name"),
    ],
)
def test_name_that_no_dataset_can_have_is_not_asked_for(name, found):
    with pytest.raises(UserError, match=f"is no dataset on the Hub, and not a folder, .*{found}"):
        load(dataset_name=name)


@pytest.mark.parametrize("name", ["their-set", "someone/their.set_2", "buckets/someone/photos/train"])
def test_name_that_a_dataset_may_have_is_asked_for(monkeypatch, name):
    def ask(dataset_name: str, config: None) -> None:
        assert dataset_name == name
        raise ConnectionError

    monkeypatch.setattr("luthier.images.loading.load_dataset_builder", ask)
    with pytest.raises(UserError, match="the Hub cannot be reached for a dataset of this name"):
        load(dataset_name=name)


def test_numbers_are_ordered_by_value_whatever_they_are_stored_as():
    numbers = list(range(11))
    expected = list(map(str, numbers))
    for values in (set(expected), set(numbers), set(map(float, numbers))):
        assert list(_names_of_labels(Value("string"), values, "label").values()) == expected
    with pytest.raises(UserError, match="holds no class names or numbers, but Value"):
        _names_of_labels(Value("float64"), {0.5, 1.0}, "label")


@pytest.mark.parametrize("error", [ConnectionError, httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_connection_that_breaks_gives_advice(error):
    with (
        pytest.raises(UserError, match="there is no folder me/set, and the Hub cannot be reached"),
        explain_loading("me/set"),
    ):
        raise error("it broke")


def test_unreadable_images_count_where_their_split_is_scored(tmp_path):
    classes = ("blue", "red")
    draw_folder(tmp_path / "train", 20, classes=classes)
    draw_folder(tmp_path / "test", 2, classes=classes, first=100)
    (tmp_path / "train/red/000.png").write_bytes(b"no image")
    images, unreadable = data.load_labelled(list(classes), data_dir=str(tmp_path))
    assert len(images["test"]) == 4 and not unreadable
    (tmp_path / "test").rename(tmp_path / "val")  # then all images are scored
    images, unreadable = data.load_labelled(list(classes), data_dir=str(tmp_path))
    assert len(images["test"]) == 43 and [image.split for image in unreadable] == ["test"]


def test_splits_of_a_dataset_are_known_by_their_names(caplog):
    assert named_splits({"Training": 1, "dev": 2, "extra": 3}, "set") == {"train": 1, "validation": 2}
    assert "Not used: the split 'extra' of set" in caplog.text
    with pytest.raises(UserError, match="set has two validation splits: train, val, dev"):
        named_splits({"train": 1, "val": 2, "dev": 3}, "set")
    with pytest.raises(UserError, match="set has the splits val, test, but none to train on"):
        named_splits({"val": 1, "test": 2}, "set")


@pytest.mark.parametrize(
    "stored",
    [
        pa.large_binary(),
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        pa.struct([("bytes", pa.binary()), ("path", pa.null())]),
        pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
    ],
)
def test_images_as_polars_and_pandas_write_them(tmp_path, stored):
    files = [encode(sorted(COLOURS)[row % 3], row) for row in range(24)]
    images = [{"bytes": file, "path": None} for file in files] if pa.types.is_struct(stored) else files
    columns = {"image": pa.array(images, stored), "label": [row % 3 for row in range(24)]}
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    splits = load(data_dir=str(tmp_path), image_column="image")
    assert sum(len(dataset) for dataset in splits.values()) == 24


def test_large_texts_of_paths_are_refused_too(tmp_path):
    stored = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    columns = {"image": pa.array([{"bytes": None, "path": "/etc/hosts"}] * 4, stored), "label": [0, 1, 0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="names a file instead of an image"):
        load(data_dir=str(tmp_path), image_column="image")


def test_white_space_and_accents_make_no_second_class(tmp_path):
    decomposed = unicodedata.normalize("NFD", "fée")
    labels = ["cat", "cat\n", " cat", "dog", "fée", decomposed] * 4
    splits = load(dataset_name=save_dataset(tmp_path / "set", Value("string"), {"train": labels}))
    assert labels_of(splits) == ["cat", "dog", "fée"]
    counts = [sum(split["label"][:].count(index) for split in splits.values()) for index in range(3)]
    assert counts == [12, 4, 8]


def test_label_of_white_space_alone_is_none(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"train": ["a", "b", " \n"] * 4})
    with pytest.raises(UserError, match="4 rows of the train split have no label"):
        load(dataset_name=path)


def test_columns_of_a_user_are_not_taken_for_luthiers_own(tmp_path):
    names = {"photo": Image(), **dict.fromkeys(("label", "stamp", "given_group"), Value("string"))}
    for folder, first in (("one", 0), ("two", 500)):  # other images with the same stamps
        rows = {"photo": [{"bytes": encode("red", first + row), "path": None} for row in range(20)]}
        rows |= {"label": ["a", "b"] * 10, "stamp": ["penny"] * 20, "given_group": ["all"] * 20}
        (tmp_path / folder).mkdir()
        Dataset.from_dict(rows, features=Features(names)).to_parquet(tmp_path / folder / "train.parquet")
        train = data.load_images(dataset_name=str(tmp_path / folder))[0]["train"]
        assert train["digest"][0] == hashlib.sha256(encode("red", first)).hexdigest()
        assert len(set(train["group"][:])) == 20


@pytest.mark.parametrize("feature", [ClassLabel(names=["a", "b"]), Value("string")])
def test_dataset_without_rows_is_refused(feature):
    empty = Dataset.from_dict({"image": [], "label": []}, features=Features({"image": Image(), "label": feature}))
    with pytest.raises(UserError, match="the train split has no rows"):
        label_and_image(DatasetDict(train=empty), None, None, None, None, True)


def test_group_column_is_not_taken_for_the_labels(tmp_path):
    kinds = {"image": Image(), "label": Value("string"), "patient": ClassLabel(names=["p0", "p1", "p2", "p3"])}
    rows = {"image": [draw("red", row) for row in range(20)], "label": ["a", "b"] * 10}
    rows |= {"patient": [row // 5 for row in range(20)]}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features=Features(kinds)).to_parquet(tmp_path / "set/train.parquet")
    train = data.load_images(dataset_name=str(tmp_path / "set"), group_column="patient")[0]["train"]
    assert train.features["label"].names == ["a", "b"] and len(set(train["group"][:])) == 4


@pytest.mark.parametrize(
    ("feature", "values", "groups"),
    [
        (Value("string"), ["p1", " p1\n", " ", None], ["p1", "p1", "", ""]),
        (Value("float64"), [1.0, 1.0, float("nan"), None], ["1.0", "1.0", "", ""]),
        (ClassLabel(names=["p", "q"]), [0, 0, -1, None], ["0", "0", "", ""]),
    ],
)
def test_missing_groups_are_none_and_white_space_makes_no_second_group(feature, values, groups):
    features = Features({"image": Image(), "label": Value("string"), "patient": feature})
    rows = {"image": [draw("red", row) for row in range(4)], "label": ["a", "b"] * 2, "patient": values}
    splits = DatasetDict(train=Dataset.from_dict(rows, features=features))
    assert label_and_image(splits, None, None, "patient", None, True)["train"][GIVEN_GROUP][:] == groups


def test_dataset_without_train_can_be_scored(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"validation": ["a", "b"], "test": ["a", "b", "b"]})
    images, _ = data.load_labelled(["a", "b"], dataset_name=path)
    assert images["test"]["label"][:] == [0, 1, 1]
    with pytest.raises(UserError, match="none to train on"):
        load(dataset_name=path)


def test_a_column_of_numbers_copies_no_rows():
    rows = Dataset.from_dict({"a": list("abcd")}).select([3, 1])
    added = add_numbers(rows, "n", np.array([7, 8]))
    assert added["a"][:] == ["d", "b"] and added["n"][:] == [7, 8] and added._indices is not None
    added = add_numbers(Dataset.from_dict({"a": list("abcd")}).select([1, 2]).select([0]), "n", np.array([7]))
    assert added[:] == {"a": ["b"], "n": [7]} and added[0] == {"a": "b", "n": 7}


def test_values_of_fixed_width_follow_the_order_of_the_rows():
    rows = Dataset.from_dict({"a": ["aa", None, "bb", "cc"]}).select([3, 0])
    assert fixed_width(rows, "a").view("S2").ravel().tolist() == [b"cc", b"aa"]
    rows = Dataset.from_dict({"a": ["aa", "bb", "cc", "dd"]}).select(range(1, 3))  # as where the first is left out
    assert rows._indices is None and fixed_width(rows, "a").view("S2").ravel().tolist() == [b"bb", b"cc"]


def test_dataset_folder_that_would_be_a_pattern_is_refused(tmp_path):
    folder = tmp_path / "shards [2]"
    folder.mkdir()
    with pytest.raises(UserError, match="rename the folder"):
        resolved(str(folder))


@pytest.mark.parametrize("pattern", ["{0}/**", "../{0.name}/**"])
def test_dataset_whose_readme_names_files_of_others_is_refused(images, pattern):
    """They might be trained on, and published."""
    folder = images.parent / "set"
    folder.mkdir()
    card = f"configs:\n- config_name: default\n  drop_labels: false\n  data_files: {pattern.format(images)}\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    with pytest.raises(UserError, match="names a file that is not its own"):
        load(dataset_name=str(folder))


def test_dataset_of_the_hub_has_no_files_of_this_machine_or_of_other_repositories():
    own = "hf://datasets/me/set@1/a.zip"
    check_own_files([own, f"zip://*.png::{own}", "https://example.org/a.tar"], "me/set")
    check_own_files(["hf://buckets/me/photos/a.png"], "hf://buckets/me/photos")
    here = ["/home/me/a.png", "file:///home/me/a.png", "zip://a.png::/home/me/a.zip", "http://127.0.0.1/a.png"]
    for url in (*here, "hf://datasets/me/private@1/a.png", "hf://buckets/me/photos/a.png"):
        with pytest.raises(UserError, match="names a file that is not its own"):
            check_own_files([url], "me/set")


@pytest.mark.parametrize("absolute", [True, False])
def test_metadata_that_leads_out_of_a_dataset_is_refused(images, absolute):
    folder = images.parent / "set"
    folder.mkdir()
    paths = sorted(images.rglob("*.png"))
    names = [str(path) if absolute else f"../{path.relative_to(images.parent)}" for path in paths]
    rows = "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))
    (folder / "metadata.csv").write_text(f"file_name,label\n{rows}")
    (folder / "a.png").write_bytes(paths[0].read_bytes())
    with pytest.raises(UserError, match="cannot load"):
        load(dataset_name=str(folder))


def test_files_of_a_folder_may_be_named_by_a_link_to_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("real", "link"):
        check_own_files([str(tmp_path / name / "a.png")], str(tmp_path / "link"))
    with pytest.raises(UserError, match="not its own"):
        check_own_files([str(tmp_path / "link/../a.png")], str(tmp_path / "link"))


def test_dataset_of_save_to_disk_is_refused_with_advice(tmp_path):
    Dataset.from_dict({"image": [b"a"], "label": ["a"]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="written by save_to_disk: write Parquet files"):
        load(dataset_name=str(tmp_path / "set"))
