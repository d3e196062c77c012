"""The score: against figures worked out by hand, against the Trainer's way in, and without the network."""

import math

import numpy as np
import pytest
from transformers import EvalPrediction

from metrics import build_compute_metrics, logits_of, score, wilson_interval

LABELS = ["a", "b", "c"]
REFERENCES = np.array([0, 0, 0, 0, 1, 1])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 0])
LOGITS = np.eye(3)[PREDICTIONS]


def test_score_by_hand():
    scored = score(LOGITS, REFERENCES, LABELS)
    assert scored["accuracy"] == pytest.approx(4 / 6) and scored["n"] == 6
    assert scored["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert scored["per_class"]["a"] == {"precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4}
    assert scored["per_class"]["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert scored["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert scored["macro_f1"] == pytest.approx((0.75 + 0.5) / 2)  # c occurs nowhere and counts nowhere
    right, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    assert scored["log_loss"] == pytest.approx((4 * right + 2 * wrong) / 6)


def test_perfect_and_worst():
    assert score(np.eye(3)[REFERENCES], REFERENCES, LABELS)["macro_f1"] == 1
    assert score(np.eye(3)[(REFERENCES + 1) % 3], REFERENCES, LABELS)["accuracy"] == 0


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(154, 200, 0.7069, 0.8229), (181, 200, 0.8564, 0.9383), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx([low, high], abs=1e-4)


def test_compute_metrics_takes_logits_or_a_tuple_of_outputs():
    expected = {"accuracy": pytest.approx(4 / 6), "macro_f1": pytest.approx(0.625)}
    assert build_compute_metrics(LABELS)(EvalPrediction(LOGITS, REFERENCES)) == expected
    assert logits_of(EvalPrediction((LOGITS, np.zeros(1)), REFERENCES)) is LOGITS
