"""How a model learns: what is frozen, how fast each layer learns, which weights between start and end are kept.

Apart from train.py because it is what the accuracy depends on; docs/experiments.md has the figures behind each number.
"""

from typing import NamedTuple

import torch


class Recipe(NamedTuple):
    """What a recipe fixes; rates and epochs are defaults, which the user's own replace."""

    frozen: float  # share of the layers below the head, counted from the input, that stay as they are
    learning_rate: float  # of the head
    backbone: float  # the rate of the last layer below the head, in rates of the head
    layer_decay: float  # the rate of each layer below that, in rates of the layer after it
    num_train_epochs: int
    kept: tuple[float, ...]  # candidates for the end: how far from the probe's weights (0) to the trained ones (1)


RECIPES = {
    # The logistic regression itself.
    "probe": Recipe(1.0, 0.0, 0.0, 1.0, 0, kept=(0.0,)),
    # A new head on the frozen backbone, on augmented views.
    "head": Recipe(1.0, 1e-2, 0.0, 1.0, 5, kept=(0.0, 1.0)),
    # Fine-tuning from the probe on (Kumar et al. 2022); the end may be averaged with the start, as in WiSE-FT
    # (Wortsman et al. 2022).
    "lp_ft": Recipe(0.5, 3e-4, 1.0, 0.7, 3, kept=(0.0, 0.5, 1.0)),
    # Every layer, with a new head.
    "full": Recipe(0.0, 2e-3, 0.1, 1.0, 5, kept=(0.0, 1.0)),
}
# What simple_cnn does, which has no pretrained backbone.
FROM_SCRATCH = Recipe(0.0, 2e-3, 1.0, 1.0, 25, kept=(1.0,))

# Parameters to an image above which the first layers stay frozen: a hundred images a class never pay for them, a
# million images do.
PARAMETERS_PER_IMAGE = 100


def choose_recipe(name: str | None, model_name: str, probed: bool, parameters: int, images: int) -> str | None:
    """Return the recipe asked for, or the one that suits the sizes; None for a model that is trained from scratch.

    Args:
        name: what the user asked for.
        model_name: for the errors; `simple_cnn` is the one without a pretrained backbone.
        probed: the model has a head that a probe can take the place of.
        parameters: of the model.
        images: to train on.

    Raises:
        ValueError: the model cannot learn in the way asked for.
    """
    if model_name == "simple_cnn":
        if name:
            raise ValueError(f"--recipe {name} needs a pretrained backbone, and simple_cnn has none: leave it out")
        return None
    if not probed and name in ("probe", "lp_ft"):
        raise ValueError(
            f"--recipe {name} needs a model whose head is one linear layer, and that of {model_name} is not: "
            "take --recipe full"
        )
    if name:
        return name
    return "lp_ft" if probed and parameters > PARAMETERS_PER_IMAGE * images else "full"


def blend(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return the state a share of the way from one state of a model to another."""
    if share in (0, 1):  # not by arithmetic, which would carry a diverged end's NaN back to the start
        return start if share == 0 else end
    return {
        name: start[name].lerp(tensor, share) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }
