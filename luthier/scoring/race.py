"""Which way of fine-tuning suits the images: arms run in heats, and go on as long as it pays.

The probe comes first and is free of noise from training. Then every arm runs two heats, unless after one all are far
behind the probe, or one leaves little to gain. An arm that starts from the probe itself runs its second heat only if
it still leads after those of the others. From there on, arms are compared by the loss that a power law through their
last two heats predicts for the end of their last one. The arm that promises most runs its next heat; its last one only
if it is not behind by then. If it breaks its promise, another one may promise more. The race ends when no arm promises
less than the probe and clearly less than the best weights so far, when one has run its last heat, or when time is up.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Trainer, TrainerState

from luthier.errors import NotFinite
from luthier.output_dir import NO_TIME, mark_unfinished
from luthier.scoring.race_record import Course, Heat, Heats, read_record, write_record
from luthier.scoring.selection import Candidate, choose, is_enough, load_candidate, score_candidates
from luthier.terminal import plural, say
from luthier.training.arms import Arm, State, Workshop, plan_arm
from luthier.training.callbacks import EpochTable
from luthier.training.checkpoints import check_named, checkpoints_by_step, load_weights, newest_shared, step_of
from luthier.training.heats import EndInTime
from luthier.training.recipe import BATCH, PROBE, Recipe
from luthier.training.safe_trainer import SafeTrainer
from luthier.training.trainer import model_of, train

FAR = 3.0  # times the probe's loss: where no arm has less after its first heat, the race ends
MIN_GAIN, LEAST_GAIN = 0.05, 0.005  # that the rest of an arm must promise: a share of the best loss, or this if more
LAST_GAIN = 0.1  # that its last heat must promise, which is half of all training; a share of the best loss
LONG = 90  # seconds; of a race that may take longer it is said how long
WORK = 3  # of training on an image, in predictions of one: forward, and backward to activations and weights
TINY = 1e-9  # a loss that is as good as none


class Trained(NamedTuple):
    """An arm that has been trained up to a step.

    Attributes:
        arm: itself.
        candidates: its best weights, see `selection.score_candidates`.
        state: of its Trainer; not the Trainer itself, whose model would fill a GPU's memory in the refit.
    """

    arm: Arm
    candidates: Sequence[Candidate]
    state: TrainerState

    @property
    def best_step(self) -> int:
        """The step after which its weights were best."""
        return self.state.best_global_step or self.state.global_step


class Outcome(NamedTuple):
    """What a race ends with.

    Attributes:
        heats: all of them.
        ended: why the race has ended, for people.
        probe: what the arms had to beat; None where there is no probe.
        winner: the best arm; None where nothing was trained.
    """

    heats: Heats
    ended: str
    probe: Candidate | None = None
    winner: Trained | None = None


def plan_arms(
    recipes: Sequence[Recipe], workshop: Workshop, rows: Mapping[str, Any], starts: Mapping[str, State]
) -> list[Arm]:
    """Return the arms of a race; the probe, which needs no training, is none of them.

    Several arms have a folder each for their checkpoints, in that of the run or its fold.

    Args:
        recipes: of `recipe.choose_recipes`.
        workshop: for the Trainers.
        rows: "train" and "validation".
        starts: of `baselines.measure_probe`.
    """
    trained = [recipe for recipe in recipes if not recipe.is_probe]
    folders = [workshop.folder / "race" / recipe.name if len(trained) > 1 else workshop.folder for recipe in trained]
    arms = [
        plan_arm(recipe, workshop, rows, own, starts.get(recipe.start))
        for recipe, own in zip(trained, folders, strict=True)
    ]
    if any(arm.recipe.batch is None and arm.batch > BATCH for arm in arms):  # the run has chosen it
        each = ", ".join(f"{arm.recipe.name} {arm.batch} at {arm.training_args.learning_rate:.3g}" for arm in arms)
        say("batch", f"images in a step of all processes, and learning rate: {each}")
    return arms


def race(
    arms: Sequence[Arm], probe: Candidate | None, course: Course, resume: str | None
) -> tuple[Outcome, SafeTrainer | None]:
    """Run the arms in heats until more training does not pay; return what came of it, and the winner's Trainer.

    Every heat ends with a checkpoint and a line in `race.json`. So a race that was interrupted goes on where
    it was, and an arm goes on with its optimizer's state.

    Args:
        arms: a single one is not compared, and goes on as long as it pays.
        probe: what the arms must beat; None where there is no probe.
        course: what they share.
        resume: None, `auto`, or for a single arm the checkpoint to continue from.

    Returns the Trainer with the winner's best weights in its model; None where nothing was trained.

    Raises:
        UserError: see `trainer.train`; or the run was begun with other options or other data. NotFinite is raised
            only of a single arm, or where nothing else is left; otherwise the arm leaves the race.
    """
    rival = probe if len(arms) > 1 else None  # a single arm is not compared with the probe
    if is_enough(probe, course.judge, (arm.recipe for arm in arms)):
        return Outcome(Heats(), "the probe, which leaves little to gain", probe), None
    progress = _Progress(arms, rival, course, resume, probe.seconds if probe else 0.0)
    if progress.named:
        progress.return_to(progress.named)
    last = progress.run_heats(needs_one=probe is None)
    leading = progress.leading()
    if leading is None:
        return Outcome(progress.heats, progress.ended, probe), None
    if last is None or last[0].arm is not leading:
        last = None  # one model at a time in memory
        last = progress.advance(leading, progress.heats.of(leading.recipe.name)[-1].step)
    winner, trainer = last
    return Outcome(progress.heats, progress.ended, probe, winner), trainer


class _Progress:
    """How far a race is, from where an earlier part of the run has left it.

    Attributes:
        arms: all of them.
        rival: the probe, where the arms must beat it; None for a single arm, or without a probe.
        course: what the arms share.
        resume: see `race`.
        running: the arms that have not left.
        heats: that were run.
        ended: why the race has ended; empty where it goes on.
        named: the checkpoint that the user has named; None once training is past it.
        has_begun: something was trained in this part of the run.
        predicting: seconds of a prediction; 0 where that is not known.
        begun_at: the step from which the last training of this part of the run went on.
        scored: the candidates of an arm, by its name and the step of its best weights.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        rival: Candidate | None,
        course: Course,
        resume: str | None = None,
        predicting: float = 0.0,
    ):
        self.arms, self.rival, self.course, self.resume, self.has_begun = arms, rival, course, resume, False
        self.predicting, self.begun_at = predicting, 0
        self.scored: dict[tuple[str, int], list[Candidate]] = {}
        self.named = Path(resume) if resume and resume != "auto" else None
        self.heats, self.ended, left = read_record(course, arms, self.named) if resume else (Heats(), "", [])
        self.running = [arm for arm in arms if arm.recipe.name not in left]

    def record(self) -> None:
        """Write `race.json`."""
        left = [arm.recipe.name for arm in self.arms if arm not in self.running]
        write_record(self.course, self.arms, self.heats, self.ended, left)

    def run_heats(self, needs_one: bool) -> tuple[Trained, SafeTrainer] | None:
        """Run heats until the race ends; return what the last one has trained, None where that has left the race.

        Args:
            needs_one: there is no probe, so that the first heat runs whatever the time limit is.
        """
        last = None
        while self.running and not self.ended:
            arm, self.ended = self.choose_next()
            if arm is None:
                break
            number = self.next_heat(arm)
            expected = self.expected_seconds(arm, number)
            if (self.heats or not needs_one) and not self.course.ends_in_time(expected):
                self.ended = NO_TIME
                break
            last = None  # one model at a time in memory
            last = self._run_heat(arm, number, expected)
            if len(self.heats) == len(self.running) and not self.resume:
                self.say_most()
        self.record()
        return last

    def _run_heat(self, arm: Arm, number: int, expected: float) -> tuple[Trained, SafeTrainer] | None:
        """Run a heat and record it; None where the arm leaves the race in it."""
        may_be_partial = self.resume and not self.has_begun  # a part of it may have been trained before
        begin = self.course.stopwatch.total()
        try:
            trained, trainer = self.advance(arm, arm.ends[number])
        except NotFinite as error:
            self.leave(arm, error)
            return None
        seconds = self.course.stopwatch.total() - begin
        if may_be_partial:
            # As long for each of its steps as now. These count as an epoch at least: an evaluation is among them.
            steps = trained.state.global_step - self.heats.steps(arm.recipe.name)
            here = max(trained.state.global_step - self.begun_at, min(arm.steps_per_epoch, steps), 1)
            seconds = max(seconds * max(1.0, steps / here), expected)
        heat = _describe(trained, seconds)
        self.heats.append(heat)
        self.ended = NO_TIME if heat.step < arm.ends[number] else ""
        self.record()
        return trained, trainer

    def choose_next(self) -> tuple[Arm | None, str]:
        """Return the arm that runs the next heat, or none and why the race ends here."""
        heats, running, rival = self.heats, self.running, self.rival
        following = {arm.recipe.name: self.next_heat(arm) for arm in running}
        unfinished = [arm for arm in running if following[arm.recipe.name] < len(arm.ends)]
        # What the time limit has cut short is not seen.
        seen = {arm.recipe.name: sum(heat.step in arm.ends for heat in heats.of(arm.recipe.name)) for arm in running}
        losses = [heat.loss for heat in heats if math.isfinite(heat.loss)]
        best, leader = min(losses, default=math.inf), self.leading()
        lead = heats.of(leader.recipe.name)[-1].loss if leader else math.inf
        # Easy images, as where a probe is enough. Heats do not have the log loss beside another metric.
        in_first = leader and seen.get(leader.recipe.name) == max(seen.values()) == 1
        if rival and in_first and self.course.judge.criterion.leaves_little(lead, log_loss=math.inf):
            return None, "little left to gain"
        # A new head and a soft probe start behind, so that their arms are seen twice. What an arm gains on the probe
        # that it starts from shows at once: it is seen again after the others, and only if it still leads by then.
        shown = [arm for arm in unfinished if seen[arm.recipe.name] == 1 and arm.recipe.start == PROBE]
        behind = [arm for arm in shown if heats.of(arm.recipe.name)[-1].loss > lead]
        early = [arm for arm in unfinished if seen[arm.recipe.name] < 2 and arm not in behind]
        if early:
            arm = min(early, key=lambda arm: (following[arm.recipe.name], arm in shown))
            far = rival and seen[arm.recipe.name] and all(loss >= FAR * rival.loss for loss in losses)
            return (None, "the probe far ahead") if far else (arm, "")
        going = [arm for arm in unfinished if arm not in behind]
        # Every arm runs its first two heats, so that one that ends with them does not end the training of others.
        if not going or any(arm not in unfinished and len(arm.ends) > 2 for arm in running):
            return None, "its last heat"

        def pays(arm: Arm) -> bool:
            last = following[arm.recipe.name] + 1 == len(arm.ends)
            if last and heats.of(arm.recipe.name)[-1].loss >= (1 + MIN_GAIN) * best:
                return False  # it is behind
            wanted = best - max((LAST_GAIN if last else MIN_GAIN) * best, LEAST_GAIN)
            return self.promise(arm) < min(wanted, rival.loss if rival else math.inf)

        chosen = min(filter(pays, going), key=self.promise, default=None)
        return chosen, "" if chosen else "no more gain in sight"

    def next_heat(self, arm: Arm) -> int:
        """Return the number of the heat that an arm runs next, from 0 on; a checkpoint may be past the first ones."""
        begun = step_of(self.named) if self.named else 0
        done = self.heats.steps(arm.recipe.name)
        return sum(end <= done or (end < begun and end < arm.ends[-1]) for end in arm.ends)

    def expected_seconds(self, arm: Arm, number: int) -> float:
        """Return the seconds that a heat will take: by the arm's last one, another arm's first one, or predictions."""
        name = arm.recipe.name
        own = self.heats.of(name)
        if own and not arm.schedule:  # a time limit has cut it short; it may end after any epoch, see `EndInTime`
            return self.heats.seconds(name) / self.heats.epochs(name)
        lengths = [end - begin for begin, end in zip((0, *arm.ends), arm.ends, strict=False)]
        if number == 0 or not own:  # a named checkpoint may be past the first heats
            steps = lengths[number] if arm.schedule else min(lengths[number], arm.steps_per_epoch)
            unmeasured = WORK * self.predicting * arm.batch * steps
            return max((heat.seconds for heat in self.heats), default=unmeasured)
        return own[-1].seconds * lengths[number] / lengths[number - 1]

    def say_most(self) -> None:
        """Say how long the race may go on when every arm has run a heat: all to their last one, and one through it."""
        rates = [(arm, self.heats.seconds(arm.recipe.name) / arm.ends[0]) for arm in self.running]
        if rates and self.course.time_limit is None and all(len(arm.ends) > 1 for arm, _ in rates):
            before = [(arm, rate, arm.ends[max(1, len(arm.ends) - 2)]) for arm, rate in rates]  # all run a second one
            seconds = sum(rate * (end - arm.ends[0]) for arm, rate, end in before)
            seconds += max(rate * (arm.ends[-1] - end) for arm, rate, end in before)
            if seconds > LONG and self.choose_next()[0]:  # or it ends here
                say("race", f"it may take {plural(round(seconds / 60), 'minute')} more (see --time_limit)")

    def promise(self, arm: Arm) -> float:
        """Return the loss where an arm's last two heats lead at the end of its training."""
        before, now = self.heats.of(arm.recipe.name)[-2:]
        return predict_loss(before, now, now.epochs * arm.ends[-1] / now.step)

    def leading(self) -> Arm | None:
        """Return the arm with the lowest loss; None where nothing was trained."""
        trained = [arm for arm in self.arms if self.heats.of(arm.recipe.name)]
        return min(trained, key=lambda arm: self.heats.of(arm.recipe.name)[-1].loss, default=None)

    def leave(self, arm: Arm, error: NotFinite) -> None:
        """Let an arm leave the race with its heats.

        Raises:
            NotFinite: the error, where nothing else is left.
        """
        if self.rival is None and len(self.running) == 1:
            raise error
        self.running.remove(arm)
        self.heats[:] = [heat for heat in self.heats if heat.arm != arm.recipe.name]
        say("careful", f"{arm.recipe.name} leaves the race: {error}")
        self.ended = "" if self.running else "no recipe left"

    def advance(self, arm: Arm, end: int) -> tuple[Trained, SafeTrainer]:
        """Train an arm up to a step, from its newest checkpoint or the named one; score its best weights so far."""
        checkpoint = self.named or newest_shared(arm.folder, arm.is_main_process)
        self.begun_at = step_of(checkpoint) if checkpoint else 0
        if not self.has_begun:
            if self.resume:
                say("resume", _where(checkpoint, self.heats))
            EpochTable.write_header(arm.training_args)
            self.has_begun = True
        if self.named and step_of(self.named) < end:
            self.named = None
        return self._train(arm, end, checkpoint)

    def _train(self, arm: Arm, end: int, checkpoint: Path | None) -> tuple[Trained, SafeTrainer]:
        trainer, course, name = arm.trainer(), self.course, arm.recipe.name
        self.record()  # nothing is written before the settings are known to work
        if arm.schedule is None:
            trainer.add_callback(EndInTime(course.ends_in_time))
        there = checkpoint is not None and step_of(checkpoint) >= end
        train(trainer, end if arm.schedule or there else None, checkpoint, course.stop)
        shares = (1.0,) if course.only_trained else arm.recipe.shares
        key = name, trainer.state.best_global_step or trainer.state.global_step
        if key not in self.scored:
            self.scored[key] = score_candidates(trainer, arm.rows["validation"], arm.start, shares, course.judge, name)
        course.stopwatch.end("evaluate")
        return Trained(arm, self.scored[key], trainer.state), trainer

    def return_to(self, named: Path) -> None:
        """Go back to the named checkpoint: later ones are removed, and the run no longer counts as finished.

        Raises:
            UserError: it cannot go on from there; then nothing is removed.
        """
        arm = self.arms[0]
        check_named(named, arm.origin)
        load_weights(arm.workshop.copy(), named)
        mark_unfinished(self.course.stop.run_dir)
        if arm.is_main_process:
            for step, checkpoint in checkpoints_by_step(arm.folder).items():
                if step > step_of(named):
                    shutil.rmtree(checkpoint)
        self.record()


def keep_best(
    outcome: Outcome, trained: SafeTrainer | None, workshop: Workshop, starts: Mapping[str, State]
) -> tuple[Candidate, Trainer]:
    """Return the weights that are best on validation, and a Trainer whose model has them; see `selection.choose`.

    Args:
        outcome, trained: of `race`.
        workshop: for the probe's Trainer.
        starts: of `baselines.measure_probe`.
    """
    winner = outcome.winner
    kept = choose(outcome.probe, winner.candidates if winner else ())
    if kept.is_probe or winner is None or trained is None:
        trainer, start = workshop.predictor(starts["probe"]), None
    else:
        trainer, start = trained, winner.arm.start
    load_candidate(model_of(trainer), start, kept)
    return kept, trainer


def predict_loss(before: Heat, now: Heat, epochs: float) -> float:
    """Return the loss that a power law through two heats predicts after a number of epochs."""
    if not math.isfinite(before.loss) or now.epochs <= before.epochs:  # as in a record that was edited
        return now.loss
    ratio = max(now.loss, TINY) / max(before.loss, TINY)
    slope = math.log(ratio) / math.log(now.epochs / before.epochs)
    return now.loss * (epochs / now.epochs) ** min(slope, 0.0)


def _describe(trained: Trained, seconds: float) -> Heat:
    best = min(trained.candidates, key=lambda candidate: candidate.loss)
    name, state = trained.arm.recipe.name, trained.state
    epochs, accuracy = float(state.epoch or 0), best.validation["accuracy"]
    return Heat(name, state.global_step, epochs, best.loss, accuracy, round(seconds, 3))


def _where(checkpoint: Path | None, heats: list[Heat]) -> str:
    """Return where an interrupted run goes on."""
    without = f"after {plural(len(heats), 'heat')}" if heats else "there is no whole checkpoint: from the start"
    return f"from {checkpoint}" if checkpoint else without
