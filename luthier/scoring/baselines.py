"""What a score is compared with: the most frequent class, and the linear probe."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from datasets import DatasetDict
from transformers import Trainer

from luthier.cache import list_of
from luthier.images.groups import groups_of
from luthier.images.listed_images import GIVEN_GROUP
from luthier.images.splits import stratified_folds
from luthier.images.views import ImageRows
from luthier.processes import from_main_process
from luthier.scoring.audit import suspect_labels
from luthier.scoring.criterion import LOG_LOSS, Criterion, Judge, Yardstick
from luthier.scoring.grouping import measure_inflation
from luthier.scoring.intervals import interval_of_share, standard_error
from luthier.scoring.learning_curve import check_classes, learning_curve
from luthier.scoring.metrics import TestPredictions, score
from luthier.training.features import Pool, columns_of, empty_rows, feature_size, load_features, pool_of
from luthier.training.probe import LinearProbe, cross_fit, fit_shared_probes, state_with_probe
from luthier.training.recipe import Recipe
from luthier.training.trainer import model_of
from models import linear_head

# Of the yardstick: its probes learn from three quarters of the images, as the run's do where validation is a quarter.
FOLDS = 4
BY_CHANCE = 2  # standard errors by which a random validation split may be harder or easier than train


class ProbeResults(NamedTuple):
    """What the linear probe of a model tells.

    `starts` and `strength` are on every process, the rest is on the main one alone. Where the model has no probe,
    `starts` and `features` are empty, and the rest None.

    Attributes:
        starts: the model's state with the probe as its head, by `recipe.Recipe.start`.
        strength: the probe's penalty.
        features: of every split, float32 [N, D].
        scores: of `score_linear_probe`.
        logits: float [N, C] of test, calibrated.
        suspect_labels, checked_by: of `audit.suspect_labels`: the images, and how many a probe has learned from.
        learning_curve: of `learning_curve.learning_curve`, where it was asked for.
        inflation: of `grouping.measure_inflation`, where the data has groups.
    """

    starts: Mapping[str, dict[str, torch.Tensor]] = MappingProxyType({})
    strength: float | None = None
    features: Mapping[str, torch.Tensor] = MappingProxyType({})
    scores: dict | None = None
    logits: np.ndarray | None = None
    suspect_labels: list[dict] | None = None
    checked_by: int | None = None
    learning_curve: dict | None = None
    inflation: dict | None = None

    def known_of(self, is_probe: bool) -> Mapping[str, torch.Tensor] | None:
        """Return the features of a model that is the probe; None of one with other weights below the head."""
        return self.features if is_probe else None

    @property
    def findings(self) -> dict:
        """What an audit finds by the probe."""
        return {"suspect_labels": self.suspect_labels, "checked_by": self.checked_by}


def measure_probe(
    trainer: Trainer,
    splits: DatasetDict,
    images: Mapping[str, ImageRows],
    criterion: Criterion = LOG_LOSS,
    with_learning_curve: bool = False,
    announce: Callable[[Mapping], None] | None = None,
) -> ProbeResults:
    """Fit the linear probe of a model and return what it tells; its strength is chosen on validation.

    Args:
        trainer: runs the model, on its device and in its precision, over all of its processes.
        splits: as loaded, at least train and validation.
        images: of each split, see `data.feature_rows`.
        criterion: of the scores; the probe's strength is always chosen by the log loss.
        with_learning_curve: estimate the accuracy with more images.
        announce: is called with the probe's score on validation as soon as that is known.

    Raises:
        UserError: the features are not finite, or a class is too small for a learning curve.
    """
    model = model_of(trainer)
    head = linear_head(model)
    if head is None:
        return ProbeResults()
    if with_learning_curve:
        labels, groups = columns_of(splits, ("label", "group"))
        check_classes(labels, groups, splits["train"].features["label"].names)  # features take longer
    references = {split: list_of(dataset, "label") for split, dataset in splits.items()}
    space, features = None, {}
    if trainer.is_world_process_zero():
        sizes = [len(dataset) for dataset in splits.values()]
        space = empty_rows(sum(sizes), feature_size(model, head))  # of all splits together, so that they can be joined
        features = dict(zip(map(str, splits), space.split(sizes), strict=True))
    for split in ("train", "validation"):
        load_features(trainer, head, images[split], features.get(split))
    probe, soft = fit_shared_probes(trainer.args.device, features or None, references, criterion.balance)
    if announce and features:
        announce(score_linear_probe(probe, {"validation": features["validation"]}, splits, criterion)[0]["validation"])
    if "test" in images:  # an audit may have none
        load_features(trainer, head, images["test"], features.get("test"))
    starts = {"probe": state_with_probe(model, head, probe), "soft probe": state_with_probe(model, head, soft)}
    if space is None:
        return ProbeResults(starts, probe.strength)
    device = trainer.args.device
    scores, logits = score_linear_probe(probe, features, splits, criterion)
    suspects, checked_by = suspect_labels(splits, pool_of(splits, features, device, splits), probe.strength)
    curve, inflation = None, None
    if with_learning_curve:
        curve = learning_curve(pool_of(splits, features, device), probe.strength, len(splits["train"]))
    if GIVEN_GROUP in splits["train"].column_names:
        (duplicates,) = columns_of(splits, ["duplicates"])
        inflation = measure_inflation(pool_of(splits, features, device), duplicates, probe.strength)
    return ProbeResults(starts, probe.strength, features, scores, logits, suspects, checked_by, curve, inflation)


def with_yardstick(
    judge: Judge,
    probe: ProbeResults,
    splits: DatasetDict,
    recipes: Sequence[Recipe],
    device: torch.device,
    own_splits: Collection[str] = (),
) -> Judge:
    """Return a judge that corrects validation losses, on every process, where there are some to compare.

    A validation split that the data brings may be harder or easier than train by its nature, as images of another
    camera are. If chance does not explain the difference, nothing is corrected.

    Args:
        judge: without a yardstick.
        probe: of the run.
        splits: as loaded.
        recipes: of the run.
        device: of the fits.
        own_splits: names of the splits that the data brings.
    """
    if probe.strength is None or all(recipe.is_probe for recipe in recipes):
        return judge
    yardstick = None
    if probe.features:  # on the main process
        pool, n_train = pool_of(splits, probe.features, device), len(splits["train"])
        yardstick = build_yardstick(pool, n_train, probe.strength, judge.criterion)
        if "validation" in own_splits and _differs(yardstick, n_train, judge.groups):
            yardstick = None
    return judge._replace(yardstick=from_main_process(yardstick))


def _differs(yardstick: Yardstick, n_train: int, groups: np.ndarray | None) -> bool:
    """Tell whether validation is harder or easier than train by more than chance explains.

    Args:
        yardstick: of both.
        n_train: images of train.
        groups: of the validation images, see `Judge`.
    """
    ahead = float(yardstick.losses.mean()) - yardstick.mean  # the mean of both: validation is further from train alone
    share = n_train / (n_train + len(yardstick.losses))
    return abs(ahead) > BY_CHANCE * math.sqrt(share) * standard_error(yardstick.losses, groups)


def build_yardstick(pool: Pool, n_train: int, strength: float, criterion: Criterion) -> Yardstick:
    """Return what corrects validation losses.

    Args:
        pool: of train and validation.
        n_train: images of train.
        strength: of the probes.
        criterion: has the losses.
    """
    _, labels, groups, names = pool
    folds, is_learned = stratified_folds(labels, groups, FOLDS, seed=0), np.zeros(len(labels), dtype=bool)
    predictions, cross_entropies = np.zeros(len(labels), dtype=int), np.zeros(len(labels))
    for part in cross_fit(pool, folds, strength):
        adjusted, own = criterion.adjust(part.logits.cpu().numpy()), labels[part.rows]
        predictions[part.rows] = adjusted.argmax(axis=-1)
        cross_entropies[part.rows] = criterion.log_losses(adjusted, own)
        is_learned[part.rows] = part.learned[own]
    losses = criterion.weigh(predictions, cross_entropies, labels, len(names))  # of all together, and not of each part
    # A probe that has not learned an image's class, as where it is all in one fold, cannot tell how hard the image is.
    losses[~is_learned] = losses[is_learned].mean() if is_learned.any() else 0.0
    return Yardstick(losses[n_train:], float(losses.mean()))


def majority_baseline(data: Mapping, test: TestPredictions) -> dict:
    """Return what always predicting the most frequent class scores on test.

    Args:
        data: of `description.describe`; the class is the most frequent one in train, or else in test.
        test: its images are scored, but for those of none of the classes.
    """
    learned = data["splits"].get("train", data["splits"]["test"])["per_class"]
    none = None if test.none is None else test.labels[test.none]
    label = max((label for label in learned if label != none), key=learned.__getitem__)
    correct = test.references[test.known] == test.labels.index(label)
    interval = interval_of_share(correct, test.known_groups)
    return {"label": label, "accuracy": float(correct.mean()), "accuracy_ci95": interval, "n": len(correct)}


def score_linear_probe(
    probe: LinearProbe, features: Mapping[str, torch.Tensor], splits: DatasetDict, criterion: Criterion
) -> tuple[dict, np.ndarray | None]:
    """Return the probe's scores on validation and test, with its strength, and its logits on test, float [N, C].

    The logits are adjusted, and calibrated on validation, as those of every model are. Test may have no features: then
    it has no scores, and the logits are None.

    Args:
        probe: fitted on train.
        features: float32 [N, D], of validation, and of test if there are any.
        splits: as loaded.
        criterion: tells the probe's answers.
    """
    logits = {split: probe.logits(features[split]).numpy() for split in ("validation", "test") if split in features}
    truth = {split: np.array(list_of(splits[split], "label")) for split in logits}
    temperature = criterion.temperature(logits["validation"], truth["validation"])
    adjusted = {split: criterion.adjust(logits[split]) / temperature for split in logits}
    labels = splits["train"].features["label"].names
    scores = {
        split: score(
            adjusted[split], truth[split], labels, groups_of(splits[split]), criterion.class_shares, criterion.none
        )
        for split in adjusted
    }
    return scores | {"strength": probe.strength}, adjusted.get("test")
