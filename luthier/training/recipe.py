"""How a model learns: what is frozen, how fast each layer learns, which weights are candidates at the end.

docs/experiments.md has the figures behind each number.
"""

from typing import NamedTuple

import torch

from luthier.errors import UserError


class Recipe(NamedTuple):
    """What a recipe fixes. Learning rate and epochs are defaults, which the user's own replace."""

    name: str
    frozen: float  # share of the layers below the head, counted from the input, that stay as they are
    learning_rate: float  # of the head
    backbone_rate: float  # the rate of the last layer below the head, as a multiple of the head's
    layer_decay: float  # the rate of each layer below that, as a multiple of the next layer's
    num_train_epochs: float
    candidates: tuple[float, ...]  # weights to choose from: 0 is the probe's, 1 the trained ones, 0.5 their mean

    @property
    def starts_from_probe(self) -> bool:
        """Whether training starts with the probe as the head; otherwise the head is new."""
        return self.name in ("probe", "lp_ft")

    @property
    def is_pretrained(self) -> bool:
        """Whether there is a pretrained backbone, whose features a probe can learn from."""
        return self.name != FROM_SCRATCH.name


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The logistic regression itself.
        Recipe("probe", 1.0, 0.0, 0.0, 1.0, 0, candidates=(0.0,)),
        # A new head on the frozen backbone, on augmented views.
        Recipe("head", 1.0, 1e-2, 0.0, 1.0, 5, candidates=(0.0, 1.0)),
        # Fine-tuning that starts from the probe (Kumar et al. 2022); the result may be averaged with the start, as in
        # WiSE-FT (Wortsman et al. 2022).
        Recipe("lp_ft", 0.5, 3e-4, 1.0, 0.7, 3, candidates=(0.0, 0.5, 1.0)),
        # Every layer, with a new head.
        Recipe("full", 0.0, 2e-3, 0.1, 1.0, 5, candidates=(0.0, 1.0)),
    )
}
# For simple_cnn, which has no pretrained backbone.
FROM_SCRATCH = Recipe("from scratch", 0.0, 2e-3, 1.0, 1.0, 25, candidates=(1.0,))

# Parameters for each image above which the first layers stay frozen. With a hundred images a class, training them did
# not pay (docs/experiments.md).
PARAMETERS_PER_IMAGE = 100


def settle_recipe(
    name: str | None,
    model_name: str,
    linear_head: bool,
    parameters: int,
    images: int,
    learning_rate: float | None = None,
    num_train_epochs: float | None = None,
) -> Recipe:
    """Return the recipe asked for, or the one that suits the sizes, with the user's learning rate and epochs.

    Args:
        name: what the user asked for; None to have it chosen.
        model_name: `simple_cnn` is the one without a pretrained backbone; others appear in errors only.
        linear_head: the model's head is one linear layer, which a linear probe can replace.
        parameters: of the model.
        images: to train on.
        learning_rate, num_train_epochs: the user's; None leaves the recipe's.

    Raises:
        UserError: the model cannot learn in the way asked for.
    """
    if model_name == "simple_cnn":
        if name:
            raise UserError(f"--recipe {name} needs a pretrained backbone, and simple_cnn has none: leave it out")
        recipe = FROM_SCRATCH
    elif not linear_head and name in ("probe", "lp_ft"):
        raise UserError(
            f"--recipe {name} needs a model whose head is one linear layer, which is not so in {model_name}: "
            "use --recipe full"
        )
    else:
        few_images = linear_head and parameters > PARAMETERS_PER_IMAGE * images
        recipe = RECIPES[name or ("lp_ft" if few_images else "full")]
    return recipe._replace(
        learning_rate=recipe.learning_rate if learning_rate is None else learning_rate,
        num_train_epochs=recipe.num_train_epochs if num_train_epochs is None else num_train_epochs,
    )


def blend(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return the state that lies this share of the way from one state of a model to another."""
    if share in (0, 1):  # not by arithmetic, which would carry a diverged end's NaN back to the start
        return start if share == 0 else end
    return {
        name: start[name].lerp(tensor, share) if tensor.is_floating_point() else tensor for name, tensor in end.items()
    }
