"""data.py: loading folders and datasets, splitting, preparing and augmenting images, and errors in the data."""

import hashlib
import io
import os
import shutil
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import COLOURS, draw, draw_folder, encoded, labels_of, load, save_dataset
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import default_collate

import data
import luthier.cache as cache
import luthier.images.inspection as inspection
from data import load_splits, prepare, store_training_image, with_transforms
from luthier.errors import UserError
from luthier.images.decode import decode_rgb
from luthier.images.description import describe
from luthier.images.inspection import leave_out_unreadable
from luthier.images.views import EvaluationView
from models import build_model


def digests(splits: DatasetDict) -> dict[str, list[str]]:
    return {split: dataset["digest"][:] for split, dataset in splits.items()}


# --- folders


def test_folder_is_split_into_stratified_disjoint_parts(images, view):
    splits = prepare(load(data_dir=str(images)), view)
    counts = describe(splits, "drawn")["splits"]
    assert labels_of(splits) == ["blue", "green", "red"]
    assert {split: set(count["per_class"].values()) for split, count in counts.items()} == {
        "train": {5}, "validation": {1}, "test": {2},
    }  # fmt: skip
    all_digests = [digest for split in digests(splits).values() for digest in split]
    assert len(set(all_digests)) == len(all_digests) == 24


def test_labels_follow_the_folders(images, view):
    splits = with_transforms(prepare(load(data_dir=str(images)), view), view, "none", "evaluation")
    for dataset in splits.values():
        for row in dataset:
            mean = (row["pixel_values"].mean(dim=(1, 2)) + 1).numpy() * 127.5
            nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
            assert nearest == dataset.features["label"].int2str(row["labels"])


def test_only_the_split_seed_decides_the_splits(images, view):
    def split_digests(**options):
        torch.manual_seed(options.pop("training_seed", 0))
        np.random.seed(0)
        return digests(prepare(load(data_dir=str(images), **options), view))

    assert split_digests() == split_digests(split_seed=1) == split_digests(training_seed=5)
    assert split_digests(split_seed=2) != split_digests()


def test_fractions_decide_the_sizes_of_the_splits(tmp_path):
    splits = load(data_dir=str(draw_folder(tmp_path / "p", 20)), validation_fraction=0.25, test_fraction=0.5)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 15, "validation": 15, "test": 30}


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "Val"])
def test_split_folders_are_kept(tmp_path, name):
    for number, split in enumerate(("train", name, "test")):
        draw_folder(tmp_path / "p" / split, 3 + number, first=100 * number)
    splits = load(data_dir=str(tmp_path / "p"))
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 9, "validation": 12, "test": 15}


def test_missing_test_split_is_taken_from_train(tmp_path):
    draw_folder(tmp_path / "p/train", 10)
    draw_folder(tmp_path / "p/val", 2, first=50)
    splits = load(data_dir=str(tmp_path / "p"))
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 24, "validation": 6, "test": 6}


def test_changed_file_is_prepared_again(images, view):
    before = describe(prepare(load(data_dir=str(images)), view), "drawn")["fingerprint"]
    assert describe(prepare(load(data_dir=str(images)), view), "drawn")["fingerprint"] == before
    draw("red", 999).save(images / "red/000.png")
    assert describe(prepare(load(data_dir=str(images)), view), "drawn")["fingerprint"] != before


def test_second_run_decodes_nothing(images, monkeypatch, view):
    prepare(load(data_dir=str(images)), view)
    for module in (data, inspection):
        monkeypatch.setattr(module, "decode_rgb", lambda *arguments: pytest.fail("decoded again"))
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15


@pytest.mark.parametrize("fractions", [{"test_fraction": 0}, {"validation_fraction": 1.5}])
def test_impossible_fraction_is_refused(images, fractions):
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        load(data_dir=str(images), **fractions)


def test_fractions_that_leave_no_training_images_are_refused(images):
    with pytest.raises(UserError, match="leave nothing to train on"):
        load(data_dir=str(images), validation_fraction=0.5, test_fraction=0.5)


# --- preparation


def test_rgb_files_keep_their_bytes_and_other_files_keep_their_pixels(images, view):
    draw("red", 5).save(images / "red/photo.jpg")
    draw("red", 6).convert("L").save(images / "red/grey.png")
    train = prepare(load(data_dir=str(images)), view)["train"].cast_column("image", Image(decode=False))
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in images.rglob("*.*")}
    for row in train:
        path = by_digest[row["digest"]]
        if path.name == "grey.png":
            stored = np.asarray(PILImage.open(io.BytesIO(row["image"]["bytes"])))
            assert np.array_equal(stored, np.asarray(PILImage.open(path).convert("RGB")))
        else:
            assert row["image"]["bytes"] == path.read_bytes()


def add_unreadable_files(images: Path) -> list[str]:
    """Add four files that cannot be read; return the expected messages."""
    valid = (images / "red/000.png").read_bytes()
    (images / "red/cut.png").write_bytes(valid[: len(valid) // 2])
    (images / "red/empty.jpg").write_bytes(b"")
    (images / "blue/page.jpg").write_text("<html>not found</html>")
    (images / "blue/script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return ["cut.png", "empty.jpg: the file is empty", "page.jpg: not an image", "script.png: not an image"]


@pytest.mark.parametrize("options", [{}, {"on_bad_image": "error"}])
def test_all_unreadable_images_are_named(images, options):
    messages = add_unreadable_files(images)
    with pytest.raises(UserError, match="images that cannot be read: 4 of 28") as error_info:
        load(data_dir=str(images), **options)
    assert all(message in str(error_info.value) for message in messages)
    assert ("more than 5%" in str(error_info.value)) == (not options)


def test_few_unreadable_images_are_left_out_and_returned(tmp_path, view):
    images = draw_folder(tmp_path / "p", 40)
    add_unreadable_files(images)
    splits, unreadable = load_splits(data_dir=str(images))
    assert sum(map(len, splits.values())) == 120 == sum(map(len, prepare(splits, view).values()))
    assert {(image.name, image.label) for image in unreadable} == {
        ("red/cut.png", "red"), ("red/empty.jpg", "red"), ("blue/page.jpg", "blue"), ("blue/script.png", "blue"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"cannot be read: 4 of 124\. Replace"):
        load(data_dir=str(images), on_bad_image="error")


def test_split_with_only_unreadable_images_is_reported(tmp_path):
    draw_folder(tmp_path / "p/train", 40)
    (tmp_path / "p/test/red").mkdir(parents=True)
    (tmp_path / "p/test/red/a.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"1 of 121, all of the test split\. Replace or remove them:\n  test: test/red/a"
    ):
        load(data_dir=str(tmp_path / "p"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """The cache is empty at the beginning of the test; otherwise it has the images of other tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_read_error_is_not_cached(images, monkeypatch, view, empty_cache):
    def fail(*arguments):
        raise OSError(5, "the disk is away")

    for module, message in (
        (inspection, "cannot be opened: the disk is away"),
        (data, "read before are not there now"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(module, "decode_rgb", fail)
            prepare(load(data_dir=str(images)), view)
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15


def test_inspection_that_is_interrupted_goes_on_where_it_was(tmp_path, monkeypatch, empty_cache):
    """The rows of a dataset have no names but their numbers, which must stay what they are."""
    path = save_dataset(tmp_path / "set", Value("string"), {"train": ["a", "b"] * 10})
    inspected, decode = [], inspection.decode_rgb

    def decode_some(content, *rest):
        if len(inspected) == limit:
            raise KeyboardInterrupt
        inspected.append(content)
        return decode(content, *rest)

    monkeypatch.setattr(cache, "PART_ROWS", 8)
    monkeypatch.setattr(inspection, "decode_rgb", decode_some)
    limit = 12
    with pytest.raises(KeyboardInterrupt):
        load(dataset_name=path)
    inspected.clear()
    limit = 100
    splits = load(dataset_name=path)
    names = sorted((name for split in splits.values() for name in split["name"][:]), key=lambda name: int(name[10:]))
    assert names == [f"train row {row}" for row in range(20)] and 12 <= len(inspected) < 20
    assert load(dataset_name=path)["train"]["name"][:] == splits["train"]["name"][:]


def test_file_that_changes_with_its_size_and_time_is_not_kept_as_another(images, view, empty_cache):
    path = images / "red/000.png"
    splits, content, status = load(data_dir=str(images)), path.read_bytes(), path.stat()
    changed = bytearray(content)
    changed[-20] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"red/000.png: it has changed since it was read. If starting again"):
        prepare(splits, view)
    path.write_bytes(content)
    assert len(prepare(splits, view)["train"]) == len(splits["train"])


def test_image_that_memory_did_not_suffice_for_is_read_again(images, monkeypatch, empty_cache):
    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(UserError, match="there is not enough memory"):
        patch.setattr(inspection, "decode_rgb", fail)
        load(data_dir=str(images))
    assert sum(map(len, load(data_dir=str(images)).values())) == 24


def test_files_of_killed_processes_are_removed(images, view, empty_cache, tmp_path):
    prepare(load(data_dir=str(images)), view)
    folder = next((tmp_path / "cache").glob("luthier_inspected/*"))
    cache._remove_stale_files.cache_clear()
    for name, age in (("tmpold", 2 * cache.STALE_SECONDS), ("tmpnew", 60), ("tmpfolder", 2 * cache.STALE_SECONDS)):
        (folder / name).touch() if name != "tmpfolder" else (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    draw("red", 7000).save(images / "red/more.png")
    load(data_dir=str(images))
    assert [path.name for path in folder.glob("tmp*")] == ["tmpnew"]


def test_folder_that_is_read_again_warns_of_nothing(images, view, empty_cache, caplog):
    for seed in range(3):
        draw("red", 7000 + seed).save(images / f"red/more{seed}.png")
        prepare(load(data_dir=str(images)), view)
    assert "damaged" not in caplog.text


def test_damaged_file_of_the_cache_is_left_out(images, view, empty_cache, tmp_path, caplog):
    prepare(load(data_dir=str(images)), view)
    for part in (tmp_path / "cache").rglob("rows-*.arrow"):
        part.write_bytes(part.read_bytes()[:100])
    assert len(prepare(load(data_dir=str(images)), view)["train"]) == 15 and "it is damaged" in caplog.text


def test_images_of_an_earlier_run_are_reused(images, monkeypatch, view, empty_cache, capsys):
    """Adding images, a class and copies, and renaming a file, prepares only what is new."""
    made = Counter()

    def watch(kind, function):
        return lambda *arguments, **rest: made.update([kind]) or function(*arguments, **rest)

    def counts():
        numbers = dict(made)
        made.clear()
        return numbers

    def both():
        splits = load(data_dir=str(images), test_fraction=0.2, validation_fraction=0.2)
        return splits, prepare(splits, view)

    monkeypatch.setattr(inspection, "decode_rgb", watch("inspect", inspection.decode_rgb))
    monkeypatch.setattr(data, "store_training_image", watch("train", data.store_training_image))
    packer = data.view_packer
    monkeypatch.setattr(data, "view_packer", lambda view: watch("other", packer(view)))
    before, _ = both()
    total = sum(map(len, before.values()))
    assert counts() == {"inspect": total, "train": len(before["train"]), "other": total - len(before["train"])}
    both()
    assert counts() == {}
    assert f"reuse    {total} of {total} images as they were stored before" in capsys.readouterr().out

    (images / "violet").mkdir()
    for seed in range(6):
        draw("red", 5000 + seed).save(images / f"violet/{seed}.png")
    first = next((images / "red").iterdir())
    shutil.copy(first, images / "red/copy.png")
    first.rename(images / "red/renamed.png")
    after, prepared = both()
    numbers = counts()
    moved = sum(
        (image in before["train"]["digest"][:]) != (split == "train")
        for split in after for image in after[split]["digest"][:]
    )  # fmt: skip
    assert numbers["inspect"] == 6 + 2 and numbers["train"] + numbers["other"] <= 6 + 1 + moved
    for split, dataset in after.items():
        assert (
            prepared[split]["digest"][:] == dataset["digest"][:] and prepared[split]["label"][:] == dataset["label"][:]
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", images.parent / "another")
    fresh = prepare(after, view)
    for split, rows in with_transforms(prepared, view, "none", "evaluation").items():
        others = with_transforms(fresh, view, "none", "evaluation")[split]
        assert all(torch.equal(rows[i]["pixel_values"], others[i]["pixel_values"]) for i in range(len(rows)))


def test_large_image_is_stored_smaller_and_looks_the_same(tmp_path, view):
    smooth = draw("red", 1, 8, 6).resize((2000, 1500), PILImage.Resampling.BICUBIC)
    data = encoded(smooth, tmp_path, "jpg", quality=95)
    stored = PILImage.open(io.BytesIO(store_training_image(data, 64)["bytes"]))
    assert stored.format == "JPEG" and min(stored.size) == 64 and stored.mode == "RGB"
    difference = view(stored).sub(view(decode_rgb(data).image)).abs() * 127.5  # in 8-bit levels
    assert difference.mean() < 1.5 and difference.max() < 12


def test_elongated_and_tiny_images_are_stored(tmp_path):
    for size, stored_size in (((3000, 10), (3000, 10)), ((4000, 100), (2560, 64)), ((1, 1), (1, 1))):
        data = encoded(PILImage.new("RGB", size, "red"), tmp_path, "jpg")
        assert PILImage.open(io.BytesIO(store_training_image(data, 64)["bytes"])).size == stored_size


def test_file_that_is_much_smaller_than_its_view_is_stored_in_its_place(tmp_path, timm_checkpoint):
    folder = draw_folder(tmp_path / "images", 8)
    large = next((folder / "red").iterdir())
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    PILImage.fromarray(noise).save(large)  # of many bytes
    view = EvaluationView(build_model(str(timm_checkpoint), {0: "a", 1: "b"}, 128)[1])
    splits = load(data_dir=str(folder))
    prepared = prepare(splits, view)
    rows = with_transforms(prepared, view, "none", "evaluation")
    stored = []
    for split in ("validation", "test"):
        for number, source in enumerate(splits[split]["image"]):
            file = Path(source["path"]).read_bytes()
            packed = prepared[split][number]["view"]
            stored.append(packed == file)
            assert stored[-1] == (4 * len(file) <= 3 * 128 * 128)
            assert torch.equal(rows[split][number]["pixel_values"], view(decode_rgb(file).image))
    assert any(stored)
    pack = data.view_packer(view)
    assert len(pack(large.read_bytes())) == 3 * 128 * 128
    assert torch.equal(view.unpack(pack(large.read_bytes())), view(PILImage.fromarray(noise)))
    PILImage.new("RGB", (1000, 1000), "red").save(large)  # a small file that takes long to decode
    assert len(pack(large.read_bytes())) == 3 * 128 * 128


def test_augmentation_is_lazy_and_rows_are_collated(images, view):
    train = with_transforms(prepare(load(data_dir=str(images)), view), view, "flip_crop", "evaluation")["train"]
    assert not torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])
    batch = default_collate([train[0], train[14]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.uint8  # levels
    assert batch["labels"].tolist() == [0, 2] and batch["labels"].dtype == torch.int64


def test_random_crop_option_changes_the_test_view_and_not_the_validation_view(images, view):
    splits = prepare(load(data_dir=str(images)), view)
    views = with_transforms(splits, view, "none", "random_crop")
    assert len({views["test"][0]["pixel_values"].numpy().tobytes() for _ in range(12)}) > 6
    assert torch.equal(views["validation"][0]["pixel_values"], view.unpack(splits["validation"][0]["view"]))
    assert views["test"][0]["pixel_values"].shape == (3, 32, 32)
    mean = (views["test"][0]["pixel_values"].mean(dim=(1, 2)) + 1).numpy() * 127.5
    assert np.abs(mean - COLOURS["blue"]).max() < 12


def test_fingerprint_depends_on_labels_and_not_on_file_names(images, tmp_path, view):
    def fingerprint(folder: Path) -> str:
        return describe(prepare(load(data_dir=str(folder)), view), "drawn")["fingerprint"]

    before = fingerprint(images)
    shutil.copytree(images, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == before
    (tmp_path / "copy/red/000.png").rename(tmp_path / "copy/blue/moved.png")
    assert fingerprint(tmp_path / "copy") != before


def test_classes_that_differ_in_capitals_alone_are_named(tmp_path, capsys):
    draw_folder(tmp_path, per_class=3)
    (tmp_path / "green").rename(tmp_path / "Red")
    load_splits(data_dir=str(tmp_path))
    assert "classes whose names differ in capitals alone: 'Red', 'red'" in capsys.readouterr().out


def test_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    draw_folder(tmp_path / "images", per_class=6)
    load_splits(data_dir=str(tmp_path / "images"))
    for path in (tmp_path / "cache/generator").rglob("dataset_info.json"):
        path.write_text("")
    with pytest.raises(UserError, match=r"the cache in .*generator is damaged .*: remove this folder"):
        load_splits(data_dir=str(tmp_path / "images"))
    shutil.rmtree(tmp_path / "cache/generator")
    assert sum(map(len, load_splits(data_dir=str(tmp_path / "images"))[0].values())) == 18


def inspected(labels: list[int], unreadable: set[int]) -> DatasetDict:
    """Return images as inspected, of which some cannot be read."""
    features = Features({"name": Value("string"), "label": ClassLabel(names=["a", "b"]), "error": Value("string")})
    errors = ["not an image" if row in unreadable else None for row in range(len(labels))]
    columns = {"name": [f"{row}.png" for row in range(len(labels))], "label": labels, "error": errors}
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def test_no_class_is_left_out_and_no_more_images_than_may_be():
    readable, unreadable = leave_out_unreadable(inspected([0, 1] * 10, {3}))  # 5%
    assert len(readable["train"]) == 19 and unreadable[0][:3] == ("train", "3.png", "b")
    with pytest.raises(UserError, match="2 of 20, which is more than 5%"):
        leave_out_unreadable(inspected([0, 1] * 10, {3, 4}))
    rare = inspected([0] * 39 + [1], {39})
    with pytest.raises(UserError, match="1 of 40, all of the class 'b' in train"):
        leave_out_unreadable(rare)
    assert len(leave_out_unreadable(rare, max_unreadable=1)[1]) == 1  # an audit


def test_images_of_one_colour_and_other_sides_are_no_copies(tmp_path):
    files = [encoded(PILImage.new("RGB", size, "red"), tmp_path) for size in ((20, 40), (40, 20), (20, 40))]
    batch = {"image": [{"bytes": file, "path": None} for file in files]}
    pixels = inspection._inspect_batch(batch, [0, 1, 2], "train", None)["pixels"]
    assert pixels[0] == pixels[2] != pixels[1]


def fingerprint_of(**splits: list[tuple[int, str]]) -> str:
    """Return the fingerprint of splits of images, each a class and a digest."""
    features = Features({"label": ClassLabel(names=["a", "b"]), "digest": Value("string")})
    parts = {}
    for split, images in splits.items():
        columns = {"label": [label for label, _ in images], "digest": [digest for _, digest in images]}
        parts[split] = Dataset.from_dict(columns, features=features)
    return describe(DatasetDict(parts), "drawn")["fingerprint"]


def test_fingerprint_tells_splits_apart_and_not_the_order_of_images():
    one, two, three = (0, "x"), (1, "y"), (0, "z")
    before = fingerprint_of(train=[one, two], test=[three])
    assert before == fingerprint_of(train=[two, one], test=[three])
    assert before != fingerprint_of(train=[three, two], test=[one])  # compare.py refuses other splits by it
    assert before != fingerprint_of(train=[one, two], validation=[three])
