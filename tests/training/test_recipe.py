"""Which recipe is chosen, and what lies between two states of a model."""

import pytest
import torch

from recipe import RECIPES, blend, choose_recipe


@pytest.mark.parametrize(
    ("parameters", "images", "expected"),
    [(3_400_000, 883, "lp_ft"), (86_000_000, 100_000, "lp_ft"), (3_400_000, 100_000, "full")],
)
def test_few_images_for_many_parameters_start_from_the_probe(parameters, images, expected):
    assert choose_recipe(None, "some/model", True, parameters, images) == expected


def test_what_is_asked_for_is_done_or_refused():
    for name in RECIPES:
        assert choose_recipe(name, "some/model", True, 10, 10) == name
    assert choose_recipe(None, "simple_cnn", True, 10, 10) is None
    assert choose_recipe(None, "odd/head", False, 10**9, 10) == "full"
    with pytest.raises(ValueError, match="--recipe head needs a pretrained backbone"):
        choose_recipe("head", "simple_cnn", True, 10, 10)
    with pytest.raises(ValueError, match=r"one linear layer, and that of odd/head is not: take --recipe full"):
        choose_recipe("lp_ft", "odd/head", False, 10, 10)


def test_blend():
    start = {"weight": torch.zeros(3), "steps": torch.tensor(1)}
    end = {"weight": torch.ones(3), "steps": torch.tensor(5)}
    assert torch.equal(blend(start, end, 0.0)["weight"], start["weight"])
    assert torch.equal(blend(start, end, 1.0)["weight"], end["weight"])
    diverged = {**end, "weight": torch.full((3,), torch.nan)}
    assert torch.equal(blend(start, diverged, 0.0)["weight"], start["weight"])
    assert blend(start, end, 0.5)["weight"].tolist() == [0.5] * 3 and blend(start, end, 0.5)["steps"] == 5
