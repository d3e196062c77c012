"""The choice of the recipe, and the blend of two states of a model."""

import pytest
import torch

from luthier.errors import UserError
from luthier.training.recipe import FROM_SCRATCH, RECIPES, blend, settle_recipe


@pytest.mark.parametrize(
    ("parameters", "images", "expected"),
    [(3_400_000, 883, "lp_ft"), (86_000_000, 100_000, "lp_ft"), (3_400_000, 100_000, "full")],
)
def test_few_images_for_many_parameters_start_from_the_probe(parameters, images, expected):
    assert settle_recipe(None, "some/model", True, parameters, images).name == expected


def test_requested_recipe_is_used_or_refused():
    for name in RECIPES:
        assert settle_recipe(name, "some/model", True, 10, 10) == RECIPES[name]
    assert settle_recipe(None, "simple_cnn", True, 10, 10) == FROM_SCRATCH
    assert settle_recipe(None, "odd/head", False, 10**9, 10).name == "full"
    with pytest.raises(UserError, match="--recipe head needs a pretrained backbone"):
        settle_recipe("head", "simple_cnn", True, 10, 10)
    with pytest.raises(UserError, match=r"one linear layer, which is not so in odd/head: use --recipe full"):
        settle_recipe("lp_ft", "odd/head", False, 10, 10)


def test_learning_rate_and_epochs_of_the_user_replace_those_of_the_recipe():
    settled = settle_recipe("full", "some/model", True, 10, 10, learning_rate=0.5, num_train_epochs=7)
    assert settled == RECIPES["full"]._replace(learning_rate=0.5, num_train_epochs=7)
    assert RECIPES["full"].learning_rate != 0.5


def test_blend_interpolates_between_two_states():
    start = {"weight": torch.zeros(3), "steps": torch.tensor(1)}
    end = {"weight": torch.ones(3), "steps": torch.tensor(5)}
    assert torch.equal(blend(start, end, 0.0)["weight"], start["weight"])
    assert torch.equal(blend(start, end, 1.0)["weight"], end["weight"])
    diverged = {**end, "weight": torch.full((3,), torch.nan)}
    assert torch.equal(blend(start, diverged, 0.0)["weight"], start["weight"])
    assert blend(start, end, 0.5)["weight"].tolist() == [0.5] * 3 and blend(start, end, 0.5)["steps"] == 5
