"""Tables of images as people have them: what is found in each, and what each mistake is told."""

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import draw
from datasets import ClassLabel, Dataset, Features, Value

from data import load_images
from luthier.errors import UserError
from luthier.images import image_files
from luthier.images.tables import read_table

CLASSES = ("blue", "green", "red")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve images, four of each class, named a0.png to a11.png, in one folder."""
    for number in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        draw(CLASSES[number % 3], number).save(tmp_path / f"images/a{number}.png")
    return tmp_path / "images"


def pairs(name: Callable[[int], str] = lambda number: f"a{number}.png") -> list[tuple[str, str]]:
    return [(name(number), CLASSES[number % 3]) for number in range(12)]


def text(rows: list[tuple], header: str = "file,label", delimiter: str = ",") -> str:
    return "\n".join([header, *(delimiter.join(map(str, row)) for row in rows)]) + "\n"


def load(root: Path, content: str | bytes, name: str = "labels.csv", **options) -> dict[str, dict[str, str]]:
    """Write a table beside the images and load it; return the class of each image by split and name."""
    path = root.parent / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    splits, _ = load_images(data_dir=str(root), labels=str(path), **options)
    return {
        split: dict(zip(rows["name"][:], rows.features["label"].int2str(rows["label"][:]), strict=True))
        for split, rows in splits.items()
    }


EXPECTED = {"train": dict(pairs())}


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("labels.csv", text(pairs()), {}),
        ("comma_in_a_name.csv", text(pairs(), "file;label (species, or breed)", ";"), {}),
        ("id_label.csv", text(pairs(lambda number: f"a{number}"), "id,label"), {}),
        ("folder.csv", text(pairs(lambda number: f"images/a{number}.png")), {}),
        ("windows.csv", text(pairs(lambda number: f"C:\\Users\\me\\images\\a{number}.png")), {}),
        ("other_machine.csv", text(pairs(lambda number: f"/home/other/data/a{number}.png")), {}),
        ("dots.csv", text(pairs(lambda number: f"./x/../a{number}.png")), {}),
        ("upper.csv", text(pairs(lambda number: f"A{number}.PNG")), {}),
        ("spaces.csv", text(pairs(lambda number: f"  a{number}.png "), " file , label"), {}),
        ("bom.csv", b"\xef\xbb\xbf" + text(pairs()).encode(), {}),
        ("utf16.csv", text(pairs()).encode("utf-16"), {}),
        ("semicolons.csv", text(pairs(), "file;label", ";"), {}),
        ("excel.csv", "sep=;\r\n" + text(pairs(), "file;label", ";").replace("\n", "\r\n"), {}),
        ("old_mac.csv", text(pairs()).replace("\n", "\r"), {}),
        ("pipes.csv", text(pairs(), "file|label", "|"), {}),
        ("tabs.tsv", text(pairs(), "file\tlabel", "\t"), {}),
        ("quotes.csv", text([(f'"{file}"', f'"{label}"') for file, label in pairs()]), {}),
        ("empty_lines.csv", text(pairs()).replace("\n", "\n\n,\n"), {}),
        ("comment_column.csv", text([(*pair, '"a, b\nc"') for pair in pairs()], "file,label,comment"), {}),
        ("index_column.csv", text([(row, *pair) for row, pair in enumerate(pairs())], ",file,label"), {}),
        ("other_names.csv", text(pairs(), "photo,breed"), {}),
        ("index_of_names.csv", text(pairs(), ",breed"), {}),
        ("index_beside_names.csv", text([(pair[0][:-4], *pair) for pair in pairs()], ",file,label"), {}),
        ("named.csv", text([(*pair, "x") for pair in pairs()], "file,kind,label"), {"label_column": "kind"}),
        ("twice.csv", text(pairs() + pairs()[:2]), {}),
        ("lines.jsonl", "\n".join(json.dumps({"file_name": file, "label": label}) for file, label in pairs()), {}),
    ],
)  # fmt: skip
def test_awkward_table_is_read(root, name, content, options):
    assert load(root, content, name, **options) == EXPECTED


@pytest.mark.parametrize("label", [Value("string"), ClassLabel(names=["red", "green", "blue"])])
def test_parquet_is_read_and_its_class_labels_by_name(root, label):
    """Another file may number the classes otherwise."""
    path, features = root.parent / "labels.parquet", Features({"file": Value("string"), "label": label})
    Dataset.from_list([{"file": name, "label": label} for name, label in pairs()], features).to_parquet(path)
    assert load(root, path.read_bytes(), path.name) == EXPECTED


def test_numbers_that_became_floats_are_whole_again(root):
    for number in range(12):
        (root / f"a{number}.png").rename(root / f"{number}.png")
    rows = [(f"{number}.0", f"{number % 3}.0") for number in range(12)]
    assert load(root, text(rows, "id,target")) == {"train": {f"{n}.png": str(n % 3) for n in range(12)}}


def test_latin_1_and_both_ways_to_write_an_accent(root):
    rows = [(file, label.replace("red", "rosé")) for file, label in pairs()]
    expected = {"train": dict(rows)}
    assert load(root, text(rows).encode("latin-1")) == expected
    assert load(root, unicodedata.normalize("NFD", text(rows))) == expected


def test_leading_zeros_stay(root):
    rows = [(file, f"00{CLASSES.index(label)}") for file, label in pairs()]
    assert set(load(root, text(rows))["train"].values()) == {"000", "001", "002"}


def test_split_column_makes_splits(root):
    rows = [(*pair, "Val" if number < 3 else "train") for number, pair in enumerate(pairs())]
    splits = load(root, text(rows, "file,label,split"))
    assert {split: len(images) for split, images in splits.items()} == {"train": 9, "validation": 3}
    assert load(root, text(rows, "file,label,part"), split_column="part", label_column="label") == splits


def test_split_without_labels_and_images_without_rows_are_named(root, caplog):
    rows = [(file, "" if number < 3 else label, "test" if number < 3 else "train") for number, (file, label) in
            enumerate(pairs()[:11])]  # fmt: skip
    assert load(root, text(rows, "file,label,split")) == {"train": dict(pairs()[3:11])}
    assert "the test split of labels.csv, which has no labels" in caplog.text
    assert "without a row in labels.csv: 1 image, such as a11.png" in caplog.text


def test_metadata_is_found_in_the_folder_or_in_its_split_folders(root, tmp_path):
    (root / "metadata.csv").write_text(text(pairs(), "file_name,label"))
    splits, _ = load_images(data_dir=str(root))
    assert len(splits["train"]) == 12
    for split, chosen in (("train", pairs()[:9]), ("test", pairs()[9:])):
        (tmp_path / "splits" / split).mkdir(parents=True)
        for file, _ in chosen:
            (root / file).rename(tmp_path / "splits" / split / file)
        (tmp_path / "splits" / split / "metadata.csv").write_text(text(chosen, "file_name,label"))
    splits, _ = load_images(data_dir=str(tmp_path / "splits"))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 9, "test": 3}


def rows_with(**changes: tuple) -> str:
    """Return the table with some rows (row5=...) replaced; the first row below the header is row 2."""
    rows: list[tuple] = list(pairs())
    for row, values in changes.items():
        rows[int(row.removeprefix("row")) - 2] = values
    return text(rows)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (rows_with(row5=("b.png", "red")), {}, "row 5, column 'file': there is no image 'b.png' below"),
        (rows_with(row5=("../a3.png", "red")), {}, "row 5, column 'file': '../a3.png' leads out of the folder"),
        (rows_with(row5=("a3.png", "")), {}, "row 5, column 'label': there is no label"),
        (rows_with(row5=("", "red")), {}, "row 5, column 'file': there is no file name"),
        (rows_with(row5=("a0.png", "red")), {}, "row 5, column 'file': 'a0.png' is in row 2 too, with another label"),
        (rows_with(row5=("a3.png",)), {}, "row 5 has 1 values, but there are 2 columns (file, label)"),
        (rows_with(row5=("a3.png", "red", "x")), {}, "row 5 has 3 values, but there are 2 columns (file, label)"),
        (rows_with(row5=('"a3.png', "red")), {}, "row 5 cannot be read: unexpected end of data"),
        (text([(*pair, "dev" if pair[0] == "a3.png" else "fold 1" if pair[0] == "a4.png" else "train")
               for pair in pairs()], "file,label,split"), {}, "row 6, column 'split': 'fold 1' is not train"),
        (text(pairs()), {"label_column": "kind"}, "there is no column 'kind' (--label_column)"),
        (text(pairs()), {"group_column": "patient"}, "there is no column 'patient' (--group_column)"),
        (text([(*pair, "x") for pair in pairs()], "file,kind,note"), {}, "which column of"),
        (text(pairs(lambda number: f"b{number}.png")), {}, "and none of them names files below"),
        (text(pairs(), "a0.png,blue"), {}, "names an image, 'a0.png': put a row with the names of the columns"),
        (text(pairs(), "file,file"), {}, "has two columns 'file'"),
        ("file\na0.png\n", {}, "has the one column 'file'"),
        ("file,label\n", {}, "has no rows"),
        ("", {}, "has no columns: it needs one for the image files"),
        (b"file,label\n\0\1\2", {}, "holds binary data"),
    ],
)  # fmt: skip
def test_mistake_in_a_table_has_one_message_with_row_and_column(root, content, options, message):
    with pytest.raises(UserError) as raised:
        load(root, content, **options)
    assert message in str(raised.value), str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.xlsx", "", "is a spreadsheet: save it as CSV"),
        ("labels.json", "[]", "is not read as a table. Write one as CSV"),
        ("labels.csv", '"file,label"\n"a0.png,blue"\n', "quotation marks around whole rows"),
        ("labels.csv", "My photos,\nfile,label\na0.png,blue\n", "'My photos', does not name the columns"),
        ("labels.csv", "file\na0.png\na,1.png\n", "columns of row 3, which has 2 values: .* needs quotes around"),
        ("labels.doc", "", "is not a table that can be read"),
        ("labels.jsonl", '{"file_name": "a0.png", "label": "red"}\n[1]\n', "row 2 is not an object"),
        ("labels.jsonl", "{'file_name'}\n", "row 1 is not JSON"),
        ("labels.jsonl", '{"file_name": "a0.png", "label": "\\ud800red"}\n', "row 1 holds half of a character"),
        ("labels.parquet", "no", "is not a Parquet file"),
    ],
)
def test_file_that_is_no_table_is_refused(root, name, content, message):
    with pytest.raises(UserError, match=message):
        load(root, content, name)


def test_empty_columns_are_not_taken_for_classes(root):
    with pytest.raises(UserError, match="which column of") as raised:
        load(root, text([(*pair, "", "") for pair in pairs()], "file,kind,note,checked"))
    assert "hold 0 or 1" not in str(raised.value)


def test_column_of_splits_with_an_unknown_name_is_reported(root, caplog):
    rows = [(*pair, "eval" if number < 3 else "train") for number, pair in enumerate(pairs())]
    load(root, text(rows, "file,label,set"))
    assert "Not used: the column 'set'" in caplog.text and "names splits, but also 'eval'" in caplog.text
    for name in ("data_split", "Data set"):
        load(root, text(rows, f"file,label,{name}"))
        assert f"Not used: the column '{name}'" in caplog.text
    caplog.clear()
    load(root, text([(*pair, "train") for pair in pairs()], "file,label,set"))
    load(root, text([(*pair, "bus" if pair[0] == "a3.png" else "train") for pair in pairs()], "file,label,vehicle"))
    assert "Not used" not in caplog.text


def test_name_that_two_images_have_needs_its_folder(root):
    for folder in ("left", "right"):
        (root / folder).mkdir()
        draw("red", 99).save(root / folder / "b.png")
    remedy = "write the folder too, or give the right one of these folders instead of .*images"
    with pytest.raises(UserError, match=rf"row 14, column 'file': 'b' could be left/b\.png or right/b\.png: {remedy}"):
        load(root, text([*pairs(), ("b", "red")]))
    assert load(root, text([*pairs(), ("left/b", "red"), ("right/b", "red")]))["train"]["left/b.png"] == "red"


def test_names_that_differ_in_capitals_alone_are_two_images(root):
    for seed, name in enumerate(("b.png", "B.png")):
        draw("red", 90 + seed).save(root / name)
    if len(list(root.glob("[bB].png"))) < 2:
        pytest.skip("the file system does not tell them apart")
    assert load(root, text([*pairs(), ("b.png", "red"), ("B.png", "blue")]))["train"]["B.png"] == "blue"
    draw("red", 95).save(root / "b.PNG")
    with pytest.raises(UserError, match=r"'b' could be .*: write the whole name, as the file has it"):
        load(root, text([*pairs(), ("b", "red")]))


def test_names_that_begin_with_points_are_names_of_images(root):
    rows = [(f"a{number}", f"./a{number}.png", CLASSES[number % 3]) for number in range(12)]
    assert load(root, text(rows, "code,photo,label")) == EXPECTED
    with pytest.raises(UserError, match=r"'\.\./images/a0\.png' leads out of the folder"):
        load(root, text(pairs(lambda number: f"../images/a{number}.png")))


def test_name_whose_zeros_a_spreadsheet_has_removed_is_told(root):
    draw("red", 96).save(root / "0007.png")
    with pytest.raises(UserError, match=r"there is no image '7', but 0007\.png: has a spreadsheet removed zeros\?"):
        load(root, text([*pairs(), ("7", "red")]))


def test_images_of_another_folder_than_named_are_told(root, caplog):
    load(root, text(pairs(lambda number: f"images/a{number}.png")))
    assert "Ignored" not in caplog.text
    load(root.parent, text(pairs(lambda number: f"test/a{number}.png")))
    assert "Ignored: test at the beginning of all names of files, which is not here. test/a0.png is" in caplog.text


def test_name_of_a_converted_image_is_told(root):
    with pytest.raises(UserError, match=r"there is no image 'a0\.HEIC', but a0\.png: write that name"):
        load(root, text([("a0.HEIC", "blue"), *pairs()[1:]]))
    with pytest.raises(UserError, match=r"files below .* \(there is no image 'a0\.jpg', but a0\.png: write that"):
        load(root, text(pairs(lambda number: f"a{number}.jpg")))
    with pytest.raises(UserError, match=r"there is no image 'a0\.5/b' below"):
        load(root, text([("a0.5/b", "blue"), *pairs()[1:]]))
    with pytest.raises(UserError, match=r"'c\.DNG' is in a format that is not read: convert it"):
        load(root, text([("c.DNG", "blue"), *pairs()[1:]]))


def test_values_that_may_mean_none_and_labels_of_several_classes_are_named(root, capsys):
    labels = {0: "NA", 1: "NA", 2: "red; blue"}
    rows = [(file, labels.get(number, label), "None" if number < 4 else f"p{number}") for number, (file, label) in
            enumerate(pairs())]  # fmt: skip
    load(root, text(rows, "file,label,animal"), group_column="animal")
    said = capsys.readouterr().out
    assert "'NA' in 2 rows of the column 'label' of labels.csv is taken for a class. If it means" in said
    assert "'None' in 4 rows of the column 'animal' of labels.csv is taken for one group. If it means" in said
    assert "1 row of labels.csv with several classes in one label, such as 'red; blue', which is taken" in said
    load(root, text(pairs()))
    assert "careful" not in capsys.readouterr().out
    load(root, text([("a0.png", "red blue"), *pairs()[1:]]))
    assert "such as 'red blue', which is taken" in capsys.readouterr().out
    load(root, text([(file, f"['{label}']") for file, label in pairs()[1:]] + [("a0.png", "['red'; 'blue']")]))
    assert """such as "['red'; 'blue']", which is taken""" in capsys.readouterr().out


def test_metadata_that_names_no_image_is_told_where_no_folders_are_classes(root):
    (root.parent / "metadata.csv").write_text(text(pairs(lambda number: f"https://x.org/a{number}.png?dl=1")))
    with pytest.raises(UserError, match=r"which column of .*metadata\.csv holds the image files\?"):
        load_images(data_dir=str(root.parent))


def test_folder_that_is_not_utf8_is_named(root):
    folder = Path(os.fsdecode(os.fsencode(root) + b"/\xff"))
    folder.mkdir()
    (root / "a0.png").rename(folder / "a0.png")
    with pytest.raises(UserError, match=r"xff/a0.png' is not valid UTF-8: rename it or its folder"):
        load(root, text(pairs()))


@pytest.mark.parametrize("values", [["red"], {"name": "red"}])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_are_no_classes(root, values, suffix):
    rows = [{"file_name": file, "label": values, "boxes": [1]} for file, _ in pairs()]
    path = root.parent / f"labels.{suffix}"
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=rf"the column 'label' of .*labels.{suffix} holds lists or objects"):
        load_images(data_dir=str(root), labels=str(path))
    other = [{"file_name": file, "kind": label, "boxes": [1]} for file, label in pairs()]
    assert load(root, "\n".join(map(json.dumps, other)), "other.jsonl") == EXPECTED


def test_column_of_splits_is_known_by_its_values(root, capsys, caplog):
    rows = [(*pair, "test" if number < 3 else "train") for number, pair in enumerate(pairs())]
    splits = load(root, text(rows, "file,label,partition"))
    assert {split: len(images) for split, images in splits.items()} == {"train": 9, "test": 3}
    assert "the splits of 'partition'" in capsys.readouterr().out
    two = text([(*row, row[-1]) for row in rows], "file,label,first,second")
    assert load(root, two, label_column="label") == EXPECTED
    assert "several columns of splits, first, second: name one with --split_column" in caplog.text
    assert load(root, two, label_column="label", split_column="first") == splits


def test_flags_of_splits_are_not_ignored_in_silence(root, caplog):
    rows = [(*pair, number % 2) for number, pair in enumerate(pairs())]
    assert load(root, text(rows, "file,label,is_train")) == EXPECTED
    assert "Not used: the column 'is_train'" in caplog.text and "call it split" in caplog.text
    caplog.clear()
    load(root, text(rows, "file,label,is_night"))
    assert load(root, text([(file, flag) for file, _, flag in rows], "file,is_valid"))["train"]["a1.png"] == "1"
    parts = [(*row, "test" if row[-1] else "train") for row in rows]
    assert len(load(root, text(parts, "file,label,is_test,subset"))) == 2
    assert "Not used" not in caplog.text


def flags(label: str) -> list[int]:
    return [int(name == label) for name in CLASSES]


def test_columns_of_0_and_1_are_classes(root, capsys):
    header = f"file,{','.join(CLASSES)}"
    rows = [(file, *flags(label)) for file, label in pairs()]
    assert load(root, text(rows, header)) == EXPECTED
    assert f"of the columns {', '.join(CLASSES)}, from the one with 1, of" in capsys.readouterr().out
    with_points = [(number, file, *map(float, values)) for number, (file, *values) in enumerate(rows)]
    assert load(root, text(with_points, f",{header}")) == EXPECTED
    assert load(root, text(rows, f",{','.join(CLASSES)}")) == EXPECTED
    assert load(root, text(with_points, f",{header}"), image_column="file") == EXPECTED
    with_splits = [(*row, "test" if number < 3 else "train") for number, row in enumerate(rows)]
    splits = load(root, text(with_splits, f"{header},subset"))
    assert splits["test"] == dict(pairs()[:3]) and splits["train"] == dict(pairs()[3:])
    grouped = [(*row, f"p{number}") for number, row in enumerate(rows)]
    assert load(root, text(grouped, f"{header},patient"), group_column="patient") == EXPECTED
    beside = [(*row, label[:3]) for row, (_, label) in zip(rows, pairs(), strict=True)]
    assert load(root, text(beside, f"{header},class"))["train"]["a0.png"] == CLASSES[0][:3], "they say something else"


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        ([1, 1, 0], "", "each image has one, but row 5 has 2: correct such rows"),
        ([0, 0, 0], "", "each image has one, but row 5 has none: correct such rows"),
        (None, ",note", "If each is a class, remove the other columns (note)"),
        (None, "is_train,is_valid,is_test", "hold 0 or 1. If each is a class, write one column"),
    ],
)
def test_columns_of_0_and_1_that_may_be_no_classes_are_refused(root, change, header, message):
    rows = [(file, *flags(label)) for file, label in pairs()]
    rows[3] = (rows[3][0], *change) if change else rows[3]
    names = header if "is_" in header else ",".join(CLASSES) + header
    rows = [(*row, "x") for row in rows] if header == ",note" else rows
    with pytest.raises(UserError, match="which column of") as raised:
        load(root, text(rows, f"file,{names}"))
    assert message in str(raised.value)


def test_columns_of_0_and_1_in_the_folders_of_splits(root):
    """As Roboflow writes them; a test split without a single 1 has no labels."""
    for split, chosen in (("train", pairs()[:6]), ("valid", pairs()[6:9]), ("test", pairs()[9:])):
        (root / split).mkdir()
        for file, _ in chosen:
            (root / file).rename(root / split / file)
        rows = [(file, *([0] * 3 if split == "test" else flags(label))) for file, label in chosen]
        (root / split / "_classes.csv").write_text(text(rows, f"filename, {', '.join(CLASSES)}", ", "))
    splits, _ = load_images(data_dir=str(root))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "validation": 3}
    assert splits["train"].features["label"].names == sorted(CLASSES)
    assert splits["train"]["label"][:] == [sorted(CLASSES).index(label) for _, label in sorted(pairs()[:6])]
    valid = root / "valid/_classes.csv"
    valid.write_text(valid.read_text().replace("0, 1", "1, 1", 1))
    with pytest.raises(UserError, match=r"each image has one, but row . has 2: correct such rows"):
        load_images(data_dir=str(root))  # or its images would be left out


def test_column_that_may_hold_groups_is_named_where_none_is_given(root, capsys):
    rows = [(*pair, f"l{number // 2}", f"p{number // 4}") for number, pair in enumerate(pairs())]
    table, hint = text(rows, "file,label,lesion_id,Patient ID"), "share values in the column 'Patient ID'"
    load(root, table)
    assert hint in capsys.readouterr().out
    for options in ({"group_column": "lesion_id"}, {"group_by": "[0-9]+"}):
        load(root, table, **options)
        assert hint not in capsys.readouterr().out
    load(root, table, to_train=False)  # nothing is cut where a model is only scored
    assert hint not in capsys.readouterr().out
    load(root, text([(*pair, number) for number, pair in enumerate(pairs())], "file,label,patient_id"))
    load(root, text([(*pair, f"p{number // 4}") for number, pair in enumerate(pairs())], "file,label,place"))
    assert "careful" not in capsys.readouterr().out


def test_table_that_may_not_be_of_the_classes_is_refused(tmp_path):
    for number in range(12):
        (tmp_path / CLASSES[number % 3]).mkdir(exist_ok=True)
        draw(CLASSES[number % 3], number).save(tmp_path / CLASSES[number % 3] / f"{number}.png")
    table = tmp_path / "metadata.csv"
    table.write_text(text([(number, "AB"[number % 2]) for number in range(12)], "file_name,photographer"))
    with pytest.raises(UserError, match=r"'photographer' of .*, or the folders, such as blue, green, red\? Give"):
        load_images(data_dir=str(tmp_path))
    with pytest.raises(UserError, match="there is no column 'kind'"):
        load_images(data_dir=str(tmp_path), label_column="kind")
    splits, _ = load_images(data_dir=str(tmp_path), group_by="folder")
    assert splits["train"].features["label"].names == ["A", "B"]
    splits, _ = load_images(data_dir=str(tmp_path), label_column="photographer")
    assert splits["train"].features["label"].names == ["A", "B"]
    table.write_text(text([(number, "AB"[number % 2], "x") for number in range(12)], "file_name,photographer,place"))
    with pytest.raises(UserError, match=r"which column of .*Where class folders tell them, take metadata.csv out"):
        load_images(data_dir=str(tmp_path))
    table.write_text(text([(number, number % 2, 1 - number % 2) for number in range(12)], "file_name,indoor,outdoor"))
    with pytest.raises(UserError, match=r"columns indoor, outdoor of .*, such as blue, green, red\? Write one column"):
        load_images(data_dir=str(tmp_path))
    splits, _ = load_images(data_dir=str(tmp_path), labels=str(table))
    assert splits["train"].features["label"].names == ["indoor", "outdoor"]


def test_image_of_another_folder_is_named(root, caplog):
    (root / "masks").mkdir()
    (root / "a5.png").rename(root / "masks/a5.png")
    assert "masks/a5.png" in load(root, text(pairs()))["train"]
    assert "1 image found in folders that the table does not name, such as masks/a5.png for a5.png" in caplog.text


def test_groups_are_below_the_folders_of_splits(root):
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        for number in numbers:
            folder = root / split / f"p{number // 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (root / f"a{number}.png").rename(folder / f"a{number}.png")
    (root.parent / "labels.csv").write_text(text(pairs()))
    splits, _ = load_images(data_dir=str(root), labels=str(root.parent / "labels.csv"), group_by="folder")
    assert len(set(splits["train"]["group"][:])) == 3 and len(set(splits["test"]["group"][:])) == 2


def test_table_of_a_split_without_labels_is_not_used(tmp_path, caplog):
    for split, first in (("train", 0), ("test", 20)):
        (tmp_path / split).mkdir()
        for number in range(12):
            draw(CLASSES[number % 3], first + number).save(tmp_path / split / f"a{number}.png")
    (tmp_path / "train/metadata.csv").write_text(text(pairs(), "file_name,label"))
    (tmp_path / "test/metadata.csv").write_text("file_name\n" + "".join(f"{name}\n" for name, _ in pairs()))
    assert set(load_images(data_dir=str(tmp_path))[0]) == {"train"}
    assert "Not used: the test split, because " in caplog.text
    (tmp_path / "test/metadata.csv").write_text(text(pairs(), "file_name,Class"))
    assert set(load_images(data_dir=str(tmp_path))[0]) == {"train", "test"}
    with pytest.raises(UserError, match="there is no column 'label'"):
        load_images(data_dir=str(tmp_path), label_column="label")


def test_every_fault_is_counted_and_the_first_ones_are_listed(root):
    with pytest.raises(UserError, match="11 values cannot be used") as raised:
        load(root, text([pairs()[0], *((f"b{number}.png", "red") for number in range(11))]))
    assert str(raised.value).count("there is no image") == 10 and "... and 1 more" in str(raised.value)


def test_table_needs_a_folder(root):
    (root.parent / "labels.csv").write_text(text(pairs()))
    with pytest.raises(UserError, match="are for image files in a folder"):
        load_images(labels=str(root.parent / "labels.csv"))
    (root / "inside.csv").write_text(text(pairs()))
    with pytest.raises(UserError, match=r"inside\.csv is not a file here: did you mean .*images/inside\.csv"):
        load_images(data_dir=str(root), labels="inside.csv")
    with pytest.raises(UserError, match=r"nowhere\.csv is not a file"):
        load_images(data_dir=str(root), labels="nowhere.csv")
    with pytest.raises(UserError, match="--split_column names a column of a table, but"):
        load_images(data_dir=str(root), split_column="split")


def test_groups_by_the_names_of_files_and_folders(tmp_path):
    for number in range(12):
        folder = tmp_path / "images" / CLASSES[number % 3] / f"p{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        draw(CLASSES[number % 3], number).save(folder / f"s{number // 4}_{number}.png")

    def groups(group_by: str) -> dict[str, int]:
        rows = load_images(data_dir=str(tmp_path / "images"), group_by=group_by)[0]["train"]
        return dict(zip(rows["name"][:], rows["group"][:], strict=True))

    by_folder, by_name = groups("folder"), groups("^(s[0-9])_")
    assert len(set(by_folder.values())) == 2 and len(set(by_name.values())) == 3
    assert all((group == by_folder["blue/p0/s0_0.png"]) == ("/p0/" in name) for name, group in by_folder.items())
    assert all((group == by_name["blue/p0/s0_0.png"]) == ("/s0_" in name) for name, group in by_name.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "["}, "is neither 'folder' nor a regular expression"),
        ({"group_by": "^x"}, "finds no group in any file"),
        ({"group_by": "^a"}, "puts all images into one group, 'a'"),
        ({"group_by": "folder"}, "finds no group in any file"),
        ({"group_by": "^a", "group_column": "label"}, "give one of them"),
    ],
)
def test_groups_that_are_none_are_refused(root, options, message):
    with pytest.raises(UserError, match=message):
        load(root, text(pairs()), **options)


def test_index_of_pandas_is_no_image_and_no_label(root):
    for number in range(12):
        (root / f"a{number}.png").rename(root / f"{number}.png")
    rows = [(row, f"{11 - row}.png", CLASSES[row % 3]) for row in range(12)]
    expected = {"train": {name: label for _, name, label in rows}}
    assert load(root, text(rows, ",img,label")) == expected
    assert load(root, text(rows, "id,img,label")) == expected
    with pytest.raises(UserError, match="first and second both name files below"):
        load(root, text([(row, 11 - row, label) for row, _, label in rows], "first,second,label"))


def test_numbers_of_tasks_are_not_taken_for_images(root):
    """Labelling tools number their tasks, and rename the files."""
    for number in range(12):
        (root / f"a{number}.png").rename(root / f"{number}.png")

    def rows(name: str) -> list[tuple]:
        return [(11 - number, name.format(number), CLASSES[number % 3]) for number in range(12)]

    expected = {"train": {f"{number}.png": label for number, _, label in rows("")}}
    uploaded = text(rows("/data/upload/1/8f3c-{}.png"), "id,image,label")
    with pytest.raises(UserError, match=r"id has numbers that name files below .*, but image names images that"):
        load(root, uploaded)
    assert load(root, uploaded, image_column="id") == expected
    assert load(root, text(rows("https://example.org/{}/photo.jpg"), "id,url,label")) == expected
    for number in range(12):  # folders are not taken for classes instead
        (root / f"batch{number % 2}").mkdir(exist_ok=True)
        (root / f"{number}.png").rename(root / f"batch{number % 2}/{number}.png")
    (root / "metadata.csv").write_text(uploaded)
    with pytest.raises(UserError, match="id has numbers that name files below"):
        load_images(data_dir=str(root))


def test_split_folders_are_kept_where_a_table_has_no_splits(root):
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        (root / split).mkdir()
        for number in numbers:
            (root / f"a{number}.png").rename(root / split / f"a{number}.png")
    splits = load(root, text(pairs()))
    assert {split: len(images) for split, images in splits.items()} == {"train": 8, "test": 4}


def test_first_folders_that_differ_are_not_skipped(root):
    rows = [("left/a0.png", "blue"), *((f"right/{name}", label) for name, label in pairs()[1:])]
    with pytest.raises(UserError, match="and none of them names files below"):
        load(root, text(rows))


def test_accents_in_file_names_may_be_written_in_two_ways(root):
    (root / "a0.png").rename(root / unicodedata.normalize("NFD", "rosé.png"))
    rows = [("rosé.png", "blue"), *pairs()[1:]]
    assert (
        len(load(root, text(rows))["train"])
        == len(load(root, unicodedata.normalize("NFD", text(rows)))["train"])
        == 12
    )


def test_class_folders_go_on_beside_a_table_of_something_else(tmp_path, caplog):
    for number in range(12):
        (tmp_path / CLASSES[number % 3]).mkdir(exist_ok=True)
        draw(CLASSES[number % 3], number).save(tmp_path / CLASSES[number % 3] / f"{number}.png")
    (tmp_path / "metadata.csv").write_text("camera,place\nx,y\n")
    assert load_images(data_dir=str(tmp_path))[0]["train"].features["label"].names == list(CLASSES)
    assert "Not used: " in caplog.text and "metadata.csv" in caplog.text


def test_numbers_of_classes_are_sorted_by_value(root):
    rows = [(name, row % 11 + 1) for row, (name, _) in enumerate(pairs())]
    (root.parent / "labels.csv").write_text(text(rows))
    splits, _ = load_images(data_dir=str(root), labels=str(root.parent / "labels.csv"))
    assert splits["train"].features["label"].names == [str(number) for number in range(1, 12)]


def test_linked_folders_are_searched(root, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/images").symlink_to(root, target_is_directory=True)
    (root / "ring").symlink_to(root, target_is_directory=True)
    (tmp_path / "labels.csv").write_text(text(pairs()))
    splits, _ = load_images(data_dir=str(tmp_path / "linked"), labels=str(tmp_path / "labels.csv"))
    assert len(splits["train"]) == 12


@pytest.mark.parametrize("column", ["split", "patient"])
def test_image_in_two_splits_or_groups_is_refused(root, column):
    values = ("train", "test") if column == "split" else ("p1", "p2")
    rows = [(*pair, values[number > 5]) for number, pair in enumerate(pairs())]
    options = {} if column == "split" else {"group_column": "patient"}
    with pytest.raises(UserError, match=r"'a0.png' is in row 2 too, with another label, split or group"):
        load(root, text([*rows, ("a0.png", "blue", values[1])], f"file,label,{column}"), **options)


def test_test_comes_before_validation_where_a_model_is_scored_only(root):
    rows = [(*pair, "test" if number < 6 else "validation") for number, pair in enumerate(pairs())]
    assert load(root, text(rows, "file,label,split"), to_train=False) == {"train": dict(pairs()[:6])}


def test_class_number_below_zero_is_no_label(root):
    features = Features({"file": Value("string"), "label": ClassLabel(names=list(CLASSES))})
    numbers = [-1, *(number % 3 for number in range(1, 12))]
    table = {"file": [f"a{number}.png" for number in range(12)], "label": numbers}
    path = root.parent / "labels.parquet"
    Dataset.from_dict(table, features=features).to_parquet(path)
    with pytest.raises(UserError, match="row 1, column 'label': there is no label"):
        load_images(data_dir=str(root), labels=str(path))


@pytest.mark.parametrize(
    ("patients", "together"),
    [
        # The same name, in both spellings of Unicode.
        (["Zoë", "Zoe\N{COMBINING DIAERESIS}"] * 2 + [""] * 8, [0] * 4 + [*range(4, 12)]),
        (["p1"] * 4 + [""] * 8, [0] * 4 + [*range(4, 12)]),
        ([f"p{number // 4}" for number in range(12)], [number // 4 * 4 for number in range(12)]),
    ],
)
def test_images_of_one_group_are_together_and_those_without_a_group_alone(root, patients, together):
    rows = [(*pair, patient) for pair, patient in zip(pairs(), patients, strict=True)]
    path = root.parent / "labels.csv"
    path.write_text(text(rows, "file,label,patient"), encoding="utf-8")
    train = load_images(data_dir=str(root), labels=str(path), group_column="patient")[0]["train"]
    group_of = dict(zip(train["name"], train["group"], strict=True))
    groups = [group_of[f"a{number}.png"] for number in range(12)]
    assert [groups.index(group) for group in groups] == together


def test_table_of_windows_keeps_signs_that_latin_1_lacks(root):
    rows = [(file, f"{label} \u2013 5 \u20ac") for file, label in pairs()]
    assert load(root, text(rows).encode("cp1252")) == {"train": dict(rows)}


def test_split_without_a_table_and_folder_with_two_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "train/metadata.csv").write_text(text(pairs(), "file_name,label"))
    with pytest.raises(UserError, match="test has no metadata file, but another split has one: add it"):
        load_images(data_dir=str(tmp_path))
    (tmp_path / "train/metadata.jsonl").touch()
    with pytest.raises(UserError, match=r"train holds metadata\.csv and metadata\.jsonl: remove all but one"):
        load_images(data_dir=str(tmp_path))


def test_rows_are_numbered_as_an_editor_shows_them(root):
    content = 'sep=;\nfile;label;note\na0.png;blue;"two\nlines"\n\nb.png;red;x\n'
    with pytest.raises(UserError, match=r"row 6, column 'file': there is no image 'b\.png'"):
        load(root, content)


def test_index_of_pandas_is_no_label(root):
    rows = {"file_name": [f"a{n}.png" for n in range(12)], "breed": [CLASSES[n % 3] for n in range(12)]}
    Dataset.from_dict(rows | {"__index_level_0__": [*range(11, -1, -1)]}).to_parquet(root / "metadata.parquet")
    images, _ = load_images(data_dir=str(root))
    assert images["train"].features["label"].names == list(CLASSES)


def test_column_that_names_splits_and_more_is_named(root, caplog):
    kinds = ("train", "train", "test", "holdout")
    rows = [(*pair, kinds[number % 4]) for number, pair in enumerate(pairs())]
    assert load(root, text(rows, "file,label,set")) == EXPECTED
    assert "Not used: the column 'set'" in caplog.text and "but also 'holdout'" in caplog.text


def test_folders_of_one_name_cost_no_search_through_all_of_them(tmp_path, monkeypatch):
    names = [f"p{number}/study/1.png" for number in range(200)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    compared, calls = image_files._compared, []
    monkeypatch.setattr(image_files, "_compared", lambda parts: calls.append(1) or compared(parts))
    assert image_files.ImageFiles(tmp_path).find_all(names) == [tmp_path / name for name in names]
    assert len(calls) < 20 * len(names)


def test_parquet_table_in_a_folder_with_brackets(tmp_path):
    (tmp_path / "x [1]").mkdir()
    path = tmp_path / "x [1]/t.parquet"
    Dataset.from_dict({"file": ["a.png"], "label": ["red"]}).to_parquet(path)
    assert read_table(path).columns == ["file", "label"]
