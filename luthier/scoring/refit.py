"""The shipped model: what was chosen learns again, from all images that it may learn from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, Trainer

from luthier.cache import list_of
from luthier.errors import ImagesChanged, NoSpace, NotFinite, UserError
from luthier.familiarity import Familiarity, class_shares_of
from luthier.images.views import ImageRows
from luthier.output_dir import NO_TIME
from luthier.run_files import REFIT
from luthier.scoring.baselines import ProbeResults
from luthier.scoring.experiment import Experiment, Result
from luthier.scoring.familiarity import refit_familiarity
from luthier.scoring.intervals import TINY, standard_error
from luthier.scoring.race import WORK
from luthier.scoring.race_record import Course
from luthier.scoring.selection import load_candidate
from luthier.terminal import say
from luthier.training.arms import Arm, State, Workshop
from luthier.training.checkpoints import newest_shared
from luthier.training.features import join
from luthier.training.probe import SOFT, fit_shared_probe, state_with_probe
from luthier.training.recipe import blend
from luthier.training.trainer import build_predictor, model_of, predict, train
from models import linear_head

SHARE = 0.5  # of the weights that have learned from all images, in those that are shipped
WORSE = 2  # standard errors by which its loss on validation may be higher than that of the scored weights
AROUND = 2000  # predictions on a CPU that take about as long as a run's imports and its report, some 20 seconds

FAILURES: dict[type[UserError], str] = {  # of a refit, after which the scored weights are shipped
    NotFinite: "its loss is not finite",
    ImagesChanged: "images have changed during the run",
    NoSpace: "its checkpoints do not fit on the disk",
}


class Plan(NamedTuple):
    """Whether a model is refit, and on what.

    Attributes:
        splits: to learn from.
        images: how many these are.
        scored_on: how many images the scored weights have learned from.
        seconds: that it takes, as far as can be foreseen.
        refusal: why it is not done, for people; empty where it is.
        averaged: the mean of the scored weights and those of the refit is to be shipped, or is.
    """

    splits: tuple[str, ...]
    images: int
    scored_on: int
    seconds: float
    refusal: str
    averaged: bool = False

    @property
    def done(self) -> bool:
        """Whether the model is refit, or was."""
        return not self.refusal


def plan_refit(
    experiment: Experiment, result: Result, option: str, time_limit: float | None, folds: int | None = None
) -> Plan:
    """Return whether the kept weights are refit, and on what.

    Args:
        experiment: of the run.
        result: of the run.
        option: `none`, or `auto` to do it where it takes at most as much work again as the run. Work is counted in
            images and not in seconds, so that a run that is resumed decides as one that was not interrupted.
        time_limit: minutes that the whole run may take; None is no limit.
        folds: how many the run had; None is one.
    """
    splits, outcome = experiment.splits, result.outcome
    # Nothing is learned from a test split that the data brings.
    used = tuple(str(split) for split in splits if split != "test" or split not in experiment.own_splits)
    images, scored_on = sum(len(splits[split]) for split in used), len(result.learned_from)
    if experiment.stream:
        scored_on = scored_on if result.kept.is_probe else len(experiment.stream.labels)
        return Plan(used, scored_on, scored_on, 0.0, "the images are streamed")
    winner = outcome.winner
    own = outcome.heats.of(result.kept.arm)
    share = winner.best_step / max(1, own[-1].step) if winner and own else 1.0  # a checkpoint may be past them
    work = WORK * images * outcome.heats.epochs(result.kept.arm) * share
    seconds = outcome.heats.seconds(result.kept.arm) * share * images / scored_on
    refusal = ""
    if option == "none":
        refusal = "--refit none"
    elif work > AROUND + _work_of_run(splits, result) * (folds or 1):
        refusal = f"it would be more work than the run was, and take about {seconds:.0f} s"
    elif not result.course._replace(time_limit=time_limit).ends_in_time(seconds):
        refusal = NO_TIME
    trained = winner is not None and not result.kept.is_probe and winner.arm.recipe.is_pretrained
    return Plan(used, images, scored_on, seconds, refusal, averaged=trained and not refusal)


def _work_of_run(splits: DatasetDict, result: Result) -> float:
    """Return the work of a run, or of one of its folds, in predictions: training, evaluations, features, the score."""
    per_epoch = WORK * len(result.learned_from) + len(splits.get("validation", ()))
    heats = result.outcome.heats
    features = sum(len(dataset) for dataset in splits.values()) if result.probe.strength else 0  # on every process
    return sum(heats.epochs(arm) for arm in {heat.arm for heat in heats}) * per_epoch + features + len(splits["test"])


class Refitted(NamedTuple):
    """A model that has learned from more images than the scored one.

    Attributes:
        model: with its weights.
        familiarity: its own, on the main process; None where the scored model has none.
        splits: that it has learned from.
    """

    model: PreTrainedModel
    familiarity: Familiarity | None
    splits: Sequence[str]


def refit(
    plan: Plan,
    result: Result,
    splits: DatasetDict,
    images: Mapping[str, ImageRows],
    rows_of: Callable[[list[Dataset]], Any],
) -> tuple[Plan, Refitted | None]:
    """Return the plan, and the model that is shipped: the probe of all images, or trained weights.

    An arm is trained again on all images, for as many epochs as the kept weights, and the mean of both is shipped
    (Wortsman et al. 2022): see `_set_weights`. Where that fails, as in `FAILURES`, the plan says why there is none,
    and the scored weights are shipped.

    The temperature and the thresholds are those of the kept weights. Where answers make up for rare classes, they
    make up for the shares of the classes among these images.

    Args:
        plan: of `plan_refit`.
        result: of the run; checkpoints go to `refit` in its directory.
        splits: as loaded.
        images: of each split, as evaluation sees them.
        rows_of: returns the training rows of several splits together; not called where the probe is kept.

    Raises:
        UserError: see `trainer.train`.
    """
    kept, probe, workshop = result.kept, result.probe, result.workshop
    labels = [label for split in plan.splits for label in list_of(splits[split], "label")]
    if workshop.balance:
        balance = workshop.balance._replace(shares=np.bincount(labels) / len(labels))
        kept, workshop = kept._replace(class_shares=balance.shares), replace(workshop, balance=balance)
    winner = None if kept.is_probe else result.outcome.winner
    start = _start(winner.arm.recipe.start if winner else "probe", probe, plan.splits, labels, workshop)
    if winner is None:
        model = workshop.copy(start)
    else:
        try:
            with workshop.training_args.main_process_first(desc="preparing the images"):
                rows = rows_of([splits[split] for split in plan.splits])
            arm = winner.arm._replace(workshop=workshop)
            model = _train_again(arm, winner.best_step, rows, start, result.course)
        except tuple(FAILURES) as error:
            if isinstance(error, ImagesChanged) and workshop.training_args.world_size > 1:
                raise  # other processes may have read the images, and would wait for this one
            return _fail(plan, FAILURES[type(error)], str(error))
    load_candidate(model, start, kept)
    trainer = build_predictor(model, workshop.training_args)
    if winner is not None:
        plan = _set_weights(trainer, plan, result, winner.arm.rows["validation"])
        if not plan.done:
            return _fail(plan, plan.refusal, plan.refusal)
    known, of_scored = probe.known_of(winner is None), result.answers.familiarity
    familiarity = refit_familiarity(trainer, of_scored, plan.splits, images, splits, known, result.none)
    return plan, Refitted(model, familiarity, plan.splits)


def _fail(plan: Plan, refusal: str, reason: str) -> tuple[Plan, None]:
    """Return what `refit` returns where it fails, and say so.

    Args:
        plan: of the refit.
        refusal: why there is none, for the plan.
        reason: the same in detail, for the terminal.
    """
    say("careful", f"the weights from before the refit are shipped, because it fails: {reason}")
    return plan._replace(refusal=refusal, averaged=False), None


def _set_weights(trainer: Trainer, plan: Plan, result: Result, validation: Any) -> Plan:
    """Give the model of a refit the weights that are shipped: their mean with the scored ones, if that is planned.

    Validation has chosen among the epochs of the scored weights, and nothing among those of a refit, which by
    themselves are often worse on few images. The mean of weights that lie too far apart is worse than both, as after
    long training at a high rate; then those of the refit are shipped. A refit has learned from the images of
    validation. If it is clearly worse on them than the scored weights, it has failed.

    Args:
        trainer: of the refit model.
        plan: of the refit.
        result: of the run.
        validation: rows.

    Returns the plan, with what came of it.
    """
    model, judge = model_of(trainer), result.course.judge

    def losses(of: Trainer) -> np.ndarray:
        return judge.criterion.log_losses(*predict(of, validation))

    scored_losses = losses(build_predictor(result.model, result.workshop.training_args))
    scored, refitted = result.model.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    result.model.cpu()
    for share in (SHARE, 1.0) if plan.averaged else (1.0,):
        model.load_state_dict(blend(scored, refitted, share))
        behind = losses(trainer) - scored_losses
        mean, error = float(behind.mean()), standard_error(behind, judge.groups)
        tells_nothing = error < TINY  # of one image, or group
        if math.isfinite(mean) and (mean <= WORSE * error or tells_nothing):
            if share < 1:
                _average_class_shares(model, result.model)
            return plan._replace(averaged=share < 1)
    return plan._replace(refusal="it is clearly worse on validation than the scored weights", averaged=False)


def _average_class_shares(model: PreTrainedModel, scored: PreTrainedModel) -> None:
    """Note which shares of the classes the mean of two heads' biases makes up for: their geometric mean."""
    new, old = class_shares_of(model), class_shares_of(scored)
    if new and old:
        both = np.sqrt(np.array(new) * np.array(old))
        model.config.class_shares = (both / both.sum()).tolist()


def _start(
    kind: str, probe: ProbeResults, splits: Sequence[str], labels: list[int], workshop: Workshop
) -> State | None:
    """Return the state that training starts with, see `Recipe.start`; None is the model as it was built.

    Args:
        kind: of the start.
        probe: of the run.
        splits: that the head is fitted on.
        labels: of their images.
        workshop: of the refit.
    """
    if kind == "new":
        return None
    features = join([probe.features[split] for split in splits]) if probe.features else None
    head, strength = linear_head(workshop.model), SOFT if kind == "soft probe" else probe.strength
    assert head is not None and strength is not None  # there is a probe
    fitted = fit_shared_probe(workshop.training_args.device, features, labels, strength, workshop.balance)
    return state_with_probe(workshop.model, head, fitted)


def _train_again(arm: Arm, best: int, rows: Any, start: State | None, course: Course) -> PreTrainedModel:
    """Train an arm on other rows, to the step that is as many epochs as its best one."""
    folder = str(course.folder / REFIT / f"{arm.recipe.name}-{best}")  # a resumed run may have another winner
    training_args = replace(
        arm.training_args, output_dir=folder, eval_strategy="no", save_strategy="epoch", max_steps=-1
    )
    shop = replace(arm.workshop, callbacks=(course.stop,))  # its seconds are a stage of their own
    again = arm._replace(workshop=shop, rows={"train": rows}, start=start, training_args=training_args)
    scale = again.steps_per_epoch / arm.steps_per_epoch
    if arm.schedule:
        ends = tuple(round(end * scale) for end in arm.ends)
        again = again._replace(ends=ends, schedule=arm.schedule._replace(ends=ends))
    trainer = again.trainer()
    checkpoint = newest_shared(again.folder, again.is_main_process)
    train(trainer, max(1, round(best * scale)), checkpoint, course.stop)
    return model_of(trainer)
