"""How a model learns: where it starts, what is frozen, how fast each layer learns, and for how long.

docs/experiments.md has the figures behind each number.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from luthier.errors import UserError
from models import linear_head

BATCH = 32  # images in an optimizer step that the learning rates below are for
LEAST_STEPS = 100  # of an epoch: with fewer, a model learns too little in it
PROBE = "probe"  # the recipe without training


class Recipe(NamedTuple):
    """What a recipe fixes. Learning rate and epochs are defaults, which the user's own replace.

    Attributes:
        name: what `--recipe` calls it.
        start: the head that training starts with: "new", "probe", or "soft probe", a probe of strong penalty. A probe
            that fits the training images leaves little to learn from them; a soft one does not.
        learning_rate: of the head.
        frozen: share of the layers below the head, counted from the input, that stay as they are.
        backbone_rate: the rate of the last layer below the head, as a multiple of the head's.
        layer_decay: the rate of each layer below that, as a multiple of the next layer's.
        heats: how many heats there are at most, each twice as long as the one before; see `heats`.
        num_train_epochs: instead of heats, for a single one of this length.
        shares: weights to choose from at the end: 1 is the trained ones, 0.5 their mean with those at the start.
        small_batch: images in a step where an epoch has fewer than `LEAST_STEPS` of `BATCH`; at the same rates.
        rate_is_given: the learning rate is the user's, and for the batch as it is.
        batch: the user's, of a device; None leaves it to `batch_of_device`.
    """

    name: str
    start: Literal["new", "probe", "soft probe"]
    learning_rate: float
    frozen: float = 0.0
    backbone_rate: float = 1.0
    layer_decay: float = 1.0
    heats: int = 1
    num_train_epochs: float | None = None
    shares: tuple[float, ...] = (1.0,)
    small_batch: int = BATCH
    rate_is_given: bool = False
    batch: int | None = None

    def batch_of_device(self, images: int, batches: int) -> int:
        """Return how many images a device takes at a time.

        It is `BATCH` where an epoch has `LEAST_STEPS` steps of so many on each device. Otherwise the devices share
        `BATCH` images; or `small_batch`, where an epoch is too short for that, too.

        Args:
            images: of an epoch.
            batches: in an optimizer step: of all devices together, with those that are accumulated.
        """
        if self.batch is not None:
            return self.batch
        if images >= LEAST_STEPS * BATCH * batches:
            return BATCH
        shared = BATCH if images >= LEAST_STEPS * BATCH else self.small_batch
        return math.ceil(shared / batches)

    def rate_of_batch(self, batch: int) -> float:
        """Return the learning rate of the head for so many images in an optimizer step.

        It grows with the square root of the batch, as suits AdamW (Malladi et al. 2022), from `BATCH` images on.
        """
        return self.learning_rate if self.rate_is_given else self.learning_rate * math.sqrt(max(1, batch / BATCH))

    def without_batch_norm(self) -> "Recipe":
        """Return the recipe for a backbone without BatchNorm."""
        return self._replace(
            backbone_rate=self.backbone_rate * RATE_WITHOUT_BATCH_NORM,
            layer_decay=min(self.layer_decay, DECAY_WITHOUT_BATCH_NORM),
        )

    @property
    def is_lowered(self) -> bool:
        """Whether the rates are those of a backbone without BatchNorm."""
        return self.backbone_rate != RECIPES.get(self.name, self).backbone_rate

    @property
    def is_probe(self) -> bool:
        """Whether nothing is trained: the model is the probe itself."""
        return self.name == PROBE

    @property
    def is_pretrained(self) -> bool:
        """Whether there is a pretrained backbone, whose features a probe can learn from."""
        return self.name != FROM_SCRATCH.name


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The logistic regression itself.
        Recipe(PROBE, start="probe", learning_rate=0.0, frozen=1.0, heats=0, num_train_epochs=0, shares=()),
        # A new head on the frozen backbone, on augmented views.
        Recipe("head", start="new", learning_rate=1e-2, frozen=1.0, num_train_epochs=5),
        # Fine-tuning the upper layers from the probe (Kumar et al. 2022). The result may be averaged with the start,
        # as in WiSE-FT (Wortsman et al. 2022).
        Recipe("lp_ft", start="probe", learning_rate=3e-4, frozen=0.5, layer_decay=0.7, heats=4, shares=(0.5, 1.0)),
        # Every layer, with a new head: for images that are far from those of the pretraining.
        Recipe("full", start="new", learning_rate=2e-3, backbone_rate=0.1, heats=4, small_batch=16),
        # Every layer, from a probe.
        Recipe(
            "full_from_probe", start="soft probe", learning_rate=2e-3, backbone_rate=0.1, heats=4, shares=(0.5, 1.0)
        ),
    )
}
RACED = ("lp_ft", "full_from_probe", "full")
# Vision transformers and ConvNeXt have no BatchNorm. At rates that suit networks with it they forget what they have
# learned; published ones are a quarter of these or less, and lower for the first layers.
RATE_WITHOUT_BATCH_NORM, DECAY_WITHOUT_BATCH_NORM = 0.25, 0.75
# For simple_cnn, which has no pretrained backbone.
FROM_SCRATCH = Recipe("from scratch", start="new", learning_rate=2e-3, num_train_epochs=25)


def choose_recipes(
    name: str | None,
    model_name: str,
    model: PreTrainedModel,
    learning_rate: float | None = None,
    num_train_epochs: float | None = None,
    batch: int | None = None,
) -> list[Recipe]:
    """Return the recipe asked for, or those that are raced, with the user's learning rate, epochs and batch.

    Args:
        name: what the user asked for; None to have it chosen.
        model_name: `simple_cnn` is the one without a pretrained backbone; others appear in errors only.
        model: a linear probe can replace its head if that is one linear layer. Its backbone learns at lower rates if
            most of its normalisation layers are not BatchNorm.
        learning_rate, num_train_epochs, batch: the user's; None leaves the recipe's. Epochs are a maximum for recipes
            of several heats. The batch is that of a device.

    Raises:
        UserError: the model cannot learn in the way asked for.
    """
    has_linear_head = linear_head(model) is not None
    if model_name == "simple_cnn":
        if name:
            raise UserError(f"--recipe {name} needs a pretrained backbone, and simple_cnn has none: leave it out")
        recipes = [FROM_SCRATCH]
    elif name and RECIPES[name].start != "new" and not has_linear_head:
        raise UserError(
            f"--recipe {name} needs a model whose head is one linear layer, which is not so in {model_name}: "
            "use --recipe full"
        )
    else:
        names = [name] if name else RACED if has_linear_head else ["full"]
        recipes = [RECIPES[each] for each in names]
        norms = [module for module in model.modules() if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))]
        if sum(isinstance(norm, _BatchNorm) for norm in norms) < len(norms) / 2:  # VOLO has a few in its stem
            recipes = [recipe.without_batch_norm() for recipe in recipes]
    return [
        recipe._replace(
            learning_rate=recipe.learning_rate if learning_rate is None else learning_rate,
            num_train_epochs=recipe.num_train_epochs if num_train_epochs is None else num_train_epochs,
            rate_is_given=learning_rate is not None,
            batch=batch,
        )
        for recipe in recipes
    ]


def blend(start: dict[str, torch.Tensor], end: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Return the state of a model at this share of the way from `start` (0) to `end` (1).

    It is on the device of `end`; for a share of 0 it is `start` itself, where that is.
    """
    if share in (0, 1):  # not by arithmetic, which would carry a diverged end's NaN back to the start
        return start if share == 0 else end
    return {
        name: start[name].to(tensor.device).lerp(tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }
