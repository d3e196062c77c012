"""Whether training may mirror images: the mirror images of letters show something else."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from scipy.special import ndtr, stdtrit
from torch import nn
from transformers import Trainer

from luthier.images.splits import draw_order, stratified_folds
from luthier.images.views import ImageRows
from luthier.processes import from_main_process
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.metrics import standard_error
from luthier.scoring.screening import FOLDS, losses_of_views, of_some_classes
from luthier.terminal import say
from luthier.training.features import LEARNABLE, build_backbone, columns_of, compute_features, join, size_of
from luthier.training.recipe import Recipe
from luthier.training.trainer import model_of
from models import linear_head

IMAGES, PER_CLASS = 600, 8  # of train and validation that are looked at, at most; and of a class, where many are
WORSE = 2.5  # standard errors by which mirror images must be worse


class Mirror(NamedTuple):
    """What probes make of mirror images.

    Attributes:
        loss, mirrored: mean cross-entropy of images and of their mirror images.
        error: standard error of the difference, image by image; wider where there are few groups.
    """

    loss: float
    mirrored: float
    error: float

    @property
    def is_worse(self) -> bool:
        """Whether mirror images show something else, as those of letters do: then they teach errors."""
        return self.mirrored - self.loss > WORSE * self.error


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
        splits, images, probe: see `measure_mirror`. Without a probe nothing is measured.
        recipes: of the run; where nothing is trained, nothing is measured.
    """
    if name != "auto":
        return name
    if probe.strength is None or all(recipe.is_probe for recipe in recipes):
        return "flip_crop"
    mirror = measure_mirror(predictor(), splits, images, probe)
    worse = from_main_process(mirror is not None and mirror.is_worse)
    if worse and mirror:
        say("mirror", f"not in training; loss of a probe: {mirror.loss:.3f}, of mirrored images {mirror.mirrored:.3f}")
    return "crop" if worse else "flip_crop"


def measure_mirror(
    trainer: Trainer, splits: DatasetDict, images: Mapping[str, ImageRows], probe: ProbeResults
) -> Mirror | None:
    """Return what probes make of the mirror images of train and validation; None on all but the main process.

    Args:
        trainer: predicts with the model as it was built.
        splits: as loaded.
        images: of each split, see `data.feature_rows`.
        probe: of `baselines.measure_probe`.
    """
    model, begin = model_of(trainer), len(splits["train"])
    head, drawn = linear_head(model), draw_images(*columns_of(splits, ("label", "digest")))
    assert head is not None and probe.strength is not None  # it is their probe
    backbone = build_backbone(model, head, size_of(images["train"].rows))
    backbone.register_forward_pre_hook(_mirror, with_kwargs=True)
    parts = [
        compute_features(trainer, backbone, images[split].rows.select(rows.tolist()))
        for split, rows in zip(LEARNABLE, (drawn[drawn < begin], drawn[drawn >= begin] - begin), strict=True)
        if len(rows)
    ]
    if not probe.features:
        return None
    labels, groups = (column[drawn] for column in columns_of(splits, ("label", "group")))
    features = join([probe.features[split] for split in LEARNABLE])[torch.from_numpy(drawn)]
    mirrored = torch.cat([part for part in parts if part is not None])
    return compare_with_mirror(features, mirrored, labels, groups, probe.strength)


def draw_images(labels: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Return the rows that are looked at, int [n]: of many classes those of some, or no class could be learned.

    Args:
        labels: int [N].
        digests: str [N], which decide.
    """
    return np.sort(of_some_classes(draw_order(digests, seed=1), labels, IMAGES // PER_CLASS)[:IMAGES])


def compare_with_mirror(
    features: torch.Tensor, mirrored: torch.Tensor, labels: np.ndarray, groups: np.ndarray, strength: float
) -> Mirror:
    """Return what probes that have not learned from an image make of it and of its mirror image.

    Args:
        features, mirrored: of images and of their mirror images, float32 [N, D].
        labels, groups: int [N].
        strength: of the probes.
    """
    _, labels = np.unique(labels, return_inverse=True)  # without gaps
    folds = stratified_folds(labels, groups, FOLDS, seed=1)
    losses, others = losses_of_views((features, mirrored), torch.from_numpy(labels), folds, (strength,))
    error = standard_error(others - losses, groups) * _widen(len(np.unique(groups)))
    return Mirror(float(losses.mean()), float(others.mean()), error)


def _widen(groups: int) -> float:
    """Return by how much a standard error of few groups is too small for `WORSE` of them (Student's t)."""
    freedom = max(1, groups - 1)
    return float(stdtrit(freedom, ndtr(WORSE))) / WORSE * math.sqrt((freedom + 1) / freedom)


def _mirror(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Turn left and right of what a model is given."""
    return args, kwargs | {"pixel_values": kwargs["pixel_values"].flip(-1)}
