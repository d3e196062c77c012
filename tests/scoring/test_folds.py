"""The folds of a run as one result: the temperature, the threshold and the model that is shipped."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, concatenate_datasets

import luthier.scoring.folds as module
from luthier.errors import UserError
from luthier.output_dir import NO_TIME
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.criterion import Criterion, Judge
from luthier.scoring.experiment import Experiment, Result
from luthier.scoring.familiarity import Answers
from luthier.scoring.metrics import choose_threshold, confidence_and_correct, fit_temperature
from luthier.scoring.race import Outcome
from luthier.scoring.race_record import Heats
from luthier.scoring.selection import Candidate

NONE = 2


def fold(
    number: int, temperature: float, loss: float, arm: str = "full", reason: str = "its last heat"
) -> tuple[np.ndarray, tuple[Experiment, Result]]:
    """Return the logits of 60 images of two classes and of none, before calibration, and the fold that tests them."""
    generator, references = np.random.default_rng(number), np.arange(60) % 3
    logits = 4 * (generator.normal(size=(60, 3)) + np.eye(3)[references])
    logits[references == NONE, NONE] += 9  # it is very sure of images of none of the classes
    test = Dataset.from_dict({"label": references, "digest": [f"{number} {row}" for row in range(60)]})
    validation = Dataset.from_dict({"label": [0, 1], "digest": ["of no fold", "0 7"]})
    splits = DatasetDict(train=test.select(range(0)), validation=validation, test=test)
    course = SimpleNamespace(judge=Judge(["a", "b", "none"], Criterion(none=NONE), calibrates=temperature != 1))
    kept = Candidate(1.0, temperature, 0.1, {}, {}, np.full(4, loss), arm)
    model = SimpleNamespace(config=SimpleNamespace())
    answers = Answers(logits / temperature, references)
    findings = {"unreadable": [], "learned_from": 3, "learned_in_test": 2}
    outcome = Outcome(Heats(), reason)
    result = Result(None, course, [], [], ProbeResults(), outcome, kept, model, answers, "flip_crop")
    return logits, (
        Experiment(splits, frozenset(), splits, findings, None, None, [], None, {}),
        result,
    )


def pool(monkeypatch, *folds: tuple) -> tuple[Experiment, Result, list]:
    """Return what `pool_folds` returns, and which models' logits it divides, and by what."""
    divided: list = []
    tests = [experiment.splits["test"] for _, (experiment, _) in folds]
    for own, (_, (experiment, _)) in enumerate(folds):  # a fold learns from what the others test
        experiment.splits["train"] = concatenate_datasets([each for fold, each in enumerate(tests) if fold != own])
    monkeypatch.setattr(module, "audit_images", lambda *_: {})
    monkeypatch.setattr(module, "divide_logits", lambda model, by: divided.append((model, by)))
    return *module.pool_folds([part for _, part in folds]), divided


def test_shipped_model_has_the_temperature_and_the_threshold_of_all_folds(monkeypatch):
    folds = fold(0, 2.0, loss=0.5), fold(1, 7.0, loss=0.4)
    experiment, result, divided = pool(monkeypatch, *folds)
    logits, references = np.concatenate([each for each, _ in folds]), np.tile(np.arange(3), 40)
    temperature = fit_temperature(logits, references)
    assert result.kept.temperature == pytest.approx(temperature, rel=1e-6)
    assert np.allclose(result.answers.logits, logits / temperature)
    assert result.model is folds[1][1][1].model and divided == [(result.model, pytest.approx(temperature / 7.0))]
    confidence, correct = confidence_and_correct(logits / temperature, references)
    assert result.threshold == pytest.approx(choose_threshold(confidence, correct & (references != NONE)))
    assert result.model.config.unsure_below == result.kept.threshold
    assert experiment.findings["learned_from"] == 4
    assert experiment.splits["test"]["digest"][:] == [f"{number} {row}" for number in (0, 1) for row in range(60)]
    assert experiment.splits["validation"]["digest"][:] == ["of no fold", "0 7"], "a copy of a tested image too"
    assert "untested" not in experiment.splits


def test_images_that_change_between_folds_are_refused(monkeypatch):
    folds = [fold(number, 2.0, 0.5) for number in range(2)]
    pool(monkeypatch, *folds)
    again = [fold(number, 2.0, 0.5)[1] for number in range(2)]
    for number, (experiment, _) in enumerate(again):
        experiment.splits["train"] = folds[1 - number][1][0].splits["test"]
    relabelled = [1, *again[1][0].splits["test"]["label"][1:]]
    again[1][0].splits["test"] = again[1][0].splits["test"].remove_columns("label").add_column("label", relabelled)
    with pytest.raises(UserError, match=r"have changed since the first fold .* with --output_dir and --resume"):
        module.pool_folds(iter(again))


def test_shipped_model_is_the_best_of_the_kind_that_most_folds_kept(monkeypatch):
    several = [fold(0, 2.0, 0.5), fold(1, 2.0, 0.1, "lp_ft"), fold(2, 2.0, 0.4, reason=NO_TIME), fold(3, 2.0, 0.6)]
    _, result, _ = pool(monkeypatch, *several)
    assert result.model is several[2][1][1].model
    _, result, _ = pool(monkeypatch, *several[:2])
    assert (result.kept.arm, result.outcome.ended) == ("lp_ft", "its last heat"), "one each: by the loss"
    _, result, _ = pool(monkeypatch, several[1], several[2])
    assert result.outcome.ended == NO_TIME, "with more time one fold goes on"


def test_temperature_of_folds_knows_the_shares_of_the_classes(monkeypatch):
    shares = np.array([0.7, 0.2, 0.1])
    folds = [fold(0, 2.0, loss=0.5), fold(1, 7.0, loss=0.4)]
    logits, references = np.concatenate([each for each, _ in folds]), np.tile(np.arange(3), 40)
    shared = [
        (each, (experiment, result._replace(kept=result.kept._replace(class_shares=shares))))
        for each, (experiment, result) in folds
    ]
    _, result, _ = pool(monkeypatch, *shared)
    assert result.kept.temperature == pytest.approx(fit_temperature(logits, references, shares), rel=1e-6)
    assert result.kept.temperature != pytest.approx(fit_temperature(logits, references), rel=1e-4)


def test_folds_of_a_model_that_cannot_be_calibrated_stay_as_they_are(monkeypatch):
    folds = fold(0, 1.0, loss=0.5), fold(1, 1.0, loss=0.4)
    _, result, divided = pool(monkeypatch, *folds)
    assert result.kept.temperature == 1 and divided == [(result.model, 1.0)]
    assert np.array_equal(result.answers.logits, np.concatenate([each for each, _ in folds]))


def test_features_and_scores_of_the_probes_are_those_of_all_images_in_their_order():
    label = ClassLabel(names=["a", "b"])
    splits = DatasetDict(test=Dataset.from_dict({"label": [0, 1, 1, 0, 0]}).cast_column("label", label))
    columns = (
        {"test": [0, 1, 2], "train": [3, 4]},
        {"test": [3, 4], "train": [0, 9, 2], "validation": [7, 8]},
    )
    logits = np.eye(2)[[0, 1, 1]], np.eye(2)[[1, 1]]  # the second fold is always wrong
    probes = [
        ProbeResults(
            features={split: torch.tensor(values).float()[:, None] for split, values in each.items()},
            scores={"validation": {"n": 7}, "test": {}},
            logits=own,
        )
        for each, own in zip(columns, logits, strict=True)
    ]
    leader = SimpleNamespace(probe=probes[1], none=None, kept=SimpleNamespace(class_shares=None))
    found = module._pool_probes(leader, probes, splits, {"validation": [1], "train": [1]})
    assert {split: rows.ravel().tolist() for split, rows in found.features.items()} == {
        "test": [0, 1, 2, 3, 4],
        "validation": [8],
        "untested": [9],
    }
    assert (found.scores["test"]["n"], found.scores["test"]["accuracy"]) == (5, 0.6)
    assert found.scores["validation"] == {"n": 7}


def test_suspect_labels_are_found_again_in_the_pool():
    label = {"a": 0, "b": 1, "c": 0, "b again": 0}
    own, pooled = (
        DatasetDict(
            {
                split: Dataset.from_dict(
                    {"digest": [name[0] for name in names], "label": [label[name] for name in names]}
                )
                for split, names in each.items()
            }
        )
        for each in (
            {"train": ["a", "b", "b again"], "test": ["c"]},
            {"test": ["c", "b", "b again"], "untested": ["a"]},
        )
    )
    suspects = [{"split": "train", "row": 1, "why": "x"}, {"split": "train", "row": 0}, {"split": "test", "row": 0}]
    assert module._in_pool([*suspects, {"split": "train", "row": 2}], own, pooled) == [
        {"split": "test", "row": 1, "why": "x"},
        {"split": "untested", "row": 0},
        {"split": "test", "row": 0},
        {"split": "test", "row": 2},
    ]
    assert module._in_pool(None, own, pooled) is None


@pytest.mark.parametrize("label", ["a", "b"])
def test_validation_of_the_users_own_that_has_a_copy_of_a_tested_image_stays_in_the_pool(label):
    names = ["a", "b"]

    def images(rows: list[tuple[str, str]]) -> Dataset:
        columns = {
            "name": [f"{letter} {number}" for number, (letter, _) in enumerate(rows)],
            "digest": [letter * 64 for letter, _ in rows],
            "pixels": [letter * 64 for letter, _ in rows],
            "label": [names.index(own) for _, own in rows],
            "duplicates": [ord(letter) for letter, _ in rows],
        }
        same = {"format": "", "width": 64, "height": 64}
        columns |= {name: [value] * len(rows) for name, value in same.items()}
        return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names))

    tests, own = ([("x", "a"), ("y", "b")], [("z", "a"), ("w", "b")]), images([("x", label), ("v", "b")])
    folds = [
        SimpleNamespace(splits=splits, prepared=splits)
        for splits in (
            DatasetDict(train=images(tests[1 - fold]), validation=own, test=images(tests[fold])) for fold in (0, 1)
        )
    ]
    splits, _, untested = module._pool_splits(folds, folds[0])
    assert untested == {"validation": [0, 1]}
    (leak,) = module.audit_images(splits, [])["between_splits"]
    assert [image["split"] for image in leak] == ["test", "validation"]
    suspects = [{"split": "validation", "row": 0}]
    assert module._in_pool(suspects, folds[0].splits, splits) == suspects


def test_model_that_knew_images_of_any_fold_is_named(monkeypatch):
    known, unknown = fold(0, 2.0, loss=0.5), fold(1, 7.0, loss=0.4)
    unknown[1][0].findings.update(learned_from=0, learned_in_test=0)
    experiment, result, _ = pool(monkeypatch, known, unknown)
    assert result.model is unknown[1][1].model and experiment.findings["learned_from"] == 2


def test_images_of_the_users_own_validation_that_the_model_knew_count_once(monkeypatch):
    folds = [
        (logits, (experiment._replace(own_splits=frozenset({"train", "validation"})), result))
        for logits, (experiment, result) in (fold(0, 2.0, loss=0.5), fold(1, 7.0, loss=0.4))
    ]
    experiment, _, _ = pool(monkeypatch, *folds)
    assert experiment.findings["learned_from"] == 5, "two of each fold's test, and one of the validation of both"
