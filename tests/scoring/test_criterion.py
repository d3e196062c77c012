"""What validation chooses by, what corrects its losses, and how answers make up for rare classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch.nn import functional
from transformers import EvalPrediction

from luthier.errors import UserError
from luthier.scoring import criterion as module
from luthier.scoring.criterion import (
    TIE,
    Criterion,
    Judge,
    Yardstick,
    build_judge,
    check_known,
    find_none,
    uncertainty_of,
)
from luthier.scoring.metrics import Classification, fit_temperature, log_losses, score
from luthier.training.balance import Balance
from luthier.training.probe import fit_path
from luthier.training.trainer import concatenate_batches
from models import build_model

LABELS = ["a", "b", "c"]
RNG = np.random.default_rng(0)
REFERENCES = RNG.choice(3, 200, p=[0.7, 0.25, 0.05])
LOGITS = RNG.normal(size=(200, 3)) + 2 * np.eye(3)[REFERENCES]


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
def test_losses_have_the_mean_that_is_missing_of_the_metric(metric):
    losses = Criterion(metric).losses(LOGITS, REFERENCES)
    scored = score(LOGITS, REFERENCES, LABELS)
    assert losses.shape == (200,)
    assert losses.mean() == pytest.approx(1 - scored[metric] + TIE * scored["log_loss"])


def test_losses_are_the_log_loss_by_default():
    assert Criterion().losses(LOGITS, REFERENCES).mean() == pytest.approx(log_losses(LOGITS, REFERENCES).mean())


def test_equal_counts_of_errors_are_decided_by_the_log_loss():
    better, worse = (Criterion("accuracy").losses(LOGITS * factor, REFERENCES).mean() for factor in (1, 0.01))
    assert better < worse < better + 0.005  # less than an error


def test_classes_that_do_not_occur_do_not_count():
    logits = np.eye(3)[[0, 1, 0, 0]] * 9
    references = np.array([0, 1, 1, 0])
    assert Criterion("balanced_accuracy").losses(logits, references).mean() == pytest.approx(0.25, abs=0.01)
    assert Criterion("macro_f1").losses(logits, references).mean() == pytest.approx(1 - (0.8 + 2 / 3) / 2, abs=0.01)


def test_answers_make_up_for_rare_classes():
    shares = np.array([0.9, 0.1])
    likely = np.log([[0.8, 0.2], [0.95, 0.05]])  # 0.2 is twice the share of the second class, 0.05 half of it
    criterion = Criterion("balanced_accuracy", Balance(shares))
    answers = criterion.adjust(likely)
    assert answers.argmax(axis=1).tolist() == [1, 0]
    judged = Judge(["a", "b"], criterion).score(answers, np.array([1, 0]))
    assert judged["accuracy"] == 1
    assert judged["log_loss"] == pytest.approx(-np.log([0.2, 0.95]).mean())  # of the data's own probabilities
    assert Criterion("balanced_accuracy").adjust(likely) is likely


def test_model_that_knows_nothing_answers_all_classes_alike_and_tells_how_frequent_they_are():
    generator, shares = np.random.default_rng(0), np.array([0.9, 0.1])
    logits = generator.normal(0, 3, (2000, 2)) + np.log(shares)  # sure of itself, at random
    references = (generator.random(2000) < 0.1).astype(int)
    criterion = Criterion("balanced_accuracy", Balance(shares))
    answers = criterion.adjust(logits) / criterion.temperature(logits, references)
    assert 0.4 < answers.argmax(axis=1).mean() < 0.6
    judged = Judge(["a", "b"], criterion).score(answers, references)
    assert judged["log_loss"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=0.03)


def test_temperature_of_balanced_answers_is_that_of_the_datas_own_probabilities():
    generator, shares = np.random.default_rng(0), np.array([0.9, 0.1])
    answers = generator.normal(0, 2, (4000, 2))
    references = (answers + np.log(shares) + generator.gumbel(size=answers.shape)).argmax(axis=1)
    temperature = Criterion("balanced_accuracy", Balance(shares)).temperature(3 * answers + np.log(shares), references)
    assert temperature == pytest.approx(3, rel=0.1)


def test_compute_metrics_takes_logits_or_a_tuple_of_outputs():
    scored = score(LOGITS, REFERENCES, LABELS)
    expected = {name: pytest.approx(scored[name]) for name in ("accuracy", "balanced_accuracy", "macro_f1")}
    calibrated = log_losses(LOGITS / fit_temperature(LOGITS, REFERENCES), REFERENCES).mean()
    loss = log_losses(LOGITS, REFERENCES).mean()
    expected |= {"loss": pytest.approx(loss), "calibrated_loss": pytest.approx(calibrated)}
    assert Judge(LABELS).compute_metrics(EvalPrediction(LOGITS, REFERENCES)) == expected
    assert concatenate_batches((LOGITS, np.zeros(1))) is LOGITS
    batches = [(LOGITS[:4], np.zeros(1)), (LOGITS[4:], np.zeros(1))]
    assert np.array_equal(concatenate_batches(batches), LOGITS)


def test_figures_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions = LOGITS.argmax(axis=1)
    ours = Classification().compute(predictions=predictions, references=REFERENCES, num_labels=3)
    assert ours["balanced_accuracy"] == pytest.approx(sklearn.balanced_accuracy_score(REFERENCES, predictions))
    assert ours["macro_f1"] == pytest.approx(sklearn.f1_score(REFERENCES, predictions, average="macro"))


@pytest.fixture
def splits():
    features = Features({"label": ClassLabel(names=LABELS), "image": Value("string")})
    split = Dataset.from_dict({"label": [0, 0, 0, 0, 0, 1, 1, 1, 2, 2], "image": [""] * 10}, features)
    return DatasetDict(train=split, validation=split)


def test_new_head_begins_with_the_shares_of_the_classes(splits, timm_checkpoint):
    model, _ = build_model(str(timm_checkpoint), dict(enumerate(LABELS)))
    before = model.timm_model.get_classifier().bias.detach().clone()
    judge = build_judge("balanced_accuracy", "auto", model, splits)
    balance = judge.criterion.balance
    assert balance.shares.tolist() == [0.5, 0.3, 0.2] and balance.class_weights is None
    change = model.timm_model.get_classifier().bias.detach() - before
    assert change.tolist() == pytest.approx(np.log([0.5, 0.3, 0.2]).tolist())


@pytest.mark.parametrize(
    ("metric", "option", "balanced", "weighted"),
    [
        ("log_loss", "auto", False, False),
        ("accuracy", "auto", False, False),
        ("macro_f1", "auto", True, False),
        ("macro_f1", "none", False, False),
        ("log_loss", "logit_adjusted", True, False),
        ("log_loss", "weighted", True, True),
    ],
)
def test_balance_is_for_metrics_that_ask_for_it(splits, timm_checkpoint, metric, option, balanced, weighted):
    model, _ = build_model(str(timm_checkpoint), dict(enumerate(LABELS)))
    balance = build_judge(metric, option, model, splits).criterion.balance
    assert bool(balance) == balanced and (balanced and balance.weighted) == weighted
    if weighted:
        assert np.dot(balance.class_weights, balance.shares) == pytest.approx(1)


def test_balance_needs_a_head_with_a_bias(splits, monkeypatch):
    monkeypatch.setattr(module, "linear_head", lambda model: None)
    judge = build_judge("macro_f1", "auto", None, splits)
    assert judge.criterion.balance is None and not judge.calibrates
    with pytest.raises(UserError, match="--balance weighted changes the bias"):
        build_judge("macro_f1", "weighted", None, splits)


def test_weighted_probe_tells_the_probabilities_of_data_like_its_own():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=generator) < 0.1).long()
    features = torch.randn(4000, 3, generator=generator) + 1.5 * functional.one_hot(labels, 3)
    shares = np.bincount(labels) / 4000
    balance = Balance(shares, weighted=True)
    (plain,), (weighted,) = (fit_path(features, labels, 2, (1e-4,), given) for given in (None, balance))
    probabilities = [probe.logits(features).softmax(dim=1)[:, 1].mean() for probe in (plain, weighted)]
    assert probabilities == pytest.approx([shares[1]] * 2, abs=0.02)
    assert not torch.equal(plain.weight, weighted.weight)


def test_judge_has_the_losses_of_its_metric_and_corrects_them():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 3, 200)
    logits = generator.normal(size=(200, 3)) + 2 * np.eye(3)[references]
    judge = Judge(["a", "b", "c"], Criterion("macro_f1"))
    losses = judge.criterion.losses(logits, references)
    assert np.array_equal(judge.losses(logits, references), losses)
    yardstick = Yardstick(losses + generator.normal(size=200), 0.9)
    corrected = judge._replace(yardstick=yardstick).losses(logits, references)
    assert np.array_equal(corrected, yardstick.correct(losses)) and not np.array_equal(corrected, losses)


def test_yardstick_corrects_for_easy_images():
    rng = np.random.default_rng(0)
    hardness = rng.exponential(size=20_000)
    losses = 0.5 * hardness + rng.exponential(0.1, size=20_000)
    easy = np.argsort(hardness + rng.normal(size=20_000))[:5000]  # as a validation split may be by bad luck
    yardstick = Yardstick(hardness[easy], hardness.mean())
    assert losses[easy].mean() < 0.8 * losses.mean()
    assert yardstick.correct(losses[easy]).mean() == pytest.approx(losses.mean(), rel=0.02)


def test_yardstick_changes_nothing_where_it_knows_nothing():
    losses = np.array([0.1, 0.9, 0.4])
    assert np.array_equal(Yardstick(np.full(3, 0.2), 0.5).correct(losses), losses)  # all images alike
    unrelated = Yardstick(np.array([1.0, 0.0, 1.0]), 0.5)  # the slope is below zero
    assert np.array_equal(unrelated.correct(losses), losses)


def test_yardstick_moves_a_loss_by_no_more_than_its_own():
    corrected = Yardstick(np.array([0.0, 1.0, 2.0]), 3.0).correct(np.array([0.0, 5.0, 10.0]))
    assert corrected.tolist() == [3.0, 7.0, 11.0]


def test_log_of_the_trainer_counts_images_of_the_classes():
    logits = np.eye(3)[[0, 1, 2, 0, 0]] * 4.0
    judge = Judge(["a", "b", "none"], Criterion("log_loss", None, 2))
    found = judge.compute_metrics(SimpleNamespace(predictions=logits, label_ids=np.array([0, 1, 0, 2, 2])))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2), "a refusal is no answer of a third class"


@pytest.mark.parametrize(
    ("labels", "name", "found"),
    [
        (["a", "None", "b"], None, 1),
        (["a", "b", "c"], None, None),
        (["a", "None", "b"], "", None),
        (["a", "None", "b"], "a", 0),
        (["a", "None"], None, None),
        (["a", "None"], "None", 1),
    ],
)
def test_class_of_anything_else_is_found_in_any_case_or_named(labels, name, found):
    assert find_none(labels, name) == found


@pytest.mark.parametrize("name", ["A", "other"])
def test_name_of_no_class_is_refused(name):
    with pytest.raises(UserError, match=rf"there is no class '{name}' \(--none_class\): the classes are a, b"):
        find_none(["a", "b"], name)


def test_split_of_nothing_but_images_of_anything_else_is_refused(splits):
    splits["validation"] = splits["validation"].select([8, 9])
    for none in (None, 1):
        check_known(splits, none)
    with pytest.raises(UserError, match="all images of the validation split are of the class 'c'"):
        check_known(splits, 2)


def test_judge_knows_the_class_of_anything_else_and_the_groups_of_validation(splits, timm_checkpoint):
    model, _ = build_model(str(timm_checkpoint), dict(enumerate(LABELS)))
    splits["validation"] = splits["validation"].add_column("group", [0, 0, 1, 1, 2, 3, 4, 5, 6, 7])
    judge = build_judge("log_loss", "auto", model, splits, none_class="c")
    assert judge.criterion.none == 2 and model.config.none_class == "c" and judge.calibrates
    references = np.array(splits["validation"]["label"][:])
    scored = judge.score(3.0 * np.eye(3)[references], references)
    assert (scored["groups"], scored["none"]["n"]) == (6, 2)


def test_shares_are_those_of_the_whole_stream(splits, timm_checkpoint):
    model, _ = build_model(str(timm_checkpoint), dict(enumerate(LABELS)))
    stream = SimpleNamespace(labels=np.array([0, 1, 2, 2]))
    judge = build_judge("balanced_accuracy", "auto", model, splits, stream=stream)
    assert judge.criterion.class_shares.tolist() == [0.25, 0.25, 0.5]


def test_log_of_the_trainer_makes_up_for_rare_classes():
    shares = np.array([0.7, 0.25, 0.05])
    criterion = Criterion("balanced_accuracy", Balance(shares))
    found = Judge(LABELS, criterion).compute_metrics(EvalPrediction(LOGITS, REFERENCES))
    adjusted = LOGITS - np.log(shares)
    scored = score(adjusted, REFERENCES, LABELS)
    assert scored["accuracy"] != (LOGITS.argmax(axis=1) == REFERENCES).mean()
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert found[name] == pytest.approx(scored[name])
    calibrated = criterion.losses(adjusted / criterion.temperature(LOGITS, REFERENCES), REFERENCES)
    assert found["calibrated_loss"] == pytest.approx(calibrated.mean())
    assert found["loss"] == pytest.approx(log_losses(LOGITS, REFERENCES).mean()), "of the data's own probabilities"


@pytest.mark.parametrize("rare", [0.5, 0.05, 0.01, 0.005])
def test_knowing_how_frequent_the_classes_are_is_never_enough(rare):
    shares = np.array([1 - rare, rare])
    entropy = -float((shares * np.log(shares)).sum())
    assert Criterion(uncertainty=uncertainty_of("log_loss", shares)).enough < 0.06 * entropy
    assert Criterion("accuracy", uncertainty=uncertainty_of("accuracy", shares)).enough < 0.021 * rare


@pytest.mark.parametrize("metric", ["log_loss", "accuracy", "balanced_accuracy", "macro_f1"])
@pytest.mark.parametrize(("images", "little"), [(4, False), (10, False), (100, True)])
def test_few_images_that_are_all_right_leave_something_to_gain(metric, images, little):
    criterion, references = Criterion(metric), np.arange(images) % 2
    logits = 5.0 * np.eye(2)[references]
    adjusted = logits / criterion.temperature(logits, references)
    loss, scored = criterion.losses(adjusted, references).mean(), score(adjusted, references, ["a", "b"])
    assert criterion.leaves_little(loss, scored["log_loss"]) == little


def test_little_to_gain_is_the_same_for_all_numbers_of_even_classes(splits, timm_checkpoint):
    assert uncertainty_of("log_loss", np.full(10, 0.1)) == uncertainty_of("macro_f1", np.array([0.9, 0.1])) == 1
    assert uncertainty_of("log_loss", np.array([0.5, 0.5, 0])) == uncertainty_of("accuracy", np.full(10, 0.1)) == 1
    assert uncertainty_of("accuracy", np.array([0.9, 0.1])) == pytest.approx(0.2), "a fifth of that of even classes"
    model, _ = build_model(str(timm_checkpoint), dict(enumerate(LABELS)))
    uneven = DatasetDict(train=splits["train"].select(range(6)), validation=splits["validation"])
    assert build_judge("log_loss", "auto", model, uneven).criterion.uncertainty == pytest.approx(0.65, abs=0.01)


def test_epochs_of_a_head_that_is_not_calibrated_are_compared_as_they_are():
    prediction = EvalPrediction(LOGITS * 9, REFERENCES)
    as_it_is, calibrated = (Judge(LABELS, calibrates=each).compute_metrics(prediction) for each in (False, True))
    assert as_it_is["calibrated_loss"] == pytest.approx(as_it_is["loss"])
    assert calibrated["calibrated_loss"] < calibrated["loss"]
