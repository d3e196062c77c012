"""Candidates are calibrated and then scored on validation; what a run ends with is scored on test."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import split_of
from torch import nn

from luthier.scoring import selection
from luthier.scoring.criterion import Criterion, Judge
from luthier.scoring.metrics import (
    TestPredictions,
    calibration_scores,
    choose_threshold,
    confidence_and_correct,
    log_losses,
)
from luthier.scoring.selection import Candidate, score_run, score_test
from luthier.training.recipe import RECIPES

LABELS = ["a", "b", "c"]
REFERENCES = np.array([0, 0, 0, 0, 1, 1])
LOGITS = np.eye(3)[[0, 0, 0, 1, 1, 0]]


def test_calibration_is_that_of_images_of_the_classes():
    labels, references = ["a", "b", "none"], np.array([0, 1, 0, 1, 2, 2])
    logits = np.eye(3)[[0, 1, 1, 1, 0, 0]] * 2.0
    splits = split_of(references, labels, range(6))
    scored = score_test(TestPredictions(splits, logits, references, none=2), threshold=0.0)
    assert sum(b["n"] for b in scored["calibration"]["reliability"]) == scored["test"]["n"] == 4


def test_refusals_are_no_answers_and_images_of_no_class_are_counted_by_themselves():
    references = np.array([0, 1, 0, 1, 2, 2])
    logits = np.eye(3)[[0, 1, 1, 2, 2, 0]] * 2.0
    splits = split_of(references, ["a", "b", "none"], range(6))
    unsure = score_test(TestPredictions(splits, logits, references, none=2), threshold=0.0)["unsure"]
    assert (unsure["answered"], unsure["none_answered"]) == (0.75, 0.5) and unsure["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("loss", "recipes", "expected"),
    [
        (0.001, ("probe", "full", "lp_ft"), True),
        (0.9, ("probe", "full", "lp_ft"), False),
        (0.001, ("probe", "full"), False),
        (None, ("full", "lp_ft"), False),
    ],
)
def test_probe_that_leaves_little_is_enough_where_several_recipes_would_race(loss, recipes, expected):
    probe = loss and SimpleNamespace(loss=loss, validation={"log_loss": loss})
    judge = Judge(LABELS)
    assert selection.is_enough(probe, judge, [RECIPES[name] for name in recipes]) is expected


def test_candidates_are_calibrated_before_they_are_scored(monkeypatch):
    generator = np.random.default_rng(0)
    references = generator.integers(0, 3, 200)
    logits = 9 * (generator.normal(size=(200, 3)) + np.eye(3)[references])  # far too sure
    monkeypatch.setattr(selection, "predict_best", lambda trainer, rows: (logits, references))
    trainer = SimpleNamespace(model=nn.Linear(2, 3))
    judge = Judge(["a", "b", "c"], groups=np.arange(200) // 2)
    (found,) = selection.score_candidates(trainer, None, None, (1.0,), judge, "full")
    calibrated = logits / found.temperature
    assert found.temperature > 3
    assert found.threshold == choose_threshold(*confidence_and_correct(calibrated, references))
    assert np.array_equal(found.losses, log_losses(calibrated, references)) and found.groups is judge.groups
    assert found.validation["log_loss"] == pytest.approx(found.loss) and found.validation["groups"] == 100
    assert found.uncalibrated["log_loss"] > 1.5 * found.loss


def test_scores_before_calibration_are_those_of_the_logits_before_it():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 2, 40)
    logits = generator.normal(size=(40, 2)) + np.eye(2)[references]
    kept = Candidate(1.0, 4.0, 0.5, {}, {}, np.zeros(1), "full")
    test = TestPredictions(split_of(list(references), ["a", "b"], range(40)), logits / 4, references)
    before = score_run(kept, test, 0.5)["calibration"]["before"]["test"]
    assert before == pytest.approx(calibration_scores(logits, references))


def test_each_share_is_scored_with_its_own_weights_and_the_model_is_left_as_it_was(monkeypatch):
    model, seen = nn.Linear(2, 3, bias=False), []
    model.load_state_dict({"weight": torch.full((3, 2), 2.0)})

    def predict(trainer, rows):
        seen.append(trainer.model.weight[0, 0].item())
        return LOGITS, REFERENCES

    for name in ("predict", "predict_best"):
        monkeypatch.setattr(selection, name, predict)
    start, shares = {"weight": torch.zeros(3, 2)}, (0.5, 1.0, 0.0)
    trainer = SimpleNamespace(model=model)
    found = selection.score_candidates(trainer, None, start, shares, Judge(LABELS), "lp_ft")
    assert seen == [1.0, 2.0, 0.0] and tuple(each.share for each in found) == shares
    assert (model.weight == 2).all()


def test_calibration_of_balanced_answers_is_that_of_the_datas_own_probabilities():
    shares, references = np.array([0.9, 0.1]), np.array([1, 0])
    likely = np.log([[0.8, 0.2], [0.95, 0.05]])
    splits = split_of([1, 0], ["a", "b"], range(2))
    test = TestPredictions(splits, likely - np.log(shares), references, shares)
    bins = score_test(test, 0.0)["calibration"]["reliability"]
    assert sum(b["confidence"] * b["n"] for b in bins) / 2 == pytest.approx((0.8 + 0.95) / 2)
    kept = Candidate(1.0, 2.0, 0.5, {}, {}, np.zeros(1), "full", shares)
    halved = TestPredictions(splits, (likely - np.log(shares)) / 2, references, shares)
    before = score_run(kept, halved, 0.5)["calibration"]["before"]["test"]
    assert before == pytest.approx(calibration_scores(likely, references))


def test_answers_of_an_evaluation_are_not_those_of_weights_between_start_and_end(monkeypatch):
    seen = []
    for name in ("predict", "predict_best"):  # the second one may return what the trained weights have answered
        monkeypatch.setattr(selection, name, lambda *_, name=name: seen.append(name) or (LOGITS, REFERENCES))
    trainer, start = SimpleNamespace(model=nn.Linear(2, 3, bias=False)), {"weight": torch.zeros(3, 2)}
    selection.score_candidates(trainer, None, start, (0.5, 1.0), Judge(LABELS), "lp_ft")
    assert seen == ["predict", "predict_best"]


def test_threshold_and_calibration_of_candidates_are_those_of_images_of_the_classes(monkeypatch):
    generator, references = np.random.default_rng(0), np.arange(150) % 3
    logits = generator.normal(size=(150, 3)) + np.eye(3)[references]
    logits[references == 2, 2] += 9  # it is very sure of images of none of the classes
    monkeypatch.setattr(selection, "predict_best", lambda *_: (logits, references))
    judge = Judge(LABELS, Criterion(none=2))
    (found,) = selection.score_candidates(SimpleNamespace(model=nn.Linear(2, 3)), None, None, (1.0,), judge, "full")
    known = references != 2
    calibrated = logits[known] / found.temperature
    assert found.threshold == choose_threshold(*confidence_and_correct(calibrated, references[known]))
    assert found.uncalibrated == calibration_scores(logits[known], references[known])


def test_scores_of_a_run_know_the_shares_of_the_classes_and_the_groups():
    generator, shares = np.random.default_rng(0), np.array([0.8, 0.2])
    references = np.repeat(generator.integers(0, 2, 10), 4)
    likely = generator.normal(size=(40, 2)) + np.eye(2)[references]
    splits = split_of(references, ["a", "b"], np.arange(40) // 4)
    scored = score_test(TestPredictions(splits, likely - np.log(shares), references, shares), threshold=0.0)
    assert scored["test"]["log_loss"] == pytest.approx(log_losses(likely, references).mean())
    assert scored["unsure"]["answered"] == 1
    assert scored["unsure"]["accuracy_ci95"] == scored["test"]["accuracy_ci95"], "by groups"
