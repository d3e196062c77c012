"""The refit: what it learns from, for how long, and where it goes on."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import TrainingArguments

import luthier.scoring.refit as module
from luthier.errors import ImagesChanged, NoSpace, NotFinite, UserError
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.refit import Plan
from luthier.scoring.selection import Candidate
from luthier.training.arms import Arm, Workshop
from luthier.training.heats import Schedule
from luthier.training.probe import SOFT
from luthier.training.recipe import RECIPES


class Fitted(Exception):
    """Ends a refit where its probe is fitted."""


def refit_without_training(monkeypatch, kept: Candidate, model, rows_of=lambda parts: None, processes=1, **replaced):
    """Refit on two images, where nothing is trained; return what `refit` does, and the splits.

    Args:
        kept: of the run.
        model: of the refit.
        rows_of: see `refit`.
        processes: of the run.
        replaced: functions of the module.
    """
    usual = {
        "_start": lambda *_: None,
        "_train_again": lambda *_: model,
        "build_predictor": lambda model, args: SimpleNamespace(model=model),
        "_set_weights": lambda trainer, plan, *_: plan,
        "refit_familiarity": lambda *_: None,
    }
    for name, value in (usual | replaced).items():
        monkeypatch.setattr(module, name, value)
    args = SimpleNamespace(main_process_first=lambda desc: contextlib.nullcontext(), world_size=processes)
    arm = SimpleNamespace(recipe=RECIPES["lp_ft"], rows={"validation": None}, _replace=lambda **_: None)
    result = SimpleNamespace(
        kept=kept,
        probe=ProbeResults(features={"train": "of the pretrained weights"}),
        workshop=SimpleNamespace(balance=None, training_args=args, copy=lambda start: model),
        outcome=SimpleNamespace(winner=SimpleNamespace(arm=arm, best_step=3)),
        answers=SimpleNamespace(familiarity="scored"), course=None, none=2,
    )  # fmt: skip
    splits = DatasetDict({split: Dataset.from_dict({"label": [row]}) for row, split in enumerate(("train", "own"))})
    plan = Plan(("train", "own"), 2, 1, 1.0, "", averaged=True)
    return module.refit(plan, result, splits, {}, rows_of), splits


def set_weights(monkeypatch, models, losses_of, averaged: bool = True, groups=None) -> Plan:
    """Set the weights of a refit, whose losses on validation are a function of the model; return the plan."""
    scored, trained = models
    monkeypatch.setattr(module, "build_predictor", lambda model, args: SimpleNamespace(model=model))
    monkeypatch.setattr(module, "predict", lambda trainer, rows: (losses_of(trainer.model), None))
    criterion = SimpleNamespace(log_losses=lambda losses, references: losses)
    course = SimpleNamespace(judge=SimpleNamespace(criterion=criterion, groups=groups))
    result = SimpleNamespace(workshop=SimpleNamespace(training_args=None), course=course, model=scored)
    plan = Plan(("train",), 2, 1, 1.0, "", averaged)
    return module._set_weights(SimpleNamespace(model=trained), plan, result, None)


class Model(torch.nn.Linear):
    """A layer with a config."""

    def __init__(self, outputs: int = 1, **config):
        super().__init__(1, outputs)
        self.config = SimpleNamespace(**config)


@pytest.mark.parametrize(("start", "strength"), [(None, 0.5), ("probe", 0.5), ("soft probe", SOFT)])
def test_probe_of_a_refit_learns_each_image_with_its_label(monkeypatch, start, strength):
    labels = {"test": [2, 0], "validation": [1], "train": [0, 1, 2]}
    splits = DatasetDict({split: Dataset.from_dict({"label": each}) for split, each in labels.items()})
    features = {split: torch.tensor(each).float()[:, None] for split, each in labels.items()}
    seen = []

    def fit(device, *arguments):
        seen.extend(arguments)
        raise Fitted

    monkeypatch.setattr(module, "linear_head", lambda model: "head")
    monkeypatch.setattr(module, "fit_shared_probe", fit)
    winner = SimpleNamespace(arm=SimpleNamespace(recipe=SimpleNamespace(start=start)))
    result = SimpleNamespace(
        kept=SimpleNamespace(is_probe=start is None, class_shares=None),
        probe=SimpleNamespace(features=features, strength=0.5),
        workshop=SimpleNamespace(balance=None, model=None, training_args=SimpleNamespace(device=None)),
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
def test_mean_of_scored_and_refit_weights_is_shipped_unless_it_is_worse_on_validation(
    monkeypatch, averaged, best, shipped
):
    """The loss is the distance from `best`, or zero at both ends."""

    def losses_of(model: Model) -> np.ndarray:
        weight = model.weight.item()
        return np.array([0.9, 1.1]) * (abs(weight - best) if best is not None else float(weight == 4))

    scored, trained = Model(), Model()
    for model, value in ((scored, 2.0), (trained, 6.0)):
        model.load_state_dict({"weight": torch.full((1, 1), value), "bias": torch.full((1,), value)})
    plan = set_weights(monkeypatch, (scored, trained), losses_of, averaged)
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
    args = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=10, use_cpu=True, report_to="none", max_steps=70
    )
    schedule, rows = Schedule((10, 30, 70), 0.1), {"train": range(100)}
    arm = Arm(RECIPES["full"], Workshop(None, args, None), args, rows, schedule.ends, schedule, None)
    again = module._train_again(arm, 30, range(150), None, SimpleNamespace(folder=tmp_path, stop=None))
    assert again.ends == again.schedule.ends == (15, 45, 105) and again.schedule.warmup == 0.1
    assert trained == [(45, tmp_path / "refit/full-30/checkpoint-7", None)]
    assert again.training_args.max_steps == -1, "or it would end after 70 steps, whatever they are of"


def test_refit_weights_are_blended_and_calibrated_as_the_scored_ones(monkeypatch):
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(1, 1)})
    model.config = SimpleNamespace()
    start, end = (
        {"head.weight": torch.full((1, 1), value), "head.bias": torch.full((1,), value)} for value in (2.0, 6.0)
    )
    model.load_state_dict(end)
    monkeypatch.setattr("luthier.training.layers.linear_head", lambda model: "head")
    kept = Candidate(0.25, 2.0, 0.3, {}, {}, np.zeros(1), "lp_ft")
    (_, refitted), _ = refit_without_training(monkeypatch, kept, model, _start=lambda *_: start)
    head = refitted.model["head"]
    assert head.weight.item() == head.bias.item() == 1.5  # a fourth of the way is 3, at temperature 2
    assert model.config.unsure_below == 0.3


@pytest.mark.parametrize(
    ("behind", "groups", "done"),
    [
        ([1.0, -0.8] * 4, None, True),  # 0.1 worse, with an error of 0.32
        ([0.3] * 4 + [-0.05] * 4, None, False),  # 0.125, with an error of 0.062
        ([0.3] * 4 + [-0.05] * 4, [0] * 4 + [1] * 4, True),  # of two groups it is 0.124
        ([0.3] * 4 + [-0.05] * 4, [0] * 8, True),  # one group tells nothing
    ],
)
def test_refit_fails_only_where_it_is_worse_by_more_than_chance_explains(monkeypatch, behind, groups, done):
    models = scored, _ = Model(), Model()

    def losses_of(model: Model) -> np.ndarray:
        return np.zeros(8) if model is scored else np.array(behind)

    plan = set_weights(monkeypatch, models, losses_of, groups=None if groups is None else np.array(groups))
    assert plan.done == done


@pytest.mark.parametrize(("averaged", "shares"), [(True, [2 / 3, 1 / 3]), (False, [0.8, 0.2])])
def test_config_of_the_mean_has_the_shares_that_its_bias_makes_up_for(monkeypatch, averaged, shares):
    """The mean of two biases makes up for the geometric mean of the shares."""
    models = scored, trained = [Model(2, class_shares=each) for each in ([0.5, 0.5], [0.8, 0.2])]
    monkeypatch.setattr(module, "class_shares_of", lambda model: model.config.class_shares)
    plan = set_weights(monkeypatch, models, lambda model: np.ones(4), averaged)
    assert plan.averaged == averaged and trained.config.class_shares == pytest.approx(shares)
    assert scored.config.class_shares == [0.5, 0.5]


@pytest.mark.parametrize("is_probe", [False, True])
def test_refit_has_all_its_splits_and_a_bank_of_what_its_own_weights_see(monkeypatch, is_probe):
    model, joined, learned = SimpleNamespace(), [], []
    kept = Candidate(1.0, 1.0, 0.3, {}, {}, np.zeros(1), "probe" if is_probe else "lp_ft")
    replaced = {"load_candidate": lambda *_: None, "refit_familiarity": lambda *given: learned.append(given)}
    (plan, refitted), splits = refit_without_training(monkeypatch, kept, model, joined.extend, **replaced)
    assert [part["label"][:] for part in joined] == ([] if is_probe else [[0], [1]])
    ((trainer, *given),) = learned
    known = {"train": "of the pretrained weights"} if is_probe else None
    assert trainer.model is refitted.model is model and given == ["scored", plan.splits, {}, splits, known, 2]


@pytest.mark.parametrize(
    ("error", "processes", "refusal"),
    [
        (NotFinite("at step 3"), 1, "its loss is not finite"),
        (ImagesChanged("a.png is gone"), 1, "images have changed during the run"),
        (ImagesChanged("a.png is gone"), 2, None),  # another process may have read it, and would wait
        (NoSpace("9 MB left"), 2, "its checkpoints do not fit on the disk"),
        (UserError("not enough memory"), 1, None),
    ],
)
def test_refit_that_fails_leaves_the_scored_weights(monkeypatch, capsys, error, processes, refusal):
    def fail(*_):
        raise error

    kept = Candidate(1.0, 1.0, 0.3, {}, {}, np.zeros(1), "lp_ft")
    end = contextlib.nullcontext() if refusal else pytest.raises(type(error), match=str(error))
    with end:
        (plan, refitted), _ = refit_without_training(monkeypatch, kept, None, processes=processes, _train_again=fail)
        assert refitted is None and plan.refusal == refusal and not plan.averaged
        said = " ".join(capsys.readouterr().out.split())
        assert f"the weights from before the refit are shipped, because it fails: {error}" in said
