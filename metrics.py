"""What a classifier scored, computed through the `evaluate` library without the network."""

import math
from collections.abc import Callable

import evaluate
import numpy as np
from datasets import Features, Value
from transformers import EvalPrediction


class Classification(evaluate.Metric):
    """Accuracy, macro F1, per-class precision / recall / F1 / support, and the confusion matrix.

    The same figures as the Hub's metrics accuracy, f1, precision, recall and confusion_matrix give; those would be
    downloaded. `compute(predictions, references, num_labels)` takes class indices.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: class indices; num_labels: how many classes there are",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], num_labels: int) -> dict:
        matrix = np.zeros((num_labels, num_labels), dtype=np.int64)  # true class by predicted class
        np.add.at(matrix, (references, predictions), 1)
        hits, predicted, support = np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1)
        # A class never predicted has no precision, one without images no recall: both count as 0, as in scikit-learn.
        precision = hits / np.maximum(predicted, 1)
        recall = hits / np.maximum(support, 1)
        f1 = 2 * hits / np.maximum(predicted + support, 1)
        occurs = (predicted + support) > 0
        return {
            "accuracy": float(hits.sum() / matrix.sum()),
            "macro_f1": float(f1[occurs].mean()),
            "precision": precision.tolist(),
            "recall": recall.tolist(),
            "f1": f1.tolist(),
            "support": support.tolist(),
            "confusion_matrix": matrix.tolist(),
        }


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> list[float]:
    """Return the two ends of Wilson's (1927) score interval for a share of `hits` in `n`; 95% by default."""
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def score(logits: np.ndarray, references: np.ndarray, labels: list[str]) -> dict:
    """Score logits [N, C] against the true class indices [N].

    Returns `accuracy`, `accuracy_ci95` (Wilson), `macro_f1` (over the classes that occur), `log_loss` (mean
    cross-entropy in nats), `n`, `per_class` by class name, and `confusion_matrix` (rows are true classes).
    """
    result = Classification(keep_in_memory=True).compute(
        predictions=logits.argmax(axis=-1), references=references, num_labels=len(labels)
    )
    n = len(references)
    with np.errstate(invalid="ignore"):  # a diverged model's loss is NaN, which needs no warning beside
        log_loss = np.logaddexp.reduce(logits.astype(np.float64), axis=-1) - logits[np.arange(n), references]
    return {
        "accuracy": result["accuracy"],
        "accuracy_ci95": wilson_interval(round(result["accuracy"] * n), n),
        "macro_f1": result["macro_f1"],
        "log_loss": float(log_loss.mean()),
        "n": n,
        "per_class": {
            name: {key: result[key][index] for key in ("precision", "recall", "f1", "support")}
            for index, name in enumerate(labels)
        },
        "confusion_matrix": result["confusion_matrix"],
    }


def logits_of(prediction: EvalPrediction) -> np.ndarray:
    """Return the logits [N, C] of what `Trainer.predict` gave; some models give more, in a tuple that they open."""
    predictions = prediction.predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions


def build_compute_metrics(labels: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the Trainer's `compute_metrics`: accuracy and macro F1 of one evaluation."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        result = score(logits_of(prediction), prediction.label_ids, labels)
        return {"accuracy": result["accuracy"], "macro_f1": result["macro_f1"]}

    return compute_metrics
