"""BatchNorm in the convolutions: the same outputs and gradients, in the same parameters."""

import copy

import pytest
import torch
from torch import nn

from luthier.fusion import _stride_before_narrow_convolutions, fuse_for_training
from models import build_model

NAMES = {0: "blue", 1: "green", 2: "red"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built, _ = build_model("efficientnet_lite0", NAMES)
    return built


def gradients(model: nn.Module, side: int) -> dict[str, torch.Tensor]:
    """Return the gradients of all parameters by the loss of a batch in training."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(4, 3, side, side, generator=generator)
    model.train().zero_grad()
    model(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("side", [64, 95])  # another than the one that it was checked with: the padding differs
def test_fused_model_has_the_same_gradients_in_the_same_parameters(model, side):
    fused = fuse_for_training(model, (64, 64))
    assert "forward" in vars(fused.timm_model.conv_stem), "it is not fused"
    assert fused.state_dict().keys() == model.state_dict().keys()
    expected, found = gradients(model, side), gradients(fused, side)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 5e-3 * gradient.norm() + 1e-6, name


def test_copy_of_a_fused_model_is_independent(model):
    fused = fuse_for_training(model, (64, 64))
    twin, pixel_values = copy.deepcopy(fused).eval(), torch.randn(1, 3, 64, 64)
    before = twin(pixel_values).logits
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(twin(pixel_values).logits, before)


def test_narrow_convolutions_that_skip_pixels_are_given_the_others_alone():
    """Their backward pass in torch 2.14 writes beyond its memory."""
    layers = nn.ModuleList(nn.Conv2d(channels, 4, side, stride=2) for channels, side in ((3, 1), (16, 1), (3, 3)))
    inputs = [torch.randn(2, layer.in_channels, 9, 9) for layer in layers]
    expected = [layer(features) for layer, features in zip(layers, inputs, strict=True)]
    _stride_before_narrow_convolutions(layers)
    assert [layer.stride for layer in layers] == [(1, 1), (2, 2), (2, 2)]
    for layer, features, output in zip(copy.deepcopy(layers), inputs, expected, strict=True):
        torch.testing.assert_close(layer(features), output)


def test_model_is_fused_where_tf32_is_switched_off(model, monkeypatch):
    """`--tf32 False` sets this; torch then refuses to tell the old `cudnn.allow_tf32`."""
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")
    before = torch.backends.cudnn.enabled
    fused = fuse_for_training(model, (64, 64))
    assert "forward" in vars(fused.timm_model.conv_stem), "it is not fused"
    assert torch.backends.cudnn.enabled == before


def test_model_without_batchnorm_is_left_alone():
    cnn, _ = build_model("simple_cnn", NAMES)
    assert fuse_for_training(cnn, (32, 32)) is cnn


class Shared(nn.Module):
    """A convolution whose output is used twice, so that its BatchNorm cannot be a part of it."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.weight)

    def forward(self, pixel_values):
        features = self.convolution(pixel_values)
        self.logits = (self.norm(features) + features).mean(dim=(2, 3))
        return self


def test_shared_convolution_is_not_fused():
    shared = Shared()
    assert fuse_for_training(shared, (8, 8)) is shared
