"""The refit: what it learns from, for how long, and where it goes on."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

import luthier.scoring.refit as module
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.refit import Plan
from luthier.scoring.selection import Candidate
from luthier.training.arms import Arm, Workshop
from luthier.training.heats import Schedule
from luthier.training.probe import SOFT
from luthier.training.recipe import RECIPES


class Fitted(Exception):
    """Ends a refit where its probe is fitted."""


@pytest.mark.parametrize(("start", "strength"), [(None, 0.5), ("probe", 0.5), ("soft probe", SOFT)])
def test_probe_of_a_refit_learns_each_image_with_its_label(monkeypatch, start, strength):
    labels = {"test": [2, 0], "validation": [1], "train": [0, 1, 2]}
    splits = DatasetDict({split: Dataset.from_dict({"label": each}) for split, each in labels.items()})
    features = {split: torch.tensor(each).float()[:, None] for split, each in labels.items()}
    seen = []

    def fit(trainer, *arguments):
        seen.extend(arguments)
        raise Fitted

    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    monkeypatch.setattr(module, "fit_shared_probe", fit)
    winner = SimpleNamespace(arm=SimpleNamespace(recipe=SimpleNamespace(start=start)))
    result = SimpleNamespace(
        kept=SimpleNamespace(is_probe=start is None, class_shares=None),
        probe=SimpleNamespace(features=features, strength=0.5),
        workshop=SimpleNamespace(balance=None, model=None, predictor=lambda: None),
        outcome=SimpleNamespace(winner=winner),
    )
    plan = Plan(("train", "validation", "test"), 6, 3, 1.0, "")
    with pytest.raises(Fitted):
        module.refit(plan, result, splits, {}, None)
    assert seen[0][:, 0].tolist() == seen[1] == [0, 1, 2, 1, 2, 0] and seen[2] == strength


@pytest.mark.parametrize(
    ("averaged", "best", "shipped"),
    [
        (True, 4.5, 4.0),
        (True, 6.0, 4.0),  # the refit alone would be better, but it has learned from these images
        (True, None, 6.0),  # the mean is worse than both
        (False, 6.0, 6.0),
        (True, 1.0, None),
        (False, float("nan"), None),
    ],
)
def test_mean_of_scored_and_refit_weights_is_shipped_unless_it_is_worse_on_validation(averaged, best, shipped):
    """The loss is the distance from `best`, or zero at both ends."""

    class Model(torch.nn.Linear):
        config = SimpleNamespace()

    def loss_of(model: Model) -> float:
        weight = model.weight.item()
        return abs(weight - best) if best is not None else float(weight == 4)

    def log_losses(logits: float, references: None) -> np.ndarray:
        return np.array([0.9, 1.1]) * logits

    scored, trained = Model(1, 1), Model(1, 1)
    for model, value in ((scored, 2.0), (trained, 6.0)):
        model.load_state_dict({"weight": torch.full((1, 1), value), "bias": torch.full((1,), value)})
    judge = SimpleNamespace(criterion=SimpleNamespace(log_losses=log_losses), groups=None)
    workshop, course = SimpleNamespace(training_args=None), SimpleNamespace(judge=judge)
    result = SimpleNamespace(workshop=workshop, course=course, model=scored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_predictor", lambda model, args: SimpleNamespace(model=model))
        patch.setattr(module, "predict", lambda trainer, rows: (loss_of(trainer.model), None))
        plan = Plan(("train",), 2, 1, 1.0, "", averaged)
        plan = module._set_weights(SimpleNamespace(model=trained), plan, result, None)
    assert plan.done == (shipped is not None) and scored.weight.item() == scored.bias.item() == 2
    if shipped:
        assert trained.weight.item() == trained.bias.item() == shipped and plan.averaged == (shipped == 4)
    else:
        assert "worse on validation" in plan.refusal


def test_refit_follows_the_schedule_of_the_scored_weights_and_goes_on_in_a_folder_of_its_own(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(Arm, "trainer", lambda self: self)
    monkeypatch.setattr(module, "newest_shared", lambda folder, is_main: folder / "checkpoint-7")
    monkeypatch.setattr(module, "model_of", lambda trainer: trainer)
    monkeypatch.setattr(module, "train", lambda trainer, *arguments: trained.append(arguments))
    args = TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=10, use_cpu=True, report_to="none")
    schedule, rows = Schedule((10, 30, 70), 0.1), {"train": range(100)}
    arm = Arm(RECIPES["full"], Workshop(None, args, None), args, rows, schedule.ends, schedule, None)
    again = module._train_again(arm, 30, range(150), None, SimpleNamespace(folder=tmp_path, stop=None))
    assert again.ends == again.schedule.ends == (15, 45, 105) and again.schedule.warmup == 0.1
    assert trained == [(45, tmp_path / "refit/full-30/checkpoint-7", None)]


def test_refit_weights_are_blended_and_calibrated_as_the_scored_ones(monkeypatch):
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1)})
    model.config = SimpleNamespace()
    start, end = (
        {"head.weight": torch.full((1, 1), value), "head.bias": torch.full((1,), value)} for value in (2.0, 6.0)
    )
    model.load_state_dict(end)
    replaced = {
        "_start": lambda *_: start,
        "_train_again": lambda *_: model,
        "build_predictor": lambda model, args: SimpleNamespace(model=model),
        "_set_weights": lambda trainer, plan, *_: plan,
        "refit_familiarity": lambda *_: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("luthier.training.layers.linear_head", lambda model: "head")
    args = SimpleNamespace(main_process_first=lambda desc: contextlib.nullcontext(), world_size=1)
    arm = SimpleNamespace(recipe=RECIPES["lp_ft"], rows={"validation": None}, _replace=lambda **_: None)
    result = SimpleNamespace(
        kept=Candidate(0.25, 2.0, 0.3, {}, {}, np.zeros(1), "lp_ft"),
        probe=SimpleNamespace(known_of=lambda is_probe: None),
        workshop=SimpleNamespace(balance=None, training_args=args),
        outcome=SimpleNamespace(winner=SimpleNamespace(arm=arm, best_step=3)),
        answers=SimpleNamespace(familiarity=None), course=None, none=None,
    )  # fmt: skip
    splits = DatasetDict(train=Dataset.from_dict({"label": [0]}))
    _, refitted = module.refit(Plan(("train",), 1, 1, 1.0, ""), result, splits, {}, lambda parts: None)
    head = refitted.model["head"]
    assert head.weight.item() == head.bias.item() == 1.5  # a fourth of the way is 3, at temperature 2
    assert model.config.unsure_below == 0.3


@pytest.mark.parametrize(
    ("behind", "groups", "done"),
    [
        ([1.0, -0.8] * 4, None, True),  # 0.1 worse, with an error of 0.32
        ([0.3] * 4 + [-0.05] * 4, None, False),  # 0.125, with an error of 0.062
        ([0.3] * 4 + [-0.05] * 4, [0] * 4 + [1] * 4, True),  # of two groups it is 0.124
    ],
)
def test_refit_fails_only_where_it_is_worse_by_more_than_chance_explains(monkeypatch, behind, groups, done):
    class Model(torch.nn.Linear):
        config = SimpleNamespace()

    scored, trained = Model(1, 1), Model(1, 1)
    monkeypatch.setattr(module, "build_predictor", lambda model, args: SimpleNamespace(model=model))
    monkeypatch.setattr(
        module, "predict", lambda trainer, _: (np.zeros(8) if trainer.model is scored else np.array(behind), None)
    )
    criterion = SimpleNamespace(log_losses=lambda losses, _: losses)
    judge = SimpleNamespace(criterion=criterion, groups=None if groups is None else np.array(groups))
    workshop, course = SimpleNamespace(training_args=None), SimpleNamespace(judge=judge)
    result = SimpleNamespace(workshop=workshop, course=course, model=scored)
    plan = Plan(("train",), 2, 1, 1.0, "", True)
    assert module._set_weights(SimpleNamespace(model=trained), plan, result, None).done == done


def test_mean_of_two_heads_makes_up_for_the_geometric_mean_of_their_shares(monkeypatch):
    new, old = (SimpleNamespace(config=SimpleNamespace(class_shares=each)) for each in ([0.8, 0.2], [0.5, 0.5]))
    monkeypatch.setattr(module, "class_shares_of", lambda model: model.config.class_shares)
    module._average_class_shares(new, old)
    assert new.config.class_shares == pytest.approx([2 / 3, 1 / 3]) and old.config.class_shares == [0.5, 0.5]


@pytest.mark.parametrize(("averaged", "shares"), [(True, [2 / 3, 1 / 3]), (False, [0.8, 0.2])])
def test_config_of_the_mean_has_the_shares_that_its_bias_makes_up_for(monkeypatch, averaged, shares):
    scored, trained = torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)
    for model, own in ((scored, [0.5, 0.5]), (trained, [0.8, 0.2])):
        model.config = SimpleNamespace(class_shares=own)
    monkeypatch.setattr(module, "class_shares_of", lambda model: model.config.class_shares)
    monkeypatch.setattr(module, "build_predictor", lambda model, args: SimpleNamespace(model=model))
    monkeypatch.setattr(module, "predict", lambda *_: (np.ones(4), None))
    judge = SimpleNamespace(criterion=SimpleNamespace(log_losses=lambda losses, _: losses), groups=None)
    workshop, course = SimpleNamespace(training_args=None), SimpleNamespace(judge=judge)
    result = SimpleNamespace(workshop=workshop, course=course, model=scored)
    plan = module._set_weights(SimpleNamespace(model=trained), Plan(("train",), 2, 1, 1.0, "", averaged), result, None)
    assert plan.averaged == averaged and trained.config.class_shares == pytest.approx(shares)


@pytest.mark.parametrize("is_probe", [False, True])
def test_refit_has_all_its_splits_and_a_bank_of_what_its_own_weights_see(monkeypatch, is_probe):
    model, joined, learned = SimpleNamespace(), [], []
    replaced = {
        "_start": lambda *_: None,
        "_train_again": lambda *_: model,
        "load_candidate": lambda *_: None,
        "build_predictor": lambda model, args: SimpleNamespace(model=model),
        "_set_weights": lambda trainer, plan, *_: plan,
        "refit_familiarity": lambda *given: learned.append(given),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(module, name, value)
    args = SimpleNamespace(main_process_first=lambda desc: contextlib.nullcontext(), world_size=1)
    arm = SimpleNamespace(recipe=RECIPES["full"], rows={"validation": None}, _replace=lambda **_: None)
    result = SimpleNamespace(
        kept=Candidate(1.0, 1.0, 0.3, {}, {}, np.zeros(1), "probe" if is_probe else "full"),
        probe=ProbeResults(features={"train": "of the pretrained weights"}),
        workshop=SimpleNamespace(balance=None, training_args=args, copy=lambda start: model),
        outcome=SimpleNamespace(winner=SimpleNamespace(arm=arm, best_step=3)),
        answers=SimpleNamespace(familiarity="scored"), course=None, none=2,
    )  # fmt: skip
    splits = DatasetDict({split: Dataset.from_dict({"label": [row]}) for row, split in enumerate(("train", "own"))})
    plan, images = Plan(("train", "own"), 2, 1, 1.0, ""), {}
    _, refitted = module.refit(plan, result, splits, images, joined.extend)
    assert [part["label"][:] for part in joined] == ([] if is_probe else [[0], [1]])
    ((trainer, *given),) = learned
    known = {"train": "of the pretrained weights"} if is_probe else None
    assert trainer.model is refitted.model is model and given == ["scored", plan.splits, images, splits, known, 2]
