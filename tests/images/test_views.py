"""How a model sees an image: as pipeline does, packed without loss, augmented on the same scale."""

import hashlib

import pytest
import torch
from conftest import draw, draw_folder, load
from PIL import Image as PILImage
from transformers import AutoImageProcessor, MobileViTImageProcessor, pipeline

from data import evaluation_rows, prepare
from luthier.images.decode import decode_rgb
from luthier.images.views import AUGMENTATIONS, EvaluationView, training_transform
from models import build_model


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
    image = draw("red", 77, width=300, height=220)
    exif = image.getexif()
    exif[0x0112] = 8
    image.save(tmp_path / "p/red/sideways.jpg", exif=exif)
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


@pytest.fixture
def timm_view(timm_checkpoint):
    return EvaluationView(build_model(str(timm_checkpoint), {0: "blue", 1: "red"})[1])


def test_no_augmentation_is_the_evaluation_view(timm_view):
    image = draw("red", 1)
    assert torch.equal(training_transform(timm_view, "none")(image), timm_view(image))


@pytest.mark.parametrize("augmentation", [name for name in AUGMENTATIONS if name != "none"])
def test_augmentation_varies_and_keeps_size_and_scale(timm_view, augmentation):
    image = draw("red", 1, width=200, height=150)
    see = training_transform(timm_view, augmentation)
    seen = torch.stack([see(image) for _ in range(24)])
    assert seen.shape[1:] == timm_view(image).shape
    assert len({one.numpy().tobytes() for one in seen}) > 12
    unit = (seen - timm_view.black[:, None, None]) / timm_view.contrast[:, None, None]
    assert unit.min() >= -1e-5 and unit.max() <= 1 + 1e-5
    # Red stays the strongest channel of most views: the scale is the evaluation's, channel by channel.
    assert (unit.mean(dim=(2, 3)).argmax(dim=1) == 0).float().mean() > 0.6


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_channels_that_the_processor_turns_round_are_turned_round_in_training(augmentation):
    size = {"shortest_edge": 32}
    view = EvaluationView(MobileViTImageProcessor(size=size, crop_size={"height": 32, "width": 32}))
    see, red = training_transform(view, augmentation), PILImage.new("RGB", (64, 48), (250, 10, 10))
    assert view.reversed and view(red)[2].mean() > 0.9
    seen = torch.stack([see(red) for _ in range(16)]).mean(dim=(0, 2, 3))
    assert seen.argmax() == 2
