"""The metrics: compared with values worked out by hand, and called as the Trainer calls them."""

import math
import tracemalloc

import numpy as np
import pytest
from conftest import split_of
from datasets import DatasetDict
from scipy.stats import binom

from luthier.scoring import metrics
from luthier.scoring.intervals import standard_error, wilson_interval
from luthier.scoring.metrics import (
    TestPredictions,
    calibration_scores,
    choose_threshold,
    fit_temperature,
    log_losses,
    reliability,
    score,
    selective,
)

LABELS = ["a", "b", "c"]
REFERENCES = np.array([0, 0, 0, 0, 1, 1])
PREDICTIONS = np.array([0, 0, 0, 1, 1, 0])
LOGITS = np.eye(3)[PREDICTIONS]


def test_score_equals_values_worked_out_by_hand():
    metrics = score(LOGITS, REFERENCES, LABELS)
    assert metrics["accuracy"] == pytest.approx(4 / 6) and metrics["n"] == 6
    assert metrics["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [0, 0, 0]]
    of_a, of_b = wilson_interval(3, 4), wilson_interval(1, 2)
    assert metrics["per_class"]["a"] == {
        "precision": 0.75, "recall": 0.75, "f1": 0.75, "support": 4, "recall_ci95": of_a,
    }  # fmt: skip
    assert metrics["per_class"]["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "recall_ci95": of_b}
    assert metrics["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert metrics["balanced_accuracy"] == pytest.approx((0.75 + 0.5) / 2)  # the same by chance
    assert metrics["macro_f1"] == pytest.approx((0.75 + 0.5) / 2)  # c does not occur and does not count
    correct, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    assert metrics["log_loss"] == pytest.approx((4 * correct + 2 * wrong) / 6)


def test_very_many_classes_have_no_confusion_matrix(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_CONFUSED", 2)
    expected = score(LOGITS[:, :2], REFERENCES, LABELS[:2])
    without = score(LOGITS, REFERENCES, LABELS)
    assert expected["confusion_matrix"] and without["confusion_matrix"] is None
    assert without["per_class"]["a"] == expected["per_class"]["a"] and without["accuracy"] == expected["accuracy"]


def test_scores_in_parts_are_those_of_all_at_once(monkeypatch):
    generator = np.random.default_rng(0)
    references = generator.integers(0, 7, 50)
    logits = generator.normal(size=(50, 7)) + 2 * np.eye(7)[references]
    shares = np.arange(1, 8) / 28

    def everything() -> list:
        found = score(logits, references, list("abcdefg"), class_shares=shares)
        return [found, fit_temperature(logits, references), fit_temperature(logits, references, shares)]

    whole = everything()
    monkeypatch.setattr(metrics, "CELLS", 30)
    parts = everything()
    assert parts[0] == whole[0] and parts[1:] == pytest.approx(whole[1:])
    logs = logits / whole[1] - np.log(np.exp(logits / whole[1]).sum(axis=1, keepdims=True))
    assert log_losses(logits / whole[1], references).mean() == pytest.approx(-logs[np.arange(50), references].mean())


def test_perfect_and_worst_scores():
    assert score(np.eye(3)[REFERENCES], REFERENCES, LABELS)["macro_f1"] == 1
    assert score(np.eye(3)[(REFERENCES + 1) % 3], REFERENCES, LABELS)["accuracy"] == 0


def test_top_5_accuracy_if_there_are_more_than_five_classes():
    labels = [str(index) for index in range(7)]
    logits = np.tile(np.arange(7.0), (4, 1))  # class 6 first, 2 fifth
    metrics = score(logits, np.array([6, 2, 1, 0]), labels)
    assert metrics["top_5_accuracy"] == 0.5 and metrics["accuracy"] == 0.25
    assert metrics["top_5_accuracy_ci95"] == pytest.approx(wilson_interval(2, 4))
    assert "top_5_accuracy" not in score(LOGITS, REFERENCES, LABELS)


def test_calibration_error_equals_the_value_worked_out_by_hand():
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    references = np.array([0, 1, 0, 1])
    bins = reliability(logits, references)
    assert [(round(b["confidence"], 6), b["accuracy"], b["n"]) for b in bins] == [(0.6, 1.0, 2), (0.9, 0.5, 2)]
    assert score(logits, references, ["a", "b"])["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)


def test_temperature_recovers_the_scale_of_the_logits():
    generator = np.random.default_rng(0)
    true_logits = generator.normal(0, 2, (4000, 5))
    noise = generator.gumbel(size=true_logits.shape)
    references = (true_logits + noise).argmax(axis=1)  # drawn with the probabilities of these logits
    for factor in (3.0, 0.5):
        assert fit_temperature(true_logits * factor, references) == pytest.approx(factor, rel=0.08)
    before, after = (score(true_logits * f, references, list("abcde")) for f in (3, 1))
    assert after["ece"] < 0.03 < before["ece"] and after["log_loss"] < before["log_loss"]


def test_temperature_stays_moderate_if_every_prediction_is_correct():
    logits, references = np.eye(3)[[0, 1, 2] * 10] * 5, np.array([0, 1, 2] * 10)
    temperature = fit_temperature(logits, references)
    assert 0.3 < temperature < 3
    assert log_losses(logits / temperature, references).mean() < 0.2
    assert fit_temperature(np.full((3, 3), np.nan), np.arange(3)) == 1


def test_certain_answers_are_in_the_last_bin_and_those_that_are_no_number_in_the_first():
    logits = np.array([[99.0, 0.0], [np.nan, np.nan]])
    bins = reliability(logits, np.array([0, 1]))
    assert [(each["confidence"], each["accuracy"], each["n"]) for each in bins] == [(0, 0, 1), (1, 1, 1)]


def test_images_of_no_class_are_counted_by_themselves():
    logits = np.eye(3)[[0, 1, 1, 2, 2, 0]] * 5.0  # the third class is none of the others
    references = np.array([0, 1, 0, 1, 2, 2])
    scored = score(logits, references, ["a", "b", "none"], none=2)
    assert (scored["n"], scored["accuracy"], scored["balanced_accuracy"]) == (4, 0.5, 0.5)
    assert scored["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2), "a refusal is no answer of a third class"
    low, high = scored["macro_f1_ci95"]
    assert low <= scored["macro_f1"] <= high <= 1
    assert scored["none"]["n"] == 2 and scored["none"]["refused"] == 0.5 and scored["none"]["known_refused"] == 0.25
    assert np.array(scored["confusion_matrix"]).sum() == 6 and scored["per_class"]["none"]["support"] == 2
    groups = np.array([0, 0, 1, 1, 2, 3])
    grouped = score(logits, references, ["a", "b", "none"], groups, none=2)
    assert grouped["groups"] == 2
    for name in ("refused_ci95", "known_refused_ci95"):
        assert grouped["none"][name] != scored["none"][name]
    assert "none" not in score(logits[:4], references[:4], ["a", "b", "none"], none=2)


@pytest.mark.parametrize("n", [10, 20, 39, 40, 100, 180])
def test_threshold_is_the_highest_that_withholds_one_in_twenty_of_others(n):
    sureness, correct = np.random.default_rng(0).random(n + 5), np.arange(n + 5) < n
    threshold = choose_threshold(sureness, correct)
    place = (sureness[correct] <= threshold).sum()  # another value is below the k-th of n with probability k / (n + 1)
    assert place == 1 or place / (n + 1) <= 1 / 20 < (place + 1) / (n + 1)


def test_chance_makes_a_calibration_error_of_its_own():
    generator, found = np.random.default_rng(0), []
    logits = generator.normal(size=(60, 4)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for _ in range(200):  # labels as often as their probabilities say
        references = (generator.random((60, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
        found.append(calibration_scores(logits, references))
    assert found[0]["ece_by_chance"] == found[1]["ece_by_chance"] > 0.05, "it depends on the predictions alone"
    assert found[0]["ece_by_chance"] == pytest.approx(np.mean([each["ece"] for each in found]), rel=0.15)
    sure = np.tile([np.log(0.99), np.log(0.01)], (3, 1))  # all three are right in 97% of cases, and then it is 1%
    by_hand = sum(chance * abs(right / 3 - 0.99) for right, chance in enumerate(binom(3, 0.99).pmf(range(4))))
    assert calibration_scores(sure, np.zeros(3, dtype=int))["ece_by_chance"] == pytest.approx(by_hand, rel=0.05)


def test_accuracy_of_the_answers_has_an_interval():
    sureness, correct = np.arange(100) / 100, np.arange(100) % 10 > 0
    unsure = selective(sureness, correct, 0.5)
    assert unsure["answered"] == 0.5 and unsure["accuracy_ci95"] == wilson_interval(45, 50)
    grouped = selective(sureness, correct, 0.5, np.arange(100) // 10)
    assert grouped["accuracy_ci95"] != unsure["accuracy_ci95"]
    assert selective(sureness, correct, 2.0)["accuracy_ci95"] is None


def test_near_duplicates_count_as_one_image():
    references, groups = [0, 1] * 20, [row // 4 for row in range(40)]
    splits = split_of(references, ["a", "b"], groups)
    test = TestPredictions(splits, np.eye(2)[references] * 3.0, np.array(references))
    assert test.score()["groups"] == 10 and test.score()["accuracy_ci95"][0] < 0.8
    alone = split_of(references, ["a", "b"], range(40))
    assert "groups" not in TestPredictions(alone, test.logits, test.references).score()


def test_standard_error_of_images_that_vary_together_is_that_of_their_groups():
    values = np.random.default_rng(0).normal(size=50)
    assert standard_error(np.repeat(values, 10), np.repeat(np.arange(50), 10)) == pytest.approx(standard_error(values))


def test_errors_withheld_and_the_curve_are_worked_out_by_hand():
    sureness, correct = np.array([0.2, 0.9, 0.5, 0.7]), np.array([False, True, False, True])
    found = selective(sureness, correct, 0.5)
    assert (found["answered"], found["errors_withheld"]) == (0.75, 0.5)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert [each["coverage"] for each in found["curve"]] == [0.25, 0.5, 0.75, 1.0]
    assert [each["accuracy"] for each in found["curve"]] == pytest.approx([1, 1, 2 / 3, 0.5])
    assert selective(sureness, np.ones(4, dtype=bool), 0.5)["errors_withheld"] is None


def test_answers_of_many_classes_take_little_memory(monkeypatch):
    monkeypatch.setattr(metrics, "CELLS", 50_000)
    logits = np.random.default_rng(0).normal(size=(2000, 500)).astype(np.float32)
    references = np.arange(2000) % 500
    whole = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(axis=1, keepdims=True)
    test = metrics.TestPredictions(DatasetDict(), logits, references)
    tracemalloc.start()
    predicted, confidence, of_label = test.likeliest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < logits.nbytes and (predicted == whole.argmax(axis=1)).all()
    assert np.allclose(confidence, whole.max(axis=1)) and np.allclose(of_label, whole[np.arange(2000), references])


def test_rows_of_the_confusion_matrix_are_true_classes_and_recall_is_not_precision():
    scored = score(np.eye(3)[[0, 1, 1, 1]], np.array([0, 0, 0, 1]), LABELS)
    assert scored["confusion_matrix"] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    a, b = scored["per_class"]["a"], scored["per_class"]["b"]
    assert (a["precision"], a["recall"]) == pytest.approx((1, 1 / 3))
    assert (b["precision"], b["recall"]) == pytest.approx((1 / 3, 1))
    assert a["recall_ci95"] == wilson_interval(1, 3)
    together = score(np.eye(3)[[0, 1, 1, 1]], np.array([0, 0, 0, 1]), LABELS, np.array([0, 1, 1, 2]))
    assert together["per_class"]["a"]["recall_ci95"] != a["recall_ci95"], "two images of one group"


def test_curve_has_no_threshold_between_images_of_equal_sureness():
    right = np.array([True, True, False, False])
    assert selective(np.full(4, 0.5), right, 0.5)["curve"] == [{"coverage": 1.0, "accuracy": 0.5}]
    refused = selective(np.array([0.9, 0.9, -np.inf, -np.inf]), np.array([True, False, False, False]), 0.5)["curve"]
    assert [(each["coverage"], each["accuracy"]) for each in refused] == [(0.5, 0.5), (1.0, 0.25)]
