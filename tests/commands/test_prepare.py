"""prepare.py: shards with the images of the folder, resumable, and one message for every mistake."""

import io
import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import PROJECT, draw, draw_folder, load
from datasets import ClassLabel, Dataset
from PIL import Image
from pyarrow import parquet

import luthier.images.inspection
import prepare
from data import load_splits
from luthier.errors import UserError
from luthier.files import lock_folder
from luthier.images import shards as shard_files
from luthier.images.streams import open_stream
from luthier.scoring.audit import audit_images

LINE = ["images", "shards", "--side", "64", "--images", "7"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with images of three classes, a copy, and a file that is damaged."""
    monkeypatch.chdir(tmp_path)
    draw_folder(Path("images"), per_class=12)
    first = sorted(Path("images/red").iterdir())[0]
    shutil.copy(first, "images/red/copy.png")
    draw("red", 77, width=300, height=200).save("images/red/large.jpg")
    Path("images/blue/damaged.png").write_bytes(b"no image")


def shards() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("shards").glob("*.parquet")}


def test_shards_have_the_images_of_the_folder(capsys):
    prepare.main(LINE)
    told = capsys.readouterr().out
    assert "1 image that cannot be read, such as blue/damaged.png" in told and "copies left out: 1" in told
    before, after = load(data_dir="images"), load(data_dir="shards")
    assert sorted(after) == ["test", "train", "validation"]
    assert all(dataset.features["label"].names == ["blue", "green", "red"] for dataset in after.values())
    known, kept = (
        [image for dataset in splits.values() for image in zip(dataset["digest"], dataset["label"], strict=True)]
        for splits in (before, after)
    )
    assert len(kept) == len(set(kept)) == len(set(known)) == len(known) - 1
    assert len(set(kept) - set(known)) == 1  # the large one, which was resized
    names = [name for dataset in after.values() for name in dataset["name"][:]]
    (large,) = (name for name in names if name.endswith("large.jpg"))
    assert large == "red-large.jpg"
    sizes = [min(Image.open(io.BytesIO(image["bytes"])).size) for rows in after.values() for image in rows["image"][:]]
    assert max(sizes) == 64  # of the large one
    files = len(list(Path("shards").glob("train-*.parquet")))
    assert files > 1 and (Path("shards") / f"train-{files - 1:05}-of-{files:05}.parquet").exists()


def test_next_command_can_be_pasted(capsys):
    prepare.main(["images", "my shards", *LINE[2:]])
    assert f"next     accelerate launch {PROJECT}/train.py --data_dir 'my shards'\n" in capsys.readouterr().out


def test_damaged_shard_is_written_again(capsys):
    prepare.main(LINE)
    before = shards()
    Path("shards", min(before)).write_bytes(before[min(before)][:100])
    prepare.main(LINE)
    assert shards() == before


def test_copies_of_shards_and_partial_downloads_are_no_shards():
    prepare.main(LINE)
    first, *_, last = sorted(Path("shards").glob("train-*.parquet"))
    copy = first.with_name(f"{first.stem} (1).parquet")
    shutil.copy(first, copy)
    for load_them in (lambda: load(data_dir="shards"), lambda: open_stream("shards")):
        with pytest.raises(UserError, match=r"shards holds train-00000-of-\d+ \(1\).parquet, which looks like a copy"):
            load_them()
    copy.unlink()
    last.rename(last.with_name(f"{last.name}.crdownload"))
    with pytest.raises(UserError, match="lacks files of the split train"):
        load(data_dir="shards")


def test_interruption_before_the_first_file_is_named(monkeypatch):
    monkeypatch.setattr(prepare, "resized", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(LINE)
    assert exit_info.value.code == 130 and Path("shards/shards.json").is_file() and not shards()
    with pytest.raises(UserError, match=r"shards lacks files of the split train: prepare.py was interrupted"):
        load(data_dir="shards")


def test_second_start_writes_what_is_missing_and_the_same(capsys):
    prepare.main(LINE)
    whole = shards()
    stamps = {path: path.stat().st_mtime_ns for path in Path("shards").glob("*.parquet")}
    gone = sorted(stamps)[0]
    gone.unlink()
    (gone.parent / f".{gone.name}").write_bytes(b"half")  # as a kill leaves it
    capsys.readouterr()
    prepare.main(LINE)
    assert shards() == whole and "of them from before" in capsys.readouterr().out
    assert not list(Path("shards").glob(".*"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != gone)


def test_machines_take_a_share_each_and_write_the_same_files(monkeypatch, capsys):
    prepare.main(LINE)
    whole = shards()
    shutil.rmtree("shards")
    inspected = []
    inspect = luthier.images.inspection.inspect
    monkeypatch.setattr(
        luthier.images.inspection, "inspect", lambda rows, *more: inspected.append(len(rows)) or inspect(rows, *more)
    )

    def other_machine(seconds: float) -> None:  # which finishes while this one waits
        Path("shards/.inspected-1-of-2").touch()

    monkeypatch.setattr(time, "sleep", other_machine)
    prepare.main([*LINE, "--share", "2/2"])
    told = capsys.readouterr().out
    assert "wait     for 1 machine to inspect their share, such as 1-of-2" in told and inspected == [19]
    some = shards()
    assert 0 < len(some) < len(whole) and some.items() <= whole.items()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("there is nothing to wait for"))
    prepare.main([*LINE, "--share", "1/2"])
    assert shards() == whole and inspected == [19, 20]


def test_machine_that_ends_while_this_one_looks_is_not_waited_for(monkeypatch):
    looks, exists = iter([False, False, False]), Path.exists

    def exists_at_last(path: Path) -> bool:
        return next(looks, True) if path.name == ".inspected-1-of-2" else exists(path)

    monkeypatch.setattr(Path, "exists", exists_at_last)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    prepare.inspect_share({"data_dir": "images"}, Path("shards"), prepare.Share(2, 2))
    assert next(looks, None) is None and Path("shards/.inspected-2-of-2").is_file()


def test_machine_may_have_no_image_of_its_own():
    Path("shards").mkdir()
    for number in range(1, 60):
        Path(f"shards/.inspected-{number}-of-60").touch()
    prepare.main([*LINE, "--share", "60/60"])
    assert not shards()


def test_folder_that_is_not_complete_is_not_trained_from(monkeypatch):
    prepare.main(LINE)
    for missing in (sorted(Path("shards").glob("train-*"))[-1:], list(Path("shards").glob("test-*"))):
        assert missing
        for path in missing:
            path.rename(path.with_name(f".{path.name}"))  # as in an interrupted run
        for load_them in (lambda: load(data_dir="shards"), lambda: open_stream("shards")):
            with pytest.raises(UserError, match=r"shards lacks files of the split t.*: prepare.py was interrupted"):
                load_them()
        for path in missing:
            path.with_name(f".{path.name}").rename(path)
    load(data_dir="shards")
    for of_another_program in ("[]", '{"splits": 3}', "{"):
        Path("shards/shards.json").write_text(of_another_program)
        load(data_dir="shards")


def test_image_that_changes_after_its_inspection_is_not_stored(monkeypatch, capsys):
    write = prepare.write_shards

    def change_and_write(*arguments):
        draw("red", 78, width=300, height=200).save("images/red/large.jpg")
        write(*arguments)

    monkeypatch.setattr(prepare, "write_shards", change_and_write)
    with pytest.raises(SystemExit):
        prepare.main(LINE)
    assert "large.jpg is no longer as it was inspected: it has changed" in capsys.readouterr().err


def test_two_cannot_write_the_same_share(capsys):
    Path("shards").mkdir()
    with lock_folder(Path("shards"), ".lock-1-of-1", ""), pytest.raises(SystemExit) as exit_info:
        prepare.main(LINE)
    assert exit_info.value.code == 2 and "another prepare.py is writing into shards" in capsys.readouterr().err
    prepare.main(LINE)
    assert not list(Path("shards").glob(".*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["images", "shards", "--share", "3/2"], "--share 3/2 is not a share: give one such as 2/4"),
        (["images", "shards", "--share", "half"], "--share half is not a share"),
        ([], "name the data and a folder"),
        (["images"], "name the data and a folder"),
        (["images", "shards", "--side", "0"], "--side is 0"),
        (["images", "shards", "--images", "many"], "--images"),
        (["images", "shards", "--recipe", "probe"], "does not take --recipe"),
        (["images", "shards", "--sid", "24"], "unknown option --sid; did you mean 'side'"),
        (["images", "shards", "--size", "24"], "unknown option --size; did you mean 'side'"),
        (["images", "shards", "--resize", "24"], "did you mean 'side'? Options: python prepare.py --help"),
        (["images/*.png", "shards"], "but a pattern: give the folder that holds these images"),
        (["file:///home/me/photos", "shards"], "but an address: give the path alone, without file://"),
        (["images", "images"], "images is or lies in images"),
        (["images", "images/shards"], "images/shards is or lies in images, whose images its files would be among"),
        (["images", "notes.txt/x"], "cannot be a folder"),
        (["images", "notes.txt/x", "--share", "1/2"], "cannot be a folder"),
        (["imagse", "shards"], "there is no folder imagse, and the Hub cannot be reached"),
        (["images", "notes.txt"], "is not an empty folder"),
        (["images", "many"], "many is not an empty folder"),
        (["images", "other", "--side", "24"], "other has shards of other images"),
        (["images/red", "shards"], "no images in class folders"),
    ],
)
def test_mistake_gives_one_message(line, message, capsys):
    Path("notes.txt").touch()
    draw_folder(Path("many"), per_class=1)
    Path("other").mkdir()
    Path("other/shards.json").write_text(json.dumps({"side": 512}))
    with pytest.raises(SystemExit) as exit_info:
        prepare.main(line)
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told


def described(**columns) -> Dataset:
    """Return four images, of which two are the same in one class and one more in another."""
    columns = {"digest": ["x", "x", "x", "y"], "label": [0, 0, 1, 1], "group": [0, 0, 0, 1]} | columns
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["a", "b"]))


def test_copies_of_one_class_are_left_out_and_not_those_of_another():
    kept = prepare.keep_one_of_each(described())
    assert list(zip(kept["digest"], kept["label"], strict=True)) == [("x", 0), ("x", 1), ("y", 1)]


def test_plan_changes_with_all_that_is_written():
    def plan(side: int = 64, images: int = 7, names: tuple[str, str] = ("a", "b"), **columns) -> str:
        rows = described(**columns).cast_column("label", ClassLabel(names=list(names)))
        return json.dumps(prepare.plan_of({"train": rows}, side, images))

    others = [
        plan(side=65), plan(images=8), plan(names=("a", "c")), plan(group=[0, 0, 0, 0]), plan(label=[0, 0, 1, 0]),
        plan(digest=["x", "x", "x", "z"]),
    ]  # fmt: skip
    assert len({plan(), *others}) == 7 and plan() == plan()


def test_images_that_are_stored_otherwise_have_the_extension_of_their_format():
    shutil.copy(PROJECT / "tests/images/phone.heic", "images/red/phone.heic")
    draw("red", 78, width=300, height=200).save("images/red/photo.png")
    prepare.main(LINE)
    splits, unreadable = load_splits(data_dir="shards")
    names = {name for dataset in splits.values() for name in dataset["name"]}
    assert {"red-phone.heic.png", "red-photo.png.jpg", "red-large.jpg"} <= names
    assert audit_images(splits, unreadable)["wrong_extension"] == []


def test_shards_say_which_images_belong_together(capsys):
    prepare.main([*LINE, "--group_by", r"\d(?=\.png)"])  # the last digit
    printed = capsys.readouterr().out
    assert "3 images without a group" in printed  # a copy, a damaged and a large one
    assert f"next     accelerate launch {PROJECT}/train.py --data_dir shards --group_column group\n" in printed
    rows = [row for path in Path("shards").glob("*.parquet") for row in parquet.read_table(path).to_pylist()]
    found = {(row["image"]["path"][-5], row["group"]) for row in rows}
    digits, groups = zip(*found, strict=True)
    assert len(rows) == 37 and len(found) == len(set(digits)) == len(set(groups)) == 11


def test_images_are_stored_block_by_block(monkeypatch):
    counts, resized = [], prepare.resized
    monkeypatch.setattr(shard_files, "BLOCK", 4)
    monkeypatch.setattr(prepare, "resized", lambda *args: counts.append(len(args[1])) or resized(*args))
    prepare.main(LINE)
    rows = sum(parquet.read_metadata(path).num_rows for path in Path("shards").glob("*.parquet"))
    assert sum(counts) == rows == 37 and max(counts) == 4


def test_machine_with_another_plan_that_begins_at_the_same_time_is_refused(monkeypatch):
    first = Path("shards/shards.json")
    monkeypatch.setattr("luthier.files.sync", lambda path: first.write_text('{"version": 2}'))  # by the other one
    with pytest.raises(UserError, match="has shards of other images"):
        prepare.claim_folder(Path("shards"), {"version": 1})
    assert first.read_text() == '{"version": 2}' and [*Path("shards").iterdir()] == [first]


def test_plan_that_a_virus_scanner_reads_does_not_end_the_command(monkeypatch):
    unlink = Path.unlink

    def refuse(path, **options):
        if path.name.startswith(".shards.json-"):
            raise PermissionError(13, "it is being read")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    for _ in range(2):
        prepare.claim_folder(Path("shards"), {"version": 1})
    assert json.loads(Path("shards/shards.json").read_text()) == {"version": 1}


def test_machine_that_begins_at_the_same_time_does_not_empty_the_plan(monkeypatch):
    monkeypatch.setattr("luthier.files.sync", lambda path: Path("shards/.shards.json").write_text(""))
    prepare.claim_folder(Path("shards"), {"version": 1})
    assert json.loads(Path("shards/shards.json").read_text()) == {"version": 1}
