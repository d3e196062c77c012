"""The choice of the recipe, and the blend of two states of a model."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from luthier.errors import UserError
from luthier.reporting.console import rates_in_words
from luthier.training.arms import Arm
from luthier.training.layers import parameter_groups
from luthier.training.recipe import FROM_SCRATCH, RACED, RECIPES, blend, choose_recipes


def model_of(architecture: str) -> TimmWrapperForImageClassification:
    """Return a model without weights."""
    with torch.device("meta"):
        return TimmWrapperForImageClassification(TimmWrapperConfig(architecture=architecture, num_labels=3))


@pytest.fixture(scope="module")
def model():
    """A model whose head is one linear layer."""
    return model_of("resnet10t")


@pytest.fixture(scope="module")
def odd_model():
    """A model with two heads."""
    return model_of("levit_128s")


def test_recipes_are_raced_unless_one_is_asked_for(model, odd_model):
    assert [recipe.name for recipe in choose_recipes(None, "some/model", model)] == list(RACED)
    for name in RECIPES:
        assert choose_recipes(name, "some/model", model) == [RECIPES[name]]
    assert choose_recipes(None, "simple_cnn", model) == [FROM_SCRATCH]
    assert [recipe.name for recipe in choose_recipes(None, "odd/head", odd_model)] == ["full"]


def test_recipe_that_a_model_cannot_learn_by_is_refused(model, odd_model):
    with pytest.raises(UserError, match="--recipe head needs a pretrained backbone"):
        choose_recipes("head", "simple_cnn", model)
    for name in ("probe", "lp_ft", "full_from_probe"):
        with pytest.raises(UserError, match=r"one linear layer, which is not so in odd/head: use --recipe full"):
            choose_recipes(name, "odd/head", odd_model)


def test_backbone_without_batch_norm_learns_at_lower_rates():
    """Layer decay 0.75 over the twelve blocks and the stem of a vision transformer; the head's rate is the same."""
    vit = model_of("vit_tiny_patch16_224")
    for name, last in (("full", 5e-5), ("lp_ft", 7.5e-5)):
        (recipe,) = choose_recipes(name, "some/model", vit)
        assert recipe.learning_rate == RECIPES[name].learning_rate
        assert recipe.learning_rate * recipe.backbone_rate == pytest.approx(last)
    (full,) = choose_recipes("full", "some/model", vit)
    rates = {group["lr"] for group in parameter_groups(vit, 1.0, full.backbone_rate, full.layer_decay, 0.0)}
    assert max(rates) == 1.0 and min(rates) == pytest.approx(0.025 * 0.75**13)
    assert choose_recipes(None, "simple_cnn", vit) == [FROM_SCRATCH]


@pytest.mark.parametrize(("architecture", "lower"), [("volo_d1_224", True), ("resnet10t", False), ("vgg11", False)])
def test_what_most_normalisation_layers_are_decides_the_rates(architecture, lower):
    """VOLO has three BatchNorm layers in its stem; VGG has no normalisation."""
    (full,) = choose_recipes("full", "some/model", model_of(architecture))
    assert full.is_lowered == (full.backbone_rate < RECIPES["full"].backbone_rate) == lower


def test_checkpoint_of_other_rates_is_of_another_recipe():
    args = SimpleNamespace(learning_rate=2e-3, world_size=1, train_batch_size=16, gradient_accumulation_steps=1)
    shop, full = SimpleNamespace(seen="224 px", data="d", model_name="m"), RECIPES["full"]
    usual, lower = (
        Arm(recipe, shop, args, {"train": []}, (1,), None, None).origin.recipe
        for recipe in (full, full.without_batch_norm())
    )
    assert usual == "--recipe full from the model m" != lower


def test_rates_of_the_backbone_are_named():
    full = RECIPES["full"]
    assert rates_in_words(full, 2e-3) == "0.002 (last layer of the backbone 0.0002)"
    lower = rates_in_words(full.without_batch_norm(), 2e-3)
    assert lower == "0.002 (last layer of the backbone 5e-05, times 0.75 for each layer before it)"
    assert rates_in_words(RECIPES["head"].without_batch_norm(), 1e-2) == "0.01"


def test_learning_rate_and_epochs_of_the_user_replace_those_of_the_recipe(model):
    (chosen,) = choose_recipes("full", "some/model", model, learning_rate=0.5, num_train_epochs=7)
    assert chosen == RECIPES["full"]._replace(learning_rate=0.5, num_train_epochs=7, rate_is_given=True)
    assert RECIPES["full"].learning_rate != 0.5


def test_blend_interpolates_between_two_states():
    start = {"weight": torch.zeros(3), "steps": torch.tensor(1)}
    end = {"weight": torch.ones(3), "steps": torch.tensor(5)}
    assert torch.equal(blend(start, end, 0.0)["weight"], start["weight"])
    assert torch.equal(blend(start, end, 1.0)["weight"], end["weight"])
    diverged = {**end, "weight": torch.full((3,), torch.nan)}
    assert torch.equal(blend(start, diverged, 0.0)["weight"], start["weight"])
    assert blend(start, end, 0.5)["weight"].tolist() == [0.5] * 3 and blend(start, end, 0.5)["steps"] == 5


@pytest.mark.parametrize(
    ("images", "devices", "batch"),
    [
        *[(100, 1, 16), (3_199, 1, 16), (3_200, 1, 32), (1_000_000, 1, 32)],
        *[(3_199, 4, 4), (12_799, 4, 8), (12_800, 4, 32), (100, 5, 4), (100, 64, 1)],
    ],
)
def test_step_of_many_devices_has_as_many_images_as_that_of_one_where_an_epoch_is_short(images, devices, batch):
    assert RECIPES["full"].batch_of_device(images, devices) == batch
    assert RECIPES["lp_ft"].batch_of_device(images, devices) == (batch if images >= 3_200 else -(-32 // devices))
    assert RECIPES["full"]._replace(batch=5).batch_of_device(images, devices) == 5


def test_learning_rate_grows_with_the_square_root_of_the_batch_unless_it_is_given(model):
    recipe = RECIPES["full"]
    assert recipe.rate_of_batch(128) == pytest.approx(2 * recipe.learning_rate)
    assert recipe.rate_of_batch(32) == recipe.rate_of_batch(4) == recipe.learning_rate
    (chosen,) = choose_recipes("full", "some/model", model, learning_rate=0.5, batch=64)
    assert chosen.rate_of_batch(128) == 0.5 and chosen.batch == 64


def test_blend_is_on_the_device_of_the_trained_weights():
    start, end = {"weight": torch.zeros(3)}, {"weight": torch.ones(3, device="meta")}
    assert blend(start, end, 0.5)["weight"].device.type == "meta"
