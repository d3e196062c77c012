"""Resizing rules: the pixels of every known image processor by Pillow alone, and a refusal of the others."""

import json

import numpy as np
import pytest
from conftest import draw
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    ViTImageProcessor,
)

from luthier.errors import UserError
from luthier.images.resizing import ResizeRule, find_rule
from luthier.images.views import EvaluationView
from models import build_model, change_view

SMALL = {"shortest_edge": 40}
PROCESSORS = {
    "bit": BitImageProcessor(size=SMALL, crop_size={"height": 32, "width": 32}),
    "bit, padded": BitImageProcessor(size=SMALL, crop_size={"height": 64, "width": 64}),
    "clip": CLIPImageProcessor(size=SMALL, crop_size={"height": 32, "width": 32}),
    "convnext, cropped": ConvNextImageProcessor(size={"shortest_edge": 33}),
    "convnext, stretched": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "deit": DeiTImageProcessor(size={"height": 40, "width": 44}, crop_size={"height": 32, "width": 32}),
    "mobilenet": MobileNetV2ImageProcessor(size=SMALL, crop_size={"height": 32, "width": 32}),
    "mobilevit": MobileViTImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}),
    "vit": ViTImageProcessor(size={"height": 32, "width": 48}),
}
SIZES = ((33, 97), (97, 33), (64, 64), (41, 40), (500, 310))


@pytest.mark.parametrize("name", PROCESSORS)
def test_rule_gives_the_pixels_of_the_image_processor(name):
    view = EvaluationView(PROCESSORS[name])
    rule = find_rule(view)
    assert ResizeRule.read(json.loads(json.dumps(rule._asdict()))) == rule
    for size in SIZES:
        image = draw("red", sum(size), *size)
        expected = view.levels(view(image)).numpy().transpose(1, 2, 0).astype(int)
        found = rule.apply(image)[..., ::-1] if view.reversed else rule.apply(image)
        assert found.shape == expected.shape and found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("fit", ["own", "squeeze", "pad"])
def test_rule_of_a_timm_model_is_exact(fit):
    model, image_processor = build_model("efficientnet_lite0", {0: "a", 1: "b"})
    view = EvaluationView(change_view(model, image_processor, 65, fit))
    rule = find_rule(view)
    for size in SIZES:
        image = draw("blue", sum(size), *size)
        assert np.array_equal(rule.apply(image), view.levels(view(image)).numpy().transpose(1, 2, 0))


def test_image_processor_with_another_rule_is_refused():
    with pytest.raises(UserError, match="LevitImageProcessor does more with an image than resize, crop and pad it"):
        find_rule(EvaluationView(LevitImageProcessor()))

    class Odd(ViTImageProcessor):
        def to_dict(self):
            return {}

    with pytest.raises(UserError, match="Odd has settings that are not known here"):
        find_rule(EvaluationView(Odd(size={"height": 32, "width": 32})))


@pytest.mark.parametrize(
    "change", [{"fit": "other"}, {"filter": "cubic"}, {"size": [0, 3]}, {"to": 3}, {"fill": "no"}]
)
def test_damaged_rule_is_refused(change):
    values = ResizeRule("crop", (8, 8), (6, 6), "bicubic")._asdict()
    with pytest.raises((KeyError, TypeError, ValueError)):
        ResizeRule.read(values | change)


def test_view_is_measured_where_there_is_no_padding():
    """A small image is padded at the border, and a border says nothing of how levels become pixel values."""
    view = EvaluationView(BitImageProcessor(size=SMALL, crop_size={"height": 64, "width": 64}))
    assert (view.contrast > 0).all()
    assert view(Image.new("RGB", (40, 40), "white"))[:, 32, 32].tolist() == pytest.approx(view.values[:, -1].tolist())
