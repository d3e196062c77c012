"""Which way of fine-tuning suits the images: arms run in heats, and go on as long as it pays.

The probe comes first and is free of noise from training. Then every arm runs two heats. From there on, arms are
compared by where a power law through their last two heats leads at the end of the longest training, and not by where
they stand. The arm that promises most runs its next heat; its last one only if it is not behind by then. If it breaks
its promise, another one may promise more. The race ends when no arm leads beyond the probe and the best weights so
far, or when one has run its last heat.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer

from luthier.errors import NotFinite
from luthier.output_dir import NO_TIME, mark_unfinished
from luthier.scoring.race_record import Course, Heat, read_record, write_record
from luthier.scoring.selection import Candidate, choose, load_candidate, score_candidates
from luthier.terminal import plural, say
from luthier.training.arms import Arm, State, Workshop, plan_arm
from luthier.training.callbacks import EpochTable
from luthier.training.checkpoints import check_named, checkpoints_by_step, load_weights, newest_shared, step_of
from luthier.training.heats import EndInTime
from luthier.training.recipe import BATCH, Recipe
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.trainer import model_of, train

FAR = 3.0  # times the probe's loss that the arms may have after the first heat, and go on
MIN_GAIN, LEAST_GAIN = 0.05, 0.005  # that the rest of an arm must promise: a share of the best loss, and in nats

TINY = 1e-9  # a loss that is as good as none


class Outcome(NamedTuple):
    """What a race ends with.

    Attributes:
        arm: the winner; None where nothing was trained.
        trainer: the winner's; its model has the best weights.
        candidates: the winner's.
        heats: all of them, in the order in which they were run.
        reason: why the race ended, for people.
        probe: what the arms had to beat; None where there is no probe.
    """

    arm: Arm | None = None
    trainer: SafeTrainer | None = None
    candidates: Sequence[Candidate] = ()
    heats: Sequence[Heat] = ()
    reason: str = ""
    probe: Candidate | None = None

    @property
    def best_step(self) -> int:
        """The step after which the winner's weights were best."""
        assert self.trainer is not None  # something was trained
        return self.trainer.state.best_global_step or self.trainer.state.global_step

    @property
    def history(self) -> list[dict]:
        """The log of the winner's training, see `TrainerState.log_history`."""
        return self.trainer.state.log_history if self.trainer else []

    def seconds_of(self, arm: str) -> float:
        """Return the seconds that an arm has trained."""
        return sum(heat.seconds for heat in self.heats if heat.arm == arm)

    def epochs_of(self, arm: str) -> float:
        """Return the epochs that an arm has trained."""
        return max((heat.epochs for heat in self.heats if heat.arm == arm), default=0.0)

    def heats_of(self, arm: str) -> int:
        """Return how many heats an arm has run."""
        return sum(heat.arm == arm for heat in self.heats)


class Advanced(NamedTuple):
    """An arm that has been trained up to a step.

    Attributes:
        arm: itself.
        trainer: its model has the best weights so far.
        candidates: these weights, see `selection.score_candidates`.
    """

    arm: Arm
    trainer: SafeTrainer
    candidates: list[Candidate]


def enter(
    recipes: Sequence[Recipe],
    workshop: Workshop,
    rows: Mapping[str, Any],
    starts: Mapping[str, State],
    folder: Path,
) -> list[Arm]:
    """Return the arms of a race; the probe, which needs no training, is none of them.

    Args:
        recipes: of `recipe.choose_recipes`.
        workshop: for the Trainers.
        rows: "train" and "validation".
        starts: of `baselines.measure_probe`.
        folder: of the run or its fold. Several arms have a folder each in it for their checkpoints.
    """
    trained = [recipe for recipe in recipes if recipe.name != "probe"]
    folders = [folder / "race" / recipe.name if len(trained) > 1 else folder for recipe in trained]
    arms = [
        plan_arm(recipe, workshop, rows, own, starts.get(recipe.start))
        for recipe, own in zip(trained, folders, strict=True)
    ]
    if arms and arms[0].recipe.batch is None and arms[0].batch != BATCH:  # the run has chosen it
        rates = ", ".join(f"{arm.recipe.name} {arm.training_args.learning_rate:.3g}" for arm in arms)
        say("batch", f"{arms[0].batch} images in a step of all processes; learning rates: {rates}")
    return arms


def race(arms: Sequence[Arm], probe: Candidate | None, course: Course, resume: str | None) -> Outcome:
    """Run the arms in heats until more training does not pay; return the best one.

    Every heat ends with a checkpoint and a line in `race.json`. So a race that was interrupted goes on where
    it was, and an arm goes on with its optimizer's state.

    Args:
        arms: a single one is not compared, and goes on as long as it pays.
        probe: what the arms must beat; None where there is no probe.
        course: what they share.
        resume: None, `auto`, or for a single arm the checkpoint to continue from.

    Raises:
        UserError: see `trainer.train`; or the run was begun with other options or other data. NotFinite is raised
            only where nothing else is left; otherwise the arm leaves the race.
    """
    rival = probe if len(arms) > 1 else None  # a single arm is not compared with the probe
    if rival and rival.loss < course.judge.criterion.enough:
        return Outcome(reason="the probe, which leaves little to gain", probe=probe)
    state = _Race(arms, course, resume)
    heats, running, last = state.heats, list(arms), None
    while running and not state.ended:
        arm, state.ended = _choose_next(heats, running, rival, state.named)
        if arm is None:
            break
        expected = _expected_seconds(heats, arm, number := _next_heat(heats, arm, state.named))
        if (probe or heats) and not course.ends_in_time(expected):
            state.ended = NO_TIME
            break
        partial = resume and not state.has_begun  # a part of this heat may have been trained before
        last, begin = None, course.stopwatch.total()
        try:
            last = state.advance(arm, arm.ends[number])  # one model at a time in memory
        except NotFinite as error:
            _leave(arm, running, heats, error, rival)
            state.ended = "" if running else "no recipe left"
            continue
        seconds = max(course.stopwatch.total() - begin, expected if partial else 0.0)
        heats.append(_describe(last, seconds))
        state.ended = NO_TIME if heats[-1].step < arm.ends[number] else ""
        state.record()
    state.record()
    winner = _leading(heats, arms)
    if winner is None:
        return Outcome(heats=heats, reason=state.ended, probe=probe)
    if last is None or last.arm is not winner:
        last = None  # one model at a time in memory
        last = state.advance(winner, _results(heats, winner)[-1].step)
    return Outcome(last.arm, last.trainer, last.candidates, heats, state.ended, probe)


class _Race:
    """How far a race is, from where an earlier part of the run has left it.

    Attributes:
        heats: that were run, in their order.
        ended: why the race has ended; empty where it goes on.
        named: the checkpoint that the user has named; None once training is past it.
        has_begun: something was trained in this part of the run.
    """

    def __init__(self, arms: Sequence[Arm], course: Course, resume: str | None):
        self.arms, self.course, self.resume, self.has_begun = arms, course, resume, False
        self.heats, self.ended, self.named = _take_up(course, arms, resume) if resume else ([], "", None)

    def record(self) -> None:
        """Write `race.json`."""
        write_record(self.course, self.arms, self.heats, self.ended)

    def advance(self, arm: Arm, end: int) -> Advanced:
        """Train an arm up to a step, from its newest checkpoint or the named one."""
        checkpoint = self.named or newest_shared(arm.folder, arm.is_main_process)
        if self.resume and not self.has_begun:
            say("resume", _where(checkpoint, self.heats))
        if not self.has_begun:
            EpochTable.write_header(arm.training_args)
        self.has_begun, self.named = True, self.named if self.named and step_of(self.named) >= end else None
        return _advance(arm, end, self.course, checkpoint, self.record)


def keep_best(outcome: Outcome, workshop: Workshop, starts: Mapping[str, State]) -> tuple[Candidate, Trainer]:
    """Return the weights that are best on validation, and a Trainer whose model has them; see `selection.choose`."""
    candidates = [*([outcome.probe] if outcome.probe else []), *outcome.candidates]
    kept = choose(candidates)
    if kept.is_probe or outcome.arm is None or outcome.trainer is None:
        trainer, start = workshop.predictor(starts["probe"]), None
    else:
        trainer, start = outcome.trainer, outcome.arm.start
    load_candidate(model_of(trainer), start, kept)
    return kept, trainer


def predict_loss(before: Heat, now: Heat, epochs: float) -> float:
    """Return the loss that a power law through two heats predicts after a number of epochs."""
    if not math.isfinite(before.loss) or now.epochs <= before.epochs:  # as in a record that was edited
        return now.loss
    ratio = max(now.loss, TINY) / max(before.loss, TINY)
    slope = math.log(ratio) / math.log(now.epochs / before.epochs)
    return now.loss * (epochs / now.epochs) ** min(slope, 0.0)


def _choose_next(
    heats: list[Heat], arms: Sequence[Arm], probe: Candidate | None, named: Path | None = None
) -> tuple[Arm | None, str]:
    """Return the arm that runs the next heat, or none and why the race ends here."""
    following = {arm.recipe.name: _next_heat(heats, arm, named) for arm in arms}
    left = [arm for arm in arms if following[arm.recipe.name] < len(arm.ends)]
    early = [arm for arm in left if len(_results(heats, arm)) < 2]
    losses = [heat.loss for heat in heats if math.isfinite(heat.loss)]
    if early:  # every arm is seen twice: a new head starts far behind
        arm = min(early, key=lambda arm: following[arm.recipe.name])
        far = probe and _results(heats, arm) and all(loss >= FAR * probe.loss for loss in losses)
        return (None, "the probe far ahead") if far else (arm, "")
    if len(left) < len(arms):
        return None, "its last heat"
    best = min(losses, default=math.inf)
    wanted = min(best - max(MIN_GAIN * best, LEAST_GAIN), probe.loss if probe else math.inf)
    promising = [
        arm
        for arm in arms
        if _promise(heats, arm) < wanted
        # The last heat is half of all training: an arm that is behind by then does not run it.
        and (following[arm.recipe.name] + 1 < len(arm.ends) or _results(heats, arm)[-1].loss < (1 + MIN_GAIN) * best)
    ]
    if not promising:
        return None, "no more gain in sight"
    return min(promising, key=lambda arm: _promise(heats, arm)), ""


def _leave(arm: Arm, running: list[Arm], heats: list[Heat], error: NotFinite, probe: Candidate | None) -> None:
    """Let an arm leave the race with its heats.

    Raises:
        NotFinite: the error, where nothing else is left.
    """
    if probe is None and len(running) == 1:
        raise error
    running.remove(arm)
    heats[:] = [heat for heat in heats if heat.arm != arm.recipe.name]
    say("careful", f"{arm.recipe.name} leaves the race: {error}")


def _leading(heats: list[Heat], arms: Sequence[Arm]) -> Arm | None:
    """Return the arm with the lowest loss; None where nothing was trained."""
    return min(
        (arm for arm in arms if _results(heats, arm)), key=lambda arm: _results(heats, arm)[-1].loss, default=None
    )


def _promise(heats: list[Heat], arm: Arm) -> float:
    """Return the loss where an arm's last two heats lead at the end of its training."""
    before, now = _results(heats, arm)[-2:]
    return predict_loss(before, now, now.epochs * arm.ends[-1] / now.step)


def _advance(arm: Arm, end: int, course: Course, checkpoint: Path | None, record: Callable[[], None]) -> Advanced:
    """Train an arm up to a step, from a checkpoint or from the arm's start; score its best weights so far."""
    trainer = arm.trainer()
    record()  # nothing is written before the settings are known to work
    if arm.schedule is None:
        trainer.add_callback(EndInTime(course.ends_in_time))
    there = checkpoint is not None and step_of(checkpoint) >= end
    train(trainer, end if arm.schedule or there else None, checkpoint, course.stop)
    shares = (1.0,) if course.only_trained else arm.recipe.shares
    candidates = score_candidates(trainer, arm.rows["validation"], arm.start, shares, course.judge, arm.recipe.name)
    course.stopwatch.stop("evaluate")
    return Advanced(arm, trainer, candidates)


def _describe(advanced: Advanced, seconds: float) -> Heat:
    arm, trainer, candidates = advanced
    best = min(candidates, key=lambda candidate: candidate.loss)
    step, epochs, accuracy = trainer.state.global_step, float(trainer.state.epoch or 0), best.validation["accuracy"]
    return Heat(arm.recipe.name, step, epochs, best.loss, accuracy, round(seconds, 3))


def _results(heats: list[Heat], arm: Arm) -> list[Heat]:
    return [heat for heat in heats if heat.arm == arm.recipe.name]


def _next_heat(heats: list[Heat], arm: Arm, named: Path | None) -> int:
    """Return the number of the heat that an arm runs next, from 0 on; a checkpoint may be past the first ones."""
    begun = step_of(named) if named else 0
    done = max((heat.step for heat in _results(heats, arm)), default=0)
    past = [end <= done or (end < begun and end < arm.ends[-1]) for end in arm.ends]
    return sum(past)


def _expected_seconds(heats: list[Heat], arm: Arm, number: int) -> float:
    """Return the seconds that a heat will take, by those of the arm's last one, or by another arm's first one."""
    own = _results(heats, arm)
    if number == 0 or not own:  # a named checkpoint may be past the first heats
        return max((heat.seconds for heat in heats), default=0.0)
    lengths = [end - begin for begin, end in zip((0, *arm.ends), arm.ends, strict=False)]
    return own[-1].seconds * lengths[number] / lengths[number - 1]


def _where(checkpoint: Path | None, heats: list[Heat]) -> str:
    """Return where an interrupted run goes on."""
    if checkpoint:
        return f"from {checkpoint}"
    return f"after {plural(len(heats), 'heat')}" if heats else "there is no whole checkpoint: from the start"


def _take_up(course: Course, arms: Sequence[Arm], resume: str) -> tuple[list[Heat], str, Path | None]:
    """Return what `read_record` does of a run that is resumed, and the checkpoint that is named."""
    named = None if resume == "auto" else Path(resume)
    heats, reason = read_record(course, arms, named)
    if named:
        _return_to(named, arms, heats, course)
    return heats, reason, named


def _return_to(named: Path, arms: Sequence[Arm], heats: list[Heat], course: Course) -> None:
    """Let a run go on from a checkpoint: it is no longer finished, and later checkpoints are written again.

    Raises:
        UserError: it cannot go on from there; then nothing is removed.
    """
    arm = arms[0]
    check_named(named, arm.origin)
    load_weights(arm.workshop.copy(), named)
    mark_unfinished(course.stop.run_dir)
    if arm.is_main_process:
        for step, checkpoint in checkpoints_by_step(arm.folder).items():
            if step > step_of(named):
                shutil.rmtree(checkpoint)
    write_record(course, arms, heats, "")
