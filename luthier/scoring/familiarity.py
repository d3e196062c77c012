"""How a run learns when its model should not answer, and what the model says of the test images."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from torch import nn
from transformers import Trainer

from luthier.cache import list_of
from luthier.familiarity import Familiarity, log_odds, similarity
from luthier.images.splits import draw_order
from luthier.images.views import ImageRows
from luthier.processes import from_main_process
from luthier.scoring.metrics import choose_threshold
from luthier.terminal import Tenths
from luthier.training.features import build_backbone, empty_rows, rows_at_once, run_backbone
from luthier.training.trainer import model_of, predict
from models import linear_head

BANK, PER_CLASS = 1000, 5  # training images that are kept, at least so many of each class
VALIDATION = 2000  # images that are enough to find a scale
LEAST_SPREAD = 1e-3  # of a figure, where validation images are nearly alike


class Answers(NamedTuple):
    """What a model says of test.

    Attributes:
        logits: float [N, C].
        references: int [N], the true classes.
        sureness: float [N], what decides whether it answers; None where that is the confidence.
        familiarity: what the sureness comes from.
    """

    logits: np.ndarray
    references: np.ndarray
    sureness: np.ndarray | None = None
    familiarity: Familiarity | None = None


def answer(
    trainer: Trainer,
    rows: Any,
    splits: DatasetDict,
    familiarity: Familiarity | None,
    known: Mapping[str, torch.Tensor] | None = None,
) -> Answers:
    """Return what a model says of test, on every process.

    Args:
        trainer: has the model with its final weights.
        rows: of test, with their labels.
        splits: as loaded.
        familiarity: None, as on all processes but the main one, leaves the decision to the confidence.
        known: features of "test", where the probe is kept (on all processes but the main one, without splits);
            None computes them.
    """
    model = model_of(trainer)
    head = linear_head(model)
    if head is None:
        return Answers(*predict(trainer, rows))
    backbone = build_backbone(model, head, rows) if known is None else None
    rows, sureness, at_once = rows.remove_columns("label"), [], rows_at_once(trainer.args.device)
    logits, progress = torch.empty(0, 0), Tenths("test", len(rows), "images", quiet_seconds=10)
    for begin in range(0, len(rows), at_once):
        progress.reach(begin)
        part = rows.select(range(begin, min(len(rows), begin + at_once)))
        if backbone is not None:
            features = run_backbone(trainer, backbone, part)
        else:  # a copy, or all rows would be sent
            own = known["test"][begin : begin + at_once].clone() if known else torch.empty(0)
            features = from_main_process(own)
        found = _apply_head(trainer, head, features)
        logits = logits if begin else empty_rows(len(rows), found.shape[1])  # of many classes they fill the memory
        logits[begin : begin + len(part)] = found
        if familiarity is not None:
            sureness.append(familiarity.rate(found.softmax(dim=-1), features).numpy())
    references = np.array(list_of(splits["test"], "label"))
    return Answers(logits.numpy(), references, np.concatenate(sureness) if sureness else None, familiarity)


def learn_familiarity(
    trainer: Trainer,
    images: Mapping[str, ImageRows],
    splits: DatasetDict,
    known: Mapping[str, torch.Tensor] | None,
    none: int | None,
) -> Familiarity | None:
    """Return what is familiar to the model that is kept; None on all but the main process.

    None, too, where its head is not one linear layer, it has diverged, or it is right about no validation image.
    The scale and the threshold are those of validation, where at most one in twenty correct answers is withheld.

    Args:
        trainer: has the model with its final weights.
        images: of "train" and "validation", see `data.feature_rows`.
        splits: as loaded.
        known: features of "train" and "validation", where the probe is kept (on all processes but the main one,
            without splits); None where the model has other weights below the head.
        none: the class of images that show none of the others: they are not familiar.
    """
    head = linear_head(model_of(trainer))
    if head is None:
        return None
    train, truth = splits["train"], np.array(list_of(splits["validation"], "label"))
    order = draw_order(list_of(splits["validation"], "digest"), seed=1)
    chosen = {
        "train": choose_bank(list_of(train, "label"), list_of(train, "digest"), none),
        "validation": order[truth[order] != none][:VALIDATION],
    }
    learned = _features(trainer, head, images, chosen, known)
    if not trainer.is_world_process_zero() or not all(len(part) and torch.isfinite(part).all() for part in learned):
        return None
    bank, validation = nn.functional.normalize(learned[0]).half(), learned[1]
    logits = _apply_head(trainer, head, validation)
    probabilities, correct = logits.softmax(dim=-1), logits.numpy().argmax(axis=1) == truth[chosen["validation"]]
    odds, near = _scale(log_odds(probabilities)), _scale(similarity(bank, validation))
    unscaled = Familiarity(bank, head, odds, near, 0.0)
    sureness = unscaled.rate(probabilities, validation).numpy()
    return unscaled._replace(unsure_below=choose_threshold(sureness, correct)) if correct.any() else None


def refit_familiarity(
    trainer: Trainer,
    familiarity: Familiarity | None,
    used: Sequence[str],
    images: Mapping[str, ImageRows],
    splits: DatasetDict,
    known: Mapping[str, torch.Tensor] | None,
    none: int | None = None,
) -> Familiarity | None:
    """Return the familiarity of a model that was refit: its own bank, and the scale of the scored one.

    Args:
        trainer: has the model that was refit.
        familiarity: of the scored model.
        used: the splits that it has learned from.
        images: of these splits, see `data.feature_rows`.
        splits: as loaded.
        known, none: as in `learn_familiarity`, of these splits.
    """
    head = linear_head(model_of(trainer))
    if head is None:
        return None
    joined = concatenate_datasets([splits[split].select_columns(["label", "digest"]) for split in used])
    rows = choose_bank(list_of(joined, "label"), list_of(joined, "digest"), none)
    begins = np.cumsum([0, *(len(splits[split]) for split in used)])
    parts = [rows[(rows >= begin) & (rows < end)] - begin for begin, end in itertools.pairwise(begins)]
    chosen = {split: part for split, part in zip(used, parts, strict=True) if len(part)}
    learned = _features(trainer, head, images, chosen, known)
    if familiarity is None:  # as on all processes but the main one
        return None
    return familiarity._replace(bank=nn.functional.normalize(torch.cat(learned)).half())


def pool_familiarity(
    own: Sequence[Answers], leader: Familiarity | None, logits: np.ndarray, known: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray | None, Familiarity | None]:
    """Return the sureness of all folds' answers at one temperature, and the leader's familiarity with their scale.

    The sureness is float [N]. Both are None where a fold has no familiarity, or no answer is right.

    Args:
        own: of each fold, at its own temperature.
        leader: of the fold whose model is shipped.
        logits: of all images [N, C], at the temperature of the shipped model.
        known: bool [N], whether an image shows one of the classes; the scale is of these.
        correct: bool [N], whether an answer is right; it never is for an image of none of the classes.
    """
    near = [(each.sureness, each.familiarity) for each in own if each.sureness is not None and each.familiarity]
    if len(near) < len(own) or leader is None or not correct.any():
        return None, None
    odds = log_odds(torch.from_numpy(logits).softmax(dim=-1))
    own_odds = [log_odds(torch.from_numpy(each.logits).softmax(dim=-1)).numpy() for each in own]
    similar = [
        sureness - (odds_of_fold - familiarity.log_odds[0]) / familiarity.log_odds[1]
        for (sureness, familiarity), odds_of_fold in zip(near, own_odds, strict=True)
    ]
    scale = _scale(odds[torch.from_numpy(known)])
    pooled = (odds.numpy() - scale[0]) / scale[1] + np.concatenate(similar)
    return pooled, leader._replace(log_odds=scale, unsure_below=choose_threshold(pooled, correct))


def choose_bank(labels: list[int], digests: list[str], none: int | None = None) -> np.ndarray:
    """Return the rows [R] of training images that others are compared with: as many of each class, if it has them."""
    order, truth = draw_order(digests, seed=1), np.array(labels)
    most = max(PER_CLASS, BANK // (truth.max() + 1))
    # Class by class, and copies of an image last, or the third nearest of them would be the nearest again.
    order = order[np.lexsort((_is_copy(truth, digests, order)[order], truth[order]))]
    place = np.arange(len(order)) - np.searchsorted(truth[order], truth[order])  # of each in its class
    return np.sort(order[(place < most) & (truth[order] != none)])


def _is_copy(truth: np.ndarray, digests: list[str], order: np.ndarray) -> np.ndarray:
    """Return whether an image of the same digest and class comes before each in an order, bool [N]."""
    seen, is_copy = set[tuple[int, str]](), np.zeros(len(truth), dtype=bool)
    for row in order.tolist():
        key = int(truth[row]), digests[row]
        is_copy[row] = key in seen
        seen.add(key)
    return is_copy


def _features(
    trainer: Trainer,
    head: str,
    images: Mapping[str, ImageRows],
    chosen: Mapping[str, np.ndarray],
    known: Mapping[str, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Return the features [R, D] of some rows of each split; if they are known, on the main process alone."""
    if known is not None:
        return [known[split][rows] for split, rows in chosen.items()] if known else []
    backbone = build_backbone(model_of(trainer), head, next(iter(images.values())).rows)
    return [run_backbone(trainer, backbone, images[split].rows.select(rows)) for split, rows in chosen.items()]


def _apply_head(trainer: Trainer, head: str, features: torch.Tensor) -> torch.Tensor:
    """Return the logits [N, C] that a model's head makes of features [N, D], on the CPU."""
    layer = model_of(trainer).get_submodule(head)
    assert isinstance(layer, nn.Linear)  # see models.linear_head
    with torch.no_grad():
        return nn.functional.linear(features, layer.weight.float().cpu(), layer.bias.float().cpu())


def _scale(values: torch.Tensor) -> tuple[float, float]:
    return float(values.mean()), max(float(values.std(correction=0)), LEAST_SPREAD)
