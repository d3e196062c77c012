"""Loading, splitting, preparing and augmenting drawn pictures: every way in, every trap, every Pillow mode."""

import hashlib
import io
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, draw, draw_folder
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageCms
from transformers import AutoImageProcessor, MobileViTImageProcessor, pipeline

import data
import inspection
from data import collate, describe, evaluation_rows, load_splits, prepare, store_training_picture, with_views
from images import decode_rgb
from models import build_model
from views import AUGMENTATIONS, EvaluationView, training_view


def load(**options) -> DatasetDict:
    return load_splits(**options)[0]


def labels_of(splits: DatasetDict) -> list[str]:
    return splits["train"].features["label"].names


def digests(splits: DatasetDict) -> dict[str, list[str]]:
    return {split: dataset["digest"][:] for split, dataset in splits.items()}


# --- folders


def test_folder_is_cut_stratified_and_disjoint(pictures, view):
    splits = prepare(load(data_dir=str(pictures)), view)
    counts = describe(splits)["splits"]
    assert labels_of(splits) == ["blue", "green", "red"]
    assert {split: set(count["per_class"].values()) for split, count in counts.items()} == {
        "train": {5}, "validation": {1}, "test": {2},
    }  # fmt: skip
    everything = [digest for split in digests(splits).values() for digest in split]
    assert len(set(everything)) == len(everything) == 24


def test_labels_follow_the_folders(pictures, view):
    splits = with_views(prepare(load(data_dir=str(pictures)), view), view, "none", "evaluation")
    for dataset in splits.values():
        for row in dataset:
            mean = (row["pixel_values"].mean(dim=(1, 2)) + 1).numpy() * 127.5
            nearest = min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
            assert nearest == dataset.features["label"].int2str(row["labels"])


def test_split_seed_decides_the_cut_alone(pictures, view):
    def cut(**options):
        torch.manual_seed(options.pop("training_seed", 0))
        np.random.seed(0)
        return digests(prepare(load(data_dir=str(pictures), **options), view))

    assert cut() == cut(split_seed=1) == cut(training_seed=5)
    assert cut(split_seed=2) != cut()


def test_fractions(tmp_path):
    splits = load(data_dir=str(draw_folder(tmp_path / "p", 20)), validation_fraction=0.25, test_fraction=0.5)
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 15, "validation": 15, "test": 30}


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "Val"])
def test_given_splits_are_kept(tmp_path, name):
    for number, split in enumerate(("train", name, "test")):
        draw_folder(tmp_path / "p" / split, 3 + number, first=100 * number)
    splits = load(data_dir=str(tmp_path / "p"))
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 9, "validation": 12, "test": 15}


def test_missing_test_split_is_cut_from_train(tmp_path):
    draw_folder(tmp_path / "p/train", 10)
    draw_folder(tmp_path / "p/val", 2, first=50)
    splits = load(data_dir=str(tmp_path / "p"))
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 24, "validation": 6, "test": 6}


def test_class_keeps_its_number_where_a_split_lacks_another(tmp_path):
    draw_folder(tmp_path / "p/train", 3)
    draw_folder(tmp_path / "p/val", 2, first=20)
    draw_folder(tmp_path / "p/test", 2, classes=("red",), first=40)
    (tmp_path / "p/test/blue").mkdir()
    splits = load(data_dir=str(tmp_path / "p"))
    assert splits["test"].features["label"].names == ["blue", "green", "red"]
    assert set(splits["test"]["label"][:]) == {2}


def test_folder_names_that_imagefolder_trips_over(tmp_path):
    for number, name in enumerate(("freight train", "test tubes", "Çalgı")):
        (tmp_path / name / "deep/er").mkdir(parents=True)
        for seed in range(4):
            draw("red", 10 * number + seed).save(tmp_path / name / ("deep/er" if seed else "") / f"{seed}.png")
    splits = load(data_dir=str(tmp_path))
    assert labels_of(splits) == ["freight train", "test tubes", "Çalgı"]
    assert sum(len(dataset) for dataset in splits.values()) == 12


def test_other_files_are_named_and_hidden_ones_are_not(pictures, caplog):
    (pictures / "red/notes.txt").write_text("no picture")
    (pictures / "drawing.eps").write_text("%!PS")
    (pictures / "red/.DS_Store").write_text("")
    (pictures / ".git").mkdir()
    with caplog.at_level(logging.WARNING):
        splits = load(data_dir=str(pictures))
    assert sum(len(dataset) for dataset in splits.values()) == 24
    assert "2 files" in caplog.text and "notes.txt" in caplog.text and ".DS_Store" not in caplog.text


def test_changed_file_is_prepared_again(pictures, view):
    before = describe(prepare(load(data_dir=str(pictures)), view))["fingerprint"]
    assert describe(prepare(load(data_dir=str(pictures)), view))["fingerprint"] == before
    draw("red", 999).save(pictures / "red/000.png")
    assert describe(prepare(load(data_dir=str(pictures)), view))["fingerprint"] != before


def test_second_run_decodes_nothing(pictures, monkeypatch, view):
    prepare(load(data_dir=str(pictures)), view)
    for module in (data, inspection):
        monkeypatch.setattr(module, "decode_rgb", lambda *arguments: pytest.fail("decoded again"))
    assert len(prepare(load(data_dir=str(pictures)), view)["train"]) == 15


def empty_class(root: Path) -> None:
    draw_folder(root)
    (root / "violet").mkdir()


def splits_without_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split).mkdir()
        draw("red", 1).save(root / split / "1.png")


def test_classes_that_are_called_like_splits(tmp_path):
    for number, name in enumerate(("bus", "test", "train")):
        (tmp_path / name).mkdir()
        for seed in range(4):
            draw("red", 10 * number + seed).save(tmp_path / name / f"{seed}.png")
    assert labels_of(load(data_dir=str(tmp_path))) == ["bus", "test", "train"]


def splits_and_more(root: Path) -> None:
    draw_folder(root / "train")
    draw_folder(root / "test")
    draw_folder(root / "scratch")


def empty_split(root: Path) -> None:
    draw_folder(root / "train")
    (root / "test/red").mkdir(parents=True)


def test_class_missing_from_train(tmp_path):
    draw_folder(tmp_path / "p/train", 4, classes=("red", "blue"))
    draw_folder(tmp_path / "p/test", 2)
    with pytest.raises(ValueError, match="no training picture has the class 'green'"):
        load(data_dir=str(tmp_path / "p"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "no pictures in class folders"),
        (empty_class, "violet has no pictures: fill it or remove it"),
        (splits_without_classes, "no class folders in them"),
        (lambda root: draw_folder(root, classes=("red",)), "the one class 'red'"),
        (lambda root: draw_folder(root, 2), "'blue' has 2 pictures, too few"),
        (empty_split, "test has no pictures: fill it, or remove it"),
        (splits_and_more, "holds the splits test, train and beside them scratch"),
        (lambda root: [draw_folder(root / s) for s in ("train", "val", "dev")], "two folders for one split"),
    ],
)
def test_unusable_folder(tmp_path, build, message):
    build(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(data_dir=str(tmp_path))


def test_file_name_that_is_no_text(pictures):
    Path(os.fsdecode(os.fsencode(pictures / "red") + b"/\xff.png")).touch()
    with pytest.raises(ValueError, match=r"xff.png' is not valid UTF-8: rename the file"):
        load(data_dir=str(pictures))


def test_link_that_leads_nowhere(pictures):
    (pictures / "red/gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"gone.png cannot be read: .*Replace or remove it"):
        load(data_dir=str(pictures))


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder"):
        load(data_dir=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("fractions", [{"test_fraction": 0}, {"validation_fraction": 1.5}])
def test_impossible_fraction(pictures, fractions):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        load(data_dir=str(pictures), **fractions)


def test_fractions_that_leave_nothing(pictures):
    with pytest.raises(ValueError, match="leave nothing to train on"):
        load(data_dir=str(pictures), validation_fraction=0.5, test_fraction=0.5)


# --- datasets


def save_dataset(folder: Path, label_feature, values: dict[str, list], columns=("image", "label")) -> str:
    """Save drawn pictures as the Parquet files of a Hub dataset, with the label values given for each split."""
    (folder / "data").mkdir(parents=True)
    for split, labels in values.items():
        images = [draw("red", index) for index in range(len(labels))]
        features = Features({columns[0]: Image(), columns[1]: label_feature})
        dataset = Dataset.from_dict({columns[0]: images, columns[1]: labels}, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (ClassLabel(names=["zither", "banjo"]), [0, 1], ["banjo", "zither"]),
        (Value("string"), ["zither", "banjo"], ["banjo", "zither"]),
        (Value("int64"), [10, 9], ["9", "10"]),
    ],
)
def test_dataset_with_labels_of_any_kind(tmp_path, feature, values, names):
    path = save_dataset(tmp_path / "set", feature, {"train": values * 10, "test": values * 2}, ("picture", "class"))
    splits = load(dataset_name=path)
    assert labels_of(splits) == names
    assert {split: len(dataset) for split, dataset in splits.items()} == {"train": 18, "validation": 2, "test": 4}
    assert splits["test"]["label"][:] == [1, 0, 1, 0]  # zither and 10 sort after the other


def test_named_columns(tmp_path, view):
    features = Features({"photo": Image(), "thumbnail": Image(), "kind": Value("string"), "label": Value("string")})
    rows = {"photo": [draw("red", i) for i in range(20)], "thumbnail": [draw("blue", i) for i in range(20)]}
    rows |= {"kind": ["a", "b"] * 10, "label": ["c", "d"] * 10}
    (tmp_path / "set").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    path = str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"photo or thumbnail could be the image column: name it with --image_column"):
        load(dataset_name=path)
    assert labels_of(load(dataset_name=path, image_column="photo")) == ["c", "d"]
    splits = prepare(load(dataset_name=path, image_column="photo", label_column="kind"), view)
    assert labels_of(splits) == ["a", "b"]
    assert np.asarray(splits["train"][0]["image"])[..., 0].mean() > 150
    with pytest.raises(ValueError, match="no column 'nothing'"):
        load(dataset_name=path, image_column="nothing")
    with pytest.raises(ValueError, match="holds no images"):
        load(dataset_name=path, image_column="kind")


def test_image_column_without_its_type(tmp_path, pictures, view):
    raw = [path.read_bytes() for path in sorted(pictures.rglob("*.png"))]
    names = [path.parent.name for path in sorted(pictures.rglob("*.png"))]
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"picture": raw, "label": names}).to_parquet(tmp_path / "set/train.parquet")
    splits = prepare(load(dataset_name=str(tmp_path / "set"), image_column="picture"), view)
    folder = prepare(load(data_dir=str(pictures)), view)
    assert describe(splits)["fingerprint"] == describe(folder)["fingerprint"]


def test_single_split_is_the_training_split_whatever_its_name(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"test": ["a", "b"] * 10})
    assert len(load(dataset_name=path)["train"]) == 14


def test_test_split_without_labels_is_replaced(tmp_path):
    names = ClassLabel(names=["a", "b"])
    path = save_dataset(tmp_path / "set", names, {"train": [0, 1] * 10, "test": [-1, -1]})
    assert len(load(dataset_name=path)["test"]) == 4


def test_some_rows_without_label(tmp_path):
    path = save_dataset(tmp_path / "set", Value("string"), {"train": ["a", "b", None] * 10})
    with pytest.raises(ValueError, match="10 rows of the train split have no label"):
        load(dataset_name=path)


def test_label_names_rename_in_order(pictures):
    assert labels_of(load(data_dir=str(pictures), label_names=["mavi", "yeşil", "kırmızı"])) == [
        "mavi", "yeşil", "kırmızı",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="label_names has 2 names, but the data has 3 classes: blue, green, red"):
        load(data_dir=str(pictures), label_names=["a", "b"])
    with pytest.raises(ValueError, match="'a' twice"):
        load(data_dir=str(pictures), label_names=["a", "b", "a"])


def test_unreachable_dataset():
    with pytest.raises(ValueError, match=r"someone/their-set.*--data_dir"):
        load(dataset_name="someone/their-set")


# --- preparation


def encoded(image: PILImage.Image, tmp_path: Path, suffix: str = "png", **options) -> bytes:
    path = tmp_path / f"picture.{suffix}"
    image.save(path, **options)
    return path.read_bytes()


def lab_red() -> PILImage.Image:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(PILImage.new("RGB", (8, 8), (200, 40, 40)), srgb, lab, outputMode="LAB")


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (PILImage.new("RGB", (8, 8), (200, 40, 40)), "png", (200, 40, 40)),
        (PILImage.new("RGB", (8, 8), (200, 40, 40)).quantize(4), "png", (200, 40, 40)),
        (PILImage.new("1", (8, 8), 1), "png", (255, 255, 255)),
        (PILImage.new("L", (8, 8), 77), "png", (77, 77, 77)),
        (PILImage.new("LA", (8, 8), (0, 0)), "png", (255, 255, 255)),
        (PILImage.new("RGBA", (8, 8), (200, 40, 40, 0)), "png", (255, 255, 255)),
        (PILImage.new("RGBA", (8, 8), (0, 0, 0, 128)), "png", (127, 127, 127)),
        (PILImage.new("RGBA", (8, 8), (200, 40, 40, 0)), "webp", (255, 255, 255)),
        (PILImage.fromarray(np.full((8, 8), 0x8000, np.uint16)), "png", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 0x8000, np.int32)), "tiff", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 0.5, np.float32)), "tiff", (128, 128, 128)),
        (PILImage.fromarray(np.full((8, 8), 128, np.float32)), "tiff", (128, 128, 128)),
        (PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "jpg", (254, 0, 0)),
        (PILImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "tiff", (255, 0, 0)),
        (PILImage.new("YCbCr", (8, 8), (128, 128, 128)), "jpg", (128, 128, 128)),
        (lab_red(), "tiff", (200, 40, 40)),
    ],
    ids=lambda value: value.mode if isinstance(value, PILImage.Image) else None,
)
def test_every_mode_becomes_the_right_rgb(tmp_path, image, suffix, expected):
    decoded = decode_rgb(encoded(image, tmp_path, suffix)).image
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - expected).max() <= 2


def test_palette_with_transparency(tmp_path):
    image = PILImage.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 40, 40])
    decoded, changed, *_ = decode_rgb(encoded(image, tmp_path, transparency=1))
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and changed


def test_exif_orientation_is_applied(tmp_path):
    image = PILImage.new("RGB", (20, 10), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # turned a quarter
    decoded, changed, *_ = decode_rgb(encoded(image, tmp_path, "jpg", exif=exif))
    assert decoded.size == (10, 20) and changed


def test_animation_gives_its_first_frame(tmp_path):
    frames = [PILImage.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    decoded = decode_rgb(encoded(frames[0], tmp_path, "gif", save_all=True, append_images=frames[1:])).image
    assert decoded.getpixel((0, 0)) == (255, 0, 0)


def test_plain_rgb_keeps_its_bytes_and_the_rest_its_pixels(pictures, view):
    draw("red", 5).save(pictures / "red/photo.jpg")
    draw("red", 6).convert("L").save(pictures / "red/grey.png")
    train = prepare(load(data_dir=str(pictures)), view)["train"].cast_column("image", Image(decode=False))
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in pictures.rglob("*.*")}
    for row in train:
        path = by_digest[row["digest"]]
        if path.name == "grey.png":
            stored = np.asarray(PILImage.open(io.BytesIO(row["image"]["bytes"])))
            assert np.array_equal(stored, np.asarray(PILImage.open(path).convert("RGB")))
        else:
            assert row["image"]["bytes"] == path.read_bytes()


def spoil(pictures: Path) -> list[str]:
    """Add four files that cannot be read; return what is said of them."""
    whole = (pictures / "red/000.png").read_bytes()
    (pictures / "red/cut.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "red/empty.jpg").write_bytes(b"")
    (pictures / "blue/page.jpg").write_text("<html>not found</html>")
    (pictures / "blue/script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return ["cut.png", "empty.jpg: the file is empty", "page.jpg: not a picture", "script.png: not a picture"]


@pytest.mark.parametrize("options", [{}, {"on_bad_image": "error"}])
def test_unreadable_pictures_are_all_named(pictures, options):
    said = spoil(pictures)
    with pytest.raises(ValueError, match="pictures that cannot be read: 4 of 28") as caught:
        load(data_dir=str(pictures), **options)
    assert all(name in str(caught.value) for name in said)
    assert ("more than 5%" in str(caught.value)) == (not options)


def test_few_unreadable_pictures_are_left_out_and_returned(tmp_path, view):
    pictures = draw_folder(tmp_path / "p", 40)
    spoil(pictures)
    splits, bad = load_splits(data_dir=str(pictures))
    assert sum(map(len, splits.values())) == 120 == sum(map(len, prepare(splits, view).values()))
    assert {(b.name, b.label) for b in bad} == {
        ("red/cut.png", "red"), ("red/empty.jpg", "red"), ("blue/page.jpg", "blue"), ("blue/script.png", "blue"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot be read: 4 of 124\. Replace"):
        load(data_dir=str(pictures), on_bad_image="error")


def test_split_of_bad_pictures_alone_is_said_so(tmp_path):
    draw_folder(tmp_path / "p/train", 40)
    (tmp_path / "p/test/red").mkdir(parents=True)
    (tmp_path / "p/test/red/a.png").write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"1 of 121, all of the test split\. Replace or remove them:\n  test: test/red/a"
    ):
        load(data_dir=str(tmp_path / "p"))


def test_failure_is_not_cached(pictures, monkeypatch, view):
    def fail(*arguments):
        raise OSError(5, "the disk is away")

    for module, message in ((inspection, "cannot be opened: the disk is away"), (data, "cannot be read now")):
        monkeypatch.setattr(module, "decode_rgb", fail)
        with pytest.raises(ValueError, match=message):
            prepare(load(data_dir=str(pictures)), view)
        monkeypatch.undo()
    assert len(prepare(load(data_dir=str(pictures)), view)["train"]) == 15


def test_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(PILImage.DecompressionBombError):
        decode_rgb(encoded(PILImage.new("RGB", (8, 8)), tmp_path))


# --- views


@pytest.fixture(scope="module", params=["simple_cnn", "timm", "vit", "efficientnet_lite0"])
def saved_model(request, tmp_path_factory):
    """A model folder as train.py writes it, and the image processor it was written with."""
    name = request.param
    if name in ("timm", "vit"):
        name = str(request.getfixturevalue(f"{name}_checkpoint"))
    model, image_processor = build_model(name, {0: "blue", 1: "red"})
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    image_processor.to_json_file(folder / "preprocessor_config.json")
    return folder, image_processor


def test_evaluation_sees_what_pipeline_and_a_reloaded_processor_see(saved_model, tmp_path):
    folder, image_processor = saved_model
    draw_folder(tmp_path / "p", 3, classes=("red", "blue"))
    picture = draw("red", 77, width=300, height=220)
    exif = picture.getexif()
    exif[0x0112] = 8
    picture.save(tmp_path / "p/red/sideways.jpg", exif=exif)
    draw("blue", 78, width=700, height=900).save(tmp_path / "p/blue/large.jpg")
    view = EvaluationView(image_processor)
    splits = prepare(load(data_dir=str(tmp_path / "p"), validation_fraction=0.3, test_fraction=0.3), view)
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True)
    reloaded = EvaluationView(AutoImageProcessor.from_pretrained(folder))
    by_digest = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in (tmp_path / "p").rglob("*.*")}
    for split, dataset in splits.items():
        rows = evaluation_rows(dataset, view)
        for row, digest in enumerate(dataset["digest"][:]):
            seen = rows[row]["pixel_values"]
            path = by_digest[digest]
            assert seen.dtype == torch.float32 and list(rows[row]) == ["pixel_values"]
            if split == "train" and path.name == "large.jpg":  # stored small
                continue
            assert torch.equal(seen, reloaded(decode_rgb(path.read_bytes()).image))
            assert torch.equal(seen, classify.preprocess(str(path))["pixel_values"][0])


def test_view_is_packed_without_loss(saved_model):
    view = EvaluationView(saved_model[1])
    seen = view(draw("red", 3, width=90, height=70))
    packed = view.pack(seen)
    assert len(packed) == seen.numel()  # a byte a value, not four
    assert torch.equal(view.unpack(packed), seen)
    odd = seen + 0.001  # of a processor that does more than to scale 8-bit levels
    assert torch.equal(view.unpack(view.pack(odd)), odd)


def test_large_photograph_is_stored_small_and_looks_the_same(tmp_path, view):
    smooth = draw("red", 1, 8, 6).resize((2000, 1500), PILImage.Resampling.BICUBIC)
    data = encoded(smooth, tmp_path, "jpg", quality=95)
    stored = PILImage.open(io.BytesIO(store_training_picture(data, 64)["bytes"]))
    assert stored.format == "JPEG" and min(stored.size) == 64 and stored.mode == "RGB"
    difference = view(stored).sub(view(decode_rgb(data).image)).abs() * 127.5  # in levels of 255
    assert difference.mean() < 1.5 and difference.max() < 12


def test_elongated_and_tiny_pictures_are_stored(tmp_path):
    for size, stored_size in (((3000, 10), (3000, 10)), ((4000, 100), (2560, 64)), ((1, 1), (1, 1))):
        data = encoded(PILImage.new("RGB", size, "red"), tmp_path, "jpg")
        assert PILImage.open(io.BytesIO(store_training_picture(data, 64)["bytes"])).size == stored_size


@pytest.fixture
def timm_view(timm_checkpoint):
    return EvaluationView(build_model(str(timm_checkpoint), {0: "blue", 1: "red"})[1])


def test_no_augmentation_is_the_evaluation_view(timm_view):
    picture = draw("red", 1)
    assert torch.equal(training_view(timm_view, "none")(picture), timm_view(picture))


@pytest.mark.parametrize("augmentation", [name for name in AUGMENTATIONS if name != "none"])
def test_augmentation_varies_and_keeps_size_and_scale(timm_view, augmentation):
    picture = draw("red", 1, width=200, height=150)
    see = training_view(timm_view, augmentation)
    seen = torch.stack([see(picture) for _ in range(24)])
    assert seen.shape[1:] == timm_view(picture).shape
    assert len({one.numpy().tobytes() for one in seen}) > 12
    unit = (seen - timm_view.black[:, None, None]) / timm_view.contrast[:, None, None]
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5
    # Red stays the strongest channel of most views: the scale is the evaluation's, channel by channel.
    assert (unit.mean(dim=(2, 3)).argmax(dim=1) == 0).float().mean() > 0.6


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_channels_that_the_processor_turns_round_are_turned_round_in_training(augmentation):
    size = {"shortest_edge": 32}
    view = EvaluationView(MobileViTImageProcessor(size=size, crop_size={"height": 32, "width": 32}))
    see, red = training_view(view, augmentation), PILImage.new("RGB", (64, 48), (250, 10, 10))
    assert view.reversed and view(red)[2].mean() > 0.9
    seen = torch.stack([see(red) for _ in range(16)]).mean(dim=(0, 2, 3))
    assert seen.argmax() == 2


def test_augmented_dataset_is_lazy_and_collates(pictures, view):
    train = with_views(prepare(load(data_dir=str(pictures)), view), view, "flip_crop", "evaluation")["train"]
    assert not torch.equal(train[0]["pixel_values"], train[0]["pixel_values"])
    batch = collate([train[0], train[14]])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 2] and batch["labels"].dtype == torch.int64


def test_random_crops_of_test_are_asked_for_and_leave_validation_alone(pictures, view):
    splits = prepare(load(data_dir=str(pictures)), view)
    views = with_views(splits, view, "none", "random_crop")
    assert len({views["test"][0]["pixel_values"].numpy().tobytes() for _ in range(12)}) > 6
    assert torch.equal(views["validation"][0]["pixel_values"], view.unpack(splits["validation"][0]["view"]))
    assert views["test"][0]["pixel_values"].shape == (3, 32, 32)
    mean = (views["test"][0]["pixel_values"].mean(dim=(1, 2)) + 1).numpy() * 127.5
    assert np.abs(mean - COLOURS["blue"]).max() < 12


def test_fingerprint_ignores_names_and_sees_labels(pictures, tmp_path, view):
    def fingerprint(folder: Path) -> str:
        return describe(prepare(load(data_dir=str(folder)), view))["fingerprint"]

    before = fingerprint(pictures)
    shutil.copytree(pictures, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == before
    (tmp_path / "copy/red/000.png").rename(tmp_path / "copy/blue/moved.png")
    assert fingerprint(tmp_path / "copy") != before
