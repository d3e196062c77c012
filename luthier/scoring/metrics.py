"""What a classifier scores, computed through the `evaluate` library without the network."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import evaluate
import numpy as np
from datasets import DatasetDict, Features, Value
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from luthier.images.groups import groups_of
from luthier.images.splits import rows_by_class
from luthier.scoring.intervals import (
    balanced_accuracy,
    interval_of_balanced_accuracy,
    interval_of_macro_f1,
    interval_of_share,
    macro_f1,
)

BINS = 15  # of confidence, for the calibration error (Guo et al. 2017)
# Logits that are worked on at a time: copies of all of them take memory where there are thousands of classes.
CELLS = 4_000_000
MAX_CONFUSED = 1000  # classes with a confusion matrix: that of ten thousand has a hundred million cells
TOP = 5  # classes among which the true one may be, for the top-5 accuracy
MAX_CORRECT_WITHHELD = 0.05  # share of the correct answers that "unsure" may cost


@dataclass(frozen=True)
class TestPredictions:
    """What a model predicts on test.

    Attributes:
        splits: as loaded; one of them is "test".
        logits: float [N, C] for the split "test", calibrated.
        references: int [N], the true classes.
        class_shares: see `score`.
        sureness: float [N], what decides whether the model answers; None is the confidence.
        none: see `score`.
    """

    __test__: ClassVar[bool] = False  # not a test class, whatever its name tells pytest

    splits: DatasetDict
    logits: np.ndarray
    references: np.ndarray
    class_shares: Sequence[float] | np.ndarray | None = None
    sureness: np.ndarray | None = None
    none: int | None = None

    @property
    def labels(self) -> list[str]:
        """The classes' names."""
        return self.splits["test"].features["label"].names

    @property
    def groups(self) -> np.ndarray | None:
        """What the images belong to, int [N]; None where each stands alone."""
        return groups_of(self.splits["test"])

    @property
    def known(self) -> np.ndarray:
        """Whether an image shows one of the classes, and not none of them, bool [N]."""
        return self.references != self.none

    @property
    def known_groups(self) -> np.ndarray | None:
        """The groups of the known images, int [n], see `known`; None where each stands alone."""
        return None if self.groups is None else self.groups[self.known]

    @property
    def logits_with_shares(self) -> np.ndarray:
        """The logits [N, C] whose probabilities take the shares of the classes into account."""
        return self.logits if self.class_shares is None else self.logits + np.log(self.class_shares)

    def score(self) -> dict:
        """Return all scores, see `score`."""
        return score(self.logits, self.references, self.labels, self.groups, self.class_shares, self.none)

    def likeliest(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the likeliest class of each image, its probability, and that of the true class, each [N]."""
        confidence, _ = confidence_and_correct(self.logits, self.references)
        return self.logits.argmax(axis=-1), confidence, np.exp(-log_losses(self.logits, self.references))


class Classification(evaluate.Metric):
    """Accuracy, balanced accuracy, macro F1, per-class precision / recall / F1 / support, and the confusion matrix.

    The same figures as scikit-learn's, and as the Hub's metrics accuracy, f1, precision, recall and confusion_matrix,
    which would have to be downloaded. `compute(predictions, references, num_labels)` takes class indices; with
    `none`, the index of one, predictions of that class are no answers, and macro F1 is that of the others.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions, references: class indices; num_labels: how many classes there are",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(
        self, predictions: list[int], references: list[int], num_labels: int, none: int | None = None
    ) -> dict:
        true, answers = np.array(references), np.array(predictions)
        counts = (true[true == answers], answers, true)
        correct, predicted, support = (np.bincount(each, minlength=num_labels) for each in counts)
        matrix = None
        if num_labels <= MAX_CONFUSED:
            cells = np.bincount(true * num_labels + answers, minlength=num_labels**2)
            matrix = cells.reshape(num_labels, num_labels).tolist()  # true class by predicted class
        if none is not None:
            predicted[none] = 0
        # A class never predicted has no precision, one without images no recall: both count as 0, as in scikit-learn.
        precision = correct / np.maximum(predicted, 1)
        recall = correct / np.maximum(support, 1)
        f1 = 2 * correct / np.maximum(predicted + support, 1)
        return {
            "accuracy": float((true == answers).mean()),
            "balanced_accuracy": float(balanced_accuracy(correct, support)),
            "macro_f1": float(macro_f1(correct, support, predicted)),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "support": support.tolist(),
            "confusion_matrix": matrix,
        }


def score(
    logits: np.ndarray,
    references: np.ndarray,
    labels: list[str],
    groups: np.ndarray | None = None,
    class_shares: Sequence[float] | np.ndarray | None = None,
    none: int | None = None,
) -> dict:
    """Score logits [N, C] against the true class indices [N].

    Args:
        logits, references: of the images.
        labels: the classes' names.
        groups: int [N], the same for images that belong together; None where each stands alone. The intervals are
            then those of so many groups.
        class_shares: float [C], where the highest logit is not the likeliest class, but the one that would be
            likeliest if all were equally frequent; see `balance.Balance`. Log loss and calibration error are of the
            probabilities that take the shares into account.
        none: the class of images that show none of the others. All scores are of the other images, of which there must
            be some; to take one of them for this class is an error. Only `per_class` and `confusion_matrix` are of all
            images.

    Returns `accuracy`, and `top_5_accuracy` where there are more than 5 classes; `balanced_accuracy` (the mean recall
    of the classes that occur) and `macro_f1` (over the classes that occur or are predicted); the 95% interval of each
    as `..._ci95`; `log_loss` (mean cross-entropy in nats), `ece` and `ece_by_chance` (see `calibration_scores`), `n`,
    `groups` (how many, where there are any), `per_class` by class name (with `recall_ci95` where there are images),
    `confusion_matrix` (by true class; None above `MAX_CONFUSED` classes), and `none` where there are images of that
    class: `n`, how many; `refused` and `known_refused`, which shares of them and of the others are taken for it, and
    the intervals of both.
    """
    known, predictions = references != none, logits.argmax(axis=-1)
    if known.all():
        return _score_known(logits, references, labels, groups, class_shares, none)
    own = None if groups is None else groups[known]
    return {
        **_score_known(logits[known], references[known], labels, own, class_shares, none),
        **_tables(classify(predictions, references, len(labels)), labels, references, predictions, groups),
        "none": _score_refusals(predictions == none, known, groups),
    }


def classify(predictions: np.ndarray, references: np.ndarray, classes: int, none: int | None = None) -> dict:
    """Return the `Classification` of predicted and true class indices [N]."""
    result = Classification(keep_in_memory=True).compute(
        predictions=predictions, references=references, num_labels=classes, none=none
    )
    assert result is not None  # as this process is the main one of the metric
    return result


def _score_known(
    logits: np.ndarray,
    references: np.ndarray,
    labels: list[str],
    groups: np.ndarray | None,
    class_shares: Sequence[float] | np.ndarray | None,
    none: int | None,
) -> dict:
    """Return the `score` of images that all show one of the classes."""
    predictions = logits.argmax(axis=-1)
    result = classify(predictions, references, len(labels), none)
    shares = {"accuracy": predictions == references}
    if len(labels) > TOP:
        top = [np.argpartition(logits[rows], -TOP)[:, -TOP:] == references[rows, None] for rows in _parts(logits)]
        shares["top_5_accuracy"] = np.concatenate(top).any(axis=-1)
    scored: dict = {}
    for name, correct in shares.items():
        scored |= {name: float(correct.mean()), f"{name}_ci95": interval_of_share(correct, groups)}
    return scored | {
        "balanced_accuracy": result["balanced_accuracy"],
        "balanced_accuracy_ci95": interval_of_balanced_accuracy(references, predictions == references, groups),
        "macro_f1": result["macro_f1"],
        "macro_f1_ci95": interval_of_macro_f1(references, predictions, len(labels), groups, none),
        **calibration_scores(logits if class_shares is None else logits + np.log(class_shares), references),
        "n": len(references),
        **({} if groups is None else {"groups": len(np.unique(groups))}),
        **_tables(result, labels, references, predictions, groups),
    }


def _tables(
    result: dict, labels: list[str], references: np.ndarray, predictions: np.ndarray, groups: np.ndarray | None
) -> dict:
    """Return what a `Classification` tells of each class, by name, with the interval of its recall."""
    keys = ("precision", "recall", "f1", "support")
    per_class = {name: {key: result[key][index] for key in keys} for index, name in enumerate(labels)}
    for rows in rows_by_class(references):
        correct, own = predictions[rows] == references[rows], None if groups is None else groups[rows]
        per_class[labels[references[rows[0]]]]["recall_ci95"] = interval_of_share(correct, own)
    return {"per_class": per_class, "confusion_matrix": result["confusion_matrix"]}


def _score_refusals(refused: np.ndarray, known: np.ndarray, groups: np.ndarray | None) -> dict:
    """Return how many images show none of the classes, and which shares of them and of the others are refused.

    Args:
        refused, known: bool [N].
        groups: int [N], see `score`.
    """
    scored: dict = {"n": int((~known).sum())}
    for name, rows in (("refused", ~known), ("known_refused", known)):
        interval = interval_of_share(refused[rows], None if groups is None else groups[rows])
        scored |= {name: float(refused[rows].mean()), f"{name}_ci95": interval}
    return scored


def _parts(logits: np.ndarray) -> Iterator[slice]:
    """Yield rows of logits [N, C], of about `CELLS` cells."""
    step = max(1, CELLS // logits.shape[1])
    for begin in range(0, len(logits), step):
        yield slice(begin, begin + step)


def log_losses(logits: np.ndarray, references: np.ndarray, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Return the cross-entropy of each row of logits [N, C], in nats, float64 [N].

    Args:
        logits: of the images.
        references: int [N], the true classes.
        shift: added to the logits of each row, [C].
    """
    losses = np.empty(len(logits))
    with np.errstate(invalid="ignore"):  # a diverged model's loss is NaN, which needs no warning as well
        for rows in _parts(logits):
            logs = log_softmax(logits[rows].astype(np.float64) + shift, axis=-1)
            losses[rows] = -logs[np.arange(len(logs)), references[rows]]
    return losses


def calibration_scores(logits: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return how far the probabilities of logits [N, C] can be believed.

    `log_loss`; `ece`, the expected calibration error; and `ece_by_chance`, what that would be on average if each
    prediction were correct as often as its confidence says. On few images it is far above 0.
    """
    confidence, correct = confidence_and_correct(logits, references)
    number, n = _bin(confidence), len(references)
    error = np.abs(np.bincount(number, correct - confidence)).sum() / n
    # The mean size of a normal deviation is sqrt(2 / pi) times its standard deviation. Where hardly an error is to be
    # expected, that is too much: the mean size of a deviation from p is 2 p (1 - p) for one image.
    variance = np.bincount(number, confidence * (1 - confidence))
    chance = np.minimum(math.sqrt(2 / math.pi) * np.sqrt(variance), 2 * variance).sum() / n
    loss = log_losses(logits, references).mean()
    return {"log_loss": float(loss), "ece": float(error), "ece_by_chance": float(chance)}


def reliability(logits: np.ndarray, references: np.ndarray) -> list[dict]:
    """Return the mean `confidence`, `accuracy` and `n` of each of `BINS` equal ranges of confidence that occurs."""
    confidence, correct = confidence_and_correct(logits, references)
    number = _bin(confidence)
    return [
        {"confidence": float(confidence[rows].mean()), "accuracy": float(correct[rows].mean()), "n": int(rows.sum())}
        for rows in (number == index for index in range(BINS))
        if rows.any()
    ]


def _bin(confidence: np.ndarray) -> np.ndarray:
    """Return in which of `BINS` equal ranges each confidence [N] is."""
    return np.minimum(confidence * BINS, BINS - 1).astype(int)


def choose_threshold(sureness: np.ndarray, correct: np.ndarray) -> float:
    """Return the sureness below which a model should say "unsure", from that of validation images [N].

    It is the highest one that loses no more than `MAX_CORRECT_WITHHELD` of the correct answers on other images like
    these, on average: another value is below the k-th of n sorted ones with a probability of k / (n + 1). It is the
    lowest sureness of a correct answer where there are fewer than 19 of them, and 0 where there are none. Detectors of
    unfamiliar inputs are compared in the same way (at 95% true positives, Hendrycks and Gimpel 2017). No unfamiliar
    images are available to choose it with.

    Args:
        sureness: float [N].
        correct: bool [N], whether the answer to each image is right.
    """
    kept = np.sort(sureness[correct])
    below = max(1, int(MAX_CORRECT_WITHHELD * (len(kept) + 1)))
    return float(kept[below - 1]) if len(kept) else 0.0


def selective(sureness: np.ndarray, correct: np.ndarray, threshold: float, groups: np.ndarray | None = None) -> dict:
    """Return how a model does that answers only where it is sure enough.

    Args:
        sureness: float [N].
        correct: bool [N], whether the answer to each image is right.
        threshold: the least sureness of an answer.
        groups: int [N], the same for images that belong together; None where each stands alone.

    Returns `threshold` itself; `answered`, the share of images at or above it; `accuracy` of those and its interval
    `accuracy_ci95`, None if there are none; `errors_withheld`, the share of the wrong answers that are below it, None
    if all are right; and `curve`, coverage and accuracy at a hundred thresholds at most (El-Yaniv and Wiener 2010).
    """
    answered = sureness >= threshold
    own = None if groups is None else groups[answered]
    order = np.argsort(-sureness, kind="stable")
    accuracy = correct[order].cumsum() / np.arange(1, len(correct) + 1)
    points = np.unique(np.linspace(1, len(correct), 100).round().astype(int)) - 1
    ordered = -sureness[order]
    points = np.unique(np.searchsorted(ordered, ordered[points], side="right")) - 1  # equals are on one side
    return {
        "threshold": threshold,
        "answered": float(answered.mean()),
        "accuracy": float(correct[answered].mean()) if answered.any() else None,
        "accuracy_ci95": interval_of_share(correct[answered], own) if answered.any() else None,
        "errors_withheld": float((~answered[~correct]).mean()) if (~correct).any() else None,
        "curve": [{"coverage": (k + 1) / len(correct), "accuracy": float(accuracy[k])} for k in points],
    }


def confidence_and_correct(logits: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each prediction [N], and whether it is correct [N]; NaN logits have confidence 0."""
    predictions = logits.argmax(axis=-1)
    return np.nan_to_num(np.exp(-log_losses(logits, predictions))), predictions == references


def fit_temperature(
    logits: np.ndarray, references: np.ndarray, class_shares: Sequence[float] | np.ndarray | None = None
) -> float:
    """Return the temperature by which logits [N, C] must be divided for the lowest log loss (Guo et al. 2017).

    It is from 0.05 to 20; 1 where a logit is not a finite number. With `class_shares` the logits are those of
    `Criterion.adjust`, and the logarithms of the shares are added after the division: so a model that knows nothing
    says how frequent each class is.

    One imaginary image with equal shares of every class is added, as Platt (1999) does. Where all predictions are
    correct the lowest loss would otherwise be at temperature 0, and every answer would be certain.
    """
    n = len(logits)
    log_shares = 0 if class_shares is None else np.log(class_shares)
    if not np.isfinite(logits).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        total = 0.0
        for rows in _parts(logits):
            logs = log_softmax(logits[rows].astype(np.float64) / np.exp(log_temperature) + log_shares, axis=-1)
            total -= (n * logs[np.arange(len(logs)), references[rows]] + logs.mean(axis=-1)).sum()
        return total / (n * (n + 1))

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))
