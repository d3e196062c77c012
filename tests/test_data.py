"""data.py: loading folders and datasets, splitting, preparing and augmenting images, and errors in the data."""

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, draw, draw_folder, encoded, labels_of, load
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import default_collate

import data
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


def test_large_image_is_stored_smaller_and_looks_the_same(tmp_path, view):
    smooth = draw("red", 1, 8, 6).resize((2000, 1500), PILImage.Resampling.BICUBIC)
    data = encoded(smooth, tmp_path, "jpg", quality=95)
    stored = PILImage.open(io.BytesIO(store_training_image(data, 64)["bytes"]))
    assert stored.format == "JPEG" and min(stored.size) == 64 and stored.mode == "RGB"
    difference = view(stored).sub(view(decode_rgb(data).image)).abs() * 127.5  # in 8-bit levels
    assert difference.mean() < 1.5 and difference.max() < 12


@pytest.mark.parametrize("side", [128, 256, 512, 513])
def test_photograph_that_is_decoded_at_just_the_stored_size_is_not_stored_whole(side):
    file = io.BytesIO()
    draw("red", 1, side, side).save(file, "JPEG", quality=90)
    stored = store_training_image(file.getvalue(), 64)["bytes"]
    assert PILImage.open(io.BytesIO(stored)).size == (64, 64)


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
    assert "classes whose names differ in capitals or spaces alone: 'Red', 'red'" in capsys.readouterr().out
    (tmp_path / "Red").rename(tmp_path / "blue ")
    load_splits(data_dir=str(tmp_path))
    assert "capitals or spaces alone: 'blue', 'blue '" in capsys.readouterr().out


def test_pages_of_a_tiff_after_the_first_are_not_lost_in_silence(tmp_path, caplog):
    draw_folder(tmp_path, 4)
    pages, preview = [draw("red", 90 + page) for page in range(3)], draw("red", 95, 12, 10)
    pages[0].save(tmp_path / "red/layers.tif", save_all=True, append_images=pages[1:])
    draw("red", 96).save(tmp_path / "red/scan.tif", save_all=True, append_images=[preview])
    masked, mask = draw("red", 97), draw("red", 98).convert("L")
    masked.save(tmp_path / "red/masked.tif", save_all=True, append_images=[mask], tiffinfo={254: 4})
    for _ in range(2):  # of a cached inspection too
        caplog.clear()
        load_splits(data_dir=str(tmp_path))
        assert "1 TIFF of train with several pages, such as red/layers.tif: the first page alone" in caplog.text


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


def test_what_a_file_says_of_itself_is_not_stored():
    turned, file = PILImage.Exif(), io.BytesIO()
    turned[0x0112] = 6
    profile = np.random.default_rng(0).bytes(1_800_000)  # a JPEG may have so large a one, a PNG may not
    PILImage.new("RGB", (300, 200)).save(file, "JPEG", icc_profile=profile, exif=turned)
    stored = store_training_image(file.getvalue(), 512)
    assert Image().decode_example(stored).size == (200, 300) and len(stored["bytes"]) < 10_000
    file = io.BytesIO()
    PILImage.new("P", (900, 900)).save(file, "GIF", comment=b"x" * 70_000)  # a JPEG may not have so long a one
    assert Image().decode_example(store_training_image(file.getvalue(), 512)).size == (512, 512)


def test_configuration_is_for_a_dataset_of_the_hub(tmp_path):
    for data_dir in (None, str(draw_folder(tmp_path / "images", 4))):
        with pytest.raises(UserError, match="--dataset_config_name is for a dataset on the Hub"):
            load(data_dir=data_dir, dataset_config_name="v2")


def test_image_that_is_longer_than_a_jpeg_can_be_is_stored(tmp_path):
    """Otherwise one such image would end the run, whatever --on_bad_image says."""
    data = encoded(PILImage.new("RGB", (70_000, 141), "red"), tmp_path, "png")
    assert PILImage.open(io.BytesIO(store_training_image(data, 140)["bytes"])).size == (65_500, 132)


def test_stored_views_depend_on_the_version_of_timm(monkeypatch, timm_checkpoint):
    """Its code resizes and crops for the models of timm."""
    view = EvaluationView(build_model(str(timm_checkpoint), {0: "blue", 1: "red"})[1])
    found = []
    monkeypatch.setattr(data, "library_versions", lambda *names: found.extend(names) or [])
    data._view_key(view)
    assert {"timm", "pi-heif"} <= set(found)  # the second decodes HEIC


def test_key_can_be_made_without_a_package_that_few_images_need():
    assert data.library_versions("no-such-package") == "no-such-package None"
