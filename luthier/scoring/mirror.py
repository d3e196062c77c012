"""Whether training may mirror images: the mirror images of letters and digits show something else."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from scipy.special import ndtr, stdtrit
from transformers import Trainer

from luthier.cache import list_of
from luthier.images.splits import draw_order, stratified_folds
from luthier.images.views import ImageRows
from luthier.processes import from_main_process
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.intervals import standard_error
from luthier.scoring.screening import FOLDS, losses_of_views, of_some_classes
from luthier.terminal import say
from luthier.training.features import build_backbone, compute_features
from luthier.training.recipe import Recipe
from luthier.training.trainer import model_of
from models import linear_head

IMAGES, PER_CLASS = 200, 8  # of train that are looked at, at most; and of a class, where there are many classes
# When mirror images are worse: their loss is at least TIMES that of the images, or they lose the share LOST of what
# the probes know, which is less with few images of many classes; and the difference is above WORSE standard errors.
TIMES, LOST, WORSE = 2.0, 0.6, 2.5


class Mirror(NamedTuple):
    """What probes that see the halves of an image one by one make of mirror images.

    Attributes:
        loss, mirrored: mean cross-entropy of images and of their mirror images.
        error: standard error of the difference, image by image; wider where there are few groups.
        chance: the loss of knowing how frequent the classes are, and nothing else; infinite where the probes do not
            clearly know more.
    """

    loss: float
    mirrored: float
    error: float
    chance: float = math.inf

    @property
    def is_worse(self) -> bool:
        """Whether mirror images show something else, as those of letters do: then they teach errors.

        It is not enough that they are a little worse, as where most things on photographs face one way.
        """
        least = TIMES * self.loss
        if self.chance > self.loss:  # twice a loss that is near it would be worse than knowing nothing
            least = min(least, self.loss + LOST * (self.chance - self.loss))
        return self.mirrored >= least and self.mirrored - self.loss > WORSE * self.error


def choose_augmentation(
    name: str,
    predictor: Callable[[], Trainer],
    splits: DatasetDict,
    images: Mapping[str, ImageRows],
    probe: ProbeResults,
    recipes: Sequence[Recipe],
) -> str:
    """Return the augmentation of training, on every process: for `auto` `flip_crop`, or `crop` if `Mirror.is_worse`.

    Args:
        name: `--augmentation`.
        predictor: returns a Trainer that only predicts with the model as it was built.
        splits: as loaded.
        images: of each split, see `data.feature_rows`.
        probe: of the run. Without one nothing is measured.
        recipes: that may be trained; where there is none but the probe, nothing is measured.
    """
    if name != "auto":
        return name
    if probe.strength is None or all(recipe.is_probe for recipe in recipes):
        return "flip_crop"
    mirror = measure_mirror(predictor(), splits["train"], images["train"])
    worse = from_main_process(mirror is not None and mirror.is_worse)
    if worse and mirror:
        say("mirror", f"not in training; loss of a probe: {mirror.loss:.3f}, of mirrored images {mirror.mirrored:.3f}")
    return "crop" if worse else "flip_crop"


def measure_mirror(trainer: Trainer, train: Dataset, images: ImageRows) -> Mirror | None:
    """Return what probes make of the mirror images of training images; None on all but the main process.

    A pretrained model sees an image and its mirror image alike: it has learned from both. So it is shown the left
    half of an image and then the right half, and a probe gets the features of both.

    Args:
        trainer: predicts with the model as it was built.
        train: as loaded.
        images: its rows, see `data.feature_rows`.
    """
    labels, groups, digests = (np.array(list_of(train, column)) for column in ("label", "group", "digest"))
    drawn = draw_images(labels, digests)
    model, rows = model_of(trainer), images.rows.select(drawn.tolist())
    head = linear_head(model)
    assert head is not None  # there is a probe
    backbone = build_backbone(model, head, rows)
    shown = [Half(rows, mirrored, right) for mirrored in (False, True) for right in (False, True)]
    halves = [features for half in shown if (features := compute_features(trainer, backbone, half)) is not None]
    if not halves:
        return None
    return compare_with_mirror(
        torch.cat(halves[:2], dim=1), torch.cat(halves[2:], dim=1), labels[drawn], groups[drawn]
    )


def draw_images(labels: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return the rows that are looked at, int [n]: of many classes those of some, or no class could be learned.

    Args:
        labels: int [N].
        digests: str [N], which decide.
    """
    return np.sort(of_some_classes(draw_order(digests, seed=1), labels, IMAGES // PER_CLASS)[:IMAGES])


def compare_with_mirror(
    features: torch.Tensor, mirrored: torch.Tensor, labels: np.ndarray, groups: np.ndarray
) -> Mirror:
    """Return what probes that have not learned from an image make of it and of its mirror image.

    Args:
        features, mirrored: of images and of their mirror images, float32 [N, D].
        labels, groups: int [N].
    """
    _, labels = np.unique(labels, return_inverse=True)  # without gaps
    folds = stratified_folds(labels, groups, FOLDS, seed=1)
    losses, others = losses_of_views((features, mirrored), torch.from_numpy(labels), folds)
    widened = _widen(len(np.unique(groups)))
    error = standard_error(others - losses, groups) * widened
    guessed = -np.log(np.bincount(labels) / len(labels))[labels]
    # Where the probes may know nothing, any small difference would be most of it.
    knows = (guessed - losses).mean() > WORSE * standard_error(guessed - losses, groups) * widened
    chance = float(guessed.mean()) if knows else math.inf
    return Mirror(float(losses.mean()), float(others.mean()), error, chance)


def _widen(groups: int) -> float:
    """Return by how much a standard error of few groups is too small for `WORSE` of them (Student's t)."""
    freedom = max(1, groups - 1)
    return float(stdtrit(freedom, ndtr(WORSE))) / WORSE * math.sqrt((freedom + 1) / freedom)


class Half(torch.utils.data.Dataset):
    """Rows with the left or the right half of each image, or of its mirror image, and nothing in the other half.

    Args:
        rows: give `pixel_values` [3, H, W].
        mirrored: whether it is of the mirror image.
        right: which half.
    """

    def __init__(self, rows: Any, mirrored: bool, right: bool):
        self.rows, self.mirrored, self.right = rows, mirrored, right

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict]:
        return [{"pixel_values": self._show(values)} for values in self.rows[rows]["pixel_values"]]

    def _show(self, values: torch.Tensor) -> torch.Tensor:
        values, middle = values.flip(-1) if self.mirrored else values.clone(), values.shape[-1] // 2
        values[..., slice(None, middle) if self.right else slice(middle, None)] = 0
        return values
