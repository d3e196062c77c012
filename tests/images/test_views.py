"""The evaluation view and the augmentations: the pixels that `pipeline` sees, packed without loss, on one scale."""

import hashlib

import pytest
import torch
from conftest import draw, draw_folder, load
from PIL import Image as PILImage
from torch import nn
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    PPLCNetImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from data import evaluation_rows, prepare
from luthier.images.decode import decode_rgb
from luthier.images.views import AUGMENTATIONS, EvaluationView, Whole, training_transform
from models import build_model, change_view


@pytest.fixture(scope="module", params=["simple_cnn", "timm", "vit", "efficientnet_lite0"])
def saved_model(request, tmp_path_factory):
    """A model folder as train.py writes it, and its image processor."""
    name = request.param
    if name in ("timm", "vit"):
        name = str(request.getfixturevalue(f"{name}_checkpoint"))
    model, image_processor = build_model(name, {0: "blue", 1: "red"})
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    image_processor.to_json_file(folder / "preprocessor_config.json")
    return folder, image_processor


def test_evaluation_view_equals_that_of_pipeline_and_of_a_reloaded_processor(saved_model, tmp_path):
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
            pixel_values = rows[row]["pixel_values"]
            path = by_digest[digest]
            assert pixel_values.dtype == torch.float32 and list(rows[row]) == ["pixel_values"]
            whole = decode_rgb(path.read_bytes()).image
            if split == "train" and min(whole.size) > 2 * max(view.size):  # stored at a smaller size
                continue
            assert torch.equal(pixel_values, reloaded(whole))
            assert torch.equal(pixel_values, classify.preprocess(str(path))["pixel_values"][0])


def test_view_is_packed_without_loss(saved_model):
    view = EvaluationView(saved_model[1])
    pixel_values = view(draw("red", 3, width=90, height=70))
    packed = view.pack(pixel_values)
    assert len(packed) == pixel_values.numel()  # one byte per value, not four
    assert torch.equal(view.unpack(packed), pixel_values)
    off_scale = pixel_values + 0.001  # as if a processor did more than scale 8-bit values
    assert torch.equal(view.unpack(view.pack(off_scale)), off_scale)


@pytest.fixture
def timm_view(timm_checkpoint):
    return EvaluationView(build_model(str(timm_checkpoint), {0: "blue", 1: "red"})[1])


def test_no_augmentation_is_the_evaluation_view(timm_view):
    image = draw("red", 1)
    assert torch.equal(training_transform(timm_view, "none")(image), timm_view(image))


@pytest.mark.parametrize("augmentation", [name for name in AUGMENTATIONS if name != "none"])
def test_augmentation_varies_and_keeps_size_and_scale(timm_view, augmentation):
    image = draw("red", 1, width=200, height=150)
    transform = training_transform(timm_view, augmentation)
    levels = torch.stack([transform(image) for _ in range(24)])
    pixel_values = timm_view.scale(levels)
    assert levels.dtype == torch.uint8 and pixel_values.shape[1:] == timm_view(image).shape
    small = training_transform(timm_view, augmentation, size=(24, 16))(image)
    assert small.shape == ((3, 32, 32) if augmentation == "augmix" else (3, 24, 16))
    assert len({one.numpy().tobytes() for one in pixel_values}) > 12
    scaled = (pixel_values - timm_view.black[:, None, None]) / timm_view.contrast[:, None, None]
    assert scaled.min() >= -1e-5 and scaled.max() <= 1 + 1e-5
    # Red stays the strongest channel in most views: each channel has the scale of the evaluation view.
    assert (scaled.mean(dim=(2, 3)).argmax(dim=1) == 0).float().mean() > 0.6


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_channels_that_the_processor_reverses_are_reversed_in_training(augmentation):
    size = {"shortest_edge": 32}
    view = EvaluationView(MobileViTImageProcessor(size=size, crop_size={"height": 32, "width": 32}))
    transform, red = training_transform(view, augmentation), PILImage.new("RGB", (64, 48), (250, 10, 10))
    assert view.reversed and view(red)[2].mean() > 0.9
    seen = torch.stack([transform(red) for _ in range(16)]).float().mean(dim=(0, 2, 3))
    assert seen.argmax() == 2


def test_random_crops_are_those_that_pillow_gives(timm_view):
    image = draw("red", 1, width=200, height=150)
    size, bicubic = timm_view.size, v2.InterpolationMode.BICUBIC
    pillow = v2.Compose(
        [v2.RandomResizedCrop(size, (0.35, 1.0), interpolation=bicubic), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    transform = training_transform(timm_view, "flip_crop")
    for seed in range(20):
        torch.manual_seed(seed)
        theirs = pillow(image).int()
        torch.manual_seed(seed)
        difference = (transform(image).int() - theirs).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.3


def test_trivial_adds_an_operation_to_most_crops(timm_view):
    image, changed = draw("red", 1, width=200, height=150), 0
    for seed in range(20):
        seen = []
        for augmentation in ("flip_crop", "trivial"):
            torch.manual_seed(seed)
            seen.append(training_transform(timm_view, augmentation)(image))
        changed += not torch.equal(*seen)
    assert changed > 10, "some operations change nothing"


def test_scaled_levels_are_the_pixel_values_of_the_processor(timm_view):
    pixel_values = timm_view(draw("red", 1))
    torch.testing.assert_close(timm_view.scale(timm_view.levels(pixel_values)), pixel_values)
    batch = torch.stack([timm_view.levels(pixel_values)] * 2)
    assert torch.equal(timm_view.scale(batch)[1], timm_view.scale(batch[1]))


def shows_red(levels: torch.Tensor) -> bool:
    return bool(((levels[0] > 200) & (levels[2] < 60)).any())


@pytest.mark.parametrize("ends", ["cropped", "squeezed", "padded"])
def test_crops_of_elongated_images_reach_their_ends_where_the_view_shows_them(timm_checkpoint, ends):
    image = PILImage.new("RGB", (512, 64), (128, 128, 128))
    image.paste("red", (0, 0, 64, 64))
    if ends == "padded":
        model, processor = build_model(str(timm_checkpoint), {0: "blue", 1: "red"})
        processor = change_view(model, processor, 64, "pad")
    elif ends == "squeezed":
        processor = ViTImageProcessor(size={"height": 64, "width": 64})
    else:
        processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    view = EvaluationView(processor)
    assert view.ends == ends
    assert shows_red(view.levels(view(image))) == (ends != "cropped")
    transform = training_transform(view, "crop")
    torch.manual_seed(1)
    crops = [transform(image) for _ in range(30)]
    assert any(map(shows_red, crops)) == (ends != "cropped")
    assert {crop.shape for crop in crops} == {(3, *view.size)}
    if ends == "padded":
        bright = max(int(crop.max()) for crop in crops)
        assert bright == max(int(view.levels(view(image)).max()), *view.padding), "the border is that of the view"
        assert Whole(view)(torch.zeros(3, 10, 2000, dtype=torch.uint8)).shape == (3, 128, 128)


def test_images_that_are_not_elongated_are_cropped_as_they_are(timm_view):
    image, torch_crop = draw("red", 1, width=120, height=64), v2.InterpolationMode.BICUBIC
    squeezed = EvaluationView(ViTImageProcessor(size={"height": 32, "width": 32}))
    plain = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop((32, 32), (0.35, 1.0), interpolation=torch_crop)])
    for seed in range(3):
        torch.manual_seed(seed)
        expected = plain(image)
        torch.manual_seed(seed)
        assert torch.equal(training_transform(squeezed, "crop")(image), expected)


def test_border_of_training_has_the_colour_of_the_view(timm_checkpoint):
    model, processor = build_model(str(timm_checkpoint), {0: "blue", 1: "red"})
    view = EvaluationView(change_view(model, processor, 64, "pad"))
    padded = Whole(view)(torch.full((3, 10, 100), 255, dtype=torch.uint8))
    assert padded[:, 0, 0].tolist() == view.padding and len(set(view.padding)) == 3, "the mean of ImageNet"


@pytest.mark.parametrize("family", [DeiTImageProcessor, PerceiverImageProcessor, PPLCNetImageProcessor])
@pytest.mark.parametrize("side", [112, 448])
def test_crop_keeps_its_share_at_another_size(family, side):
    image = PILImage.new("RGB", (512, 512), "black")
    image.paste("white", (36, 36, 476, 476))  # the middle 448 px, which the processor shows, have a border of 6 px
    view = EvaluationView(change_view(nn.Identity(), family(), side))
    assert view.size == (side, side)
    share = (view.levels(view(image))[1] > 127).float().mean().sqrt().item()
    assert share == pytest.approx(440 / 448, abs=0.012)


def test_crop_that_is_not_used_stays_unused():
    assert EvaluationView(change_view(nn.Identity(), EfficientNetImageProcessor(), 128)).size == (128, 128)


def test_convnext_that_squeezes_does_so_at_smaller_sizes_too():
    view = EvaluationView(change_view(nn.Identity(), ConvNextImageProcessor(size={"shortest_edge": 384}), 224))
    assert view.size == (224, 224) and view.ends == "squeezed"


def test_convnext_crops_large_views_too():
    view = EvaluationView(change_view(nn.Identity(), ConvNextImageProcessor(size={"shortest_edge": 224}), 384))
    assert view.size == (384, 384) and view.ends == "cropped"
