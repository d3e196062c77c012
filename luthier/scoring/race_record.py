"""What the arms of a race share, and its record, from which an interrupted one goes on."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from luthier.errors import UserError
from luthier.files import atomic_write
from luthier.output_dir import NO_TIME
from luthier.processes import from_main_process
from luthier.run_files import RACE
from luthier.scoring.criterion import Judge
from luthier.terminal import Stopwatch
from luthier.training.arms import Arm
from luthier.training.checkpoints import step_of
from luthier.training.signals import Stop

logger = logging.getLogger(__name__)


class Heat(NamedTuple):
    """How an arm did in a heat.

    Attributes:
        arm: name of its recipe.
        step: at which the heat ended.
        epochs: that the arm has trained so far.
        loss: of its best weights so far, see `selection.Candidate.loss`.
        accuracy: on validation, of the same weights.
        seconds: that the heat took, with its evaluation; after an interruption within it they are estimated.
    """

    arm: str
    step: int
    epochs: float
    loss: float
    accuracy: float
    seconds: float


class Heats(list[Heat]):
    """The heats of a race, in the order in which they were run."""

    def of(self, arm: str) -> list[Heat]:
        """Return those of an arm."""
        return [heat for heat in self if heat.arm == arm]

    def seconds(self, arm: str) -> float:
        """Return the seconds that an arm has trained."""
        return sum(heat.seconds for heat in self.of(arm))

    def steps(self, arm: str) -> int:
        """Return the optimizer steps that an arm has trained."""
        return max((heat.step for heat in self.of(arm)), default=0)

    def epochs(self, arm: str) -> float:
        """Return the epochs that an arm has trained."""
        return max((heat.epochs for heat in self.of(arm)), default=0.0)


class Course(NamedTuple):
    """What all arms of a race share.

    Attributes:
        judge: scores weights on validation.
        stop: the signal handler.
        folder: of the run, or of its fold.
        stopwatch: of the run.
        time_limit: minutes that the run may take; None is no limit.
        only_trained: the trained weights are the only candidates.
        options: what losses and weights depend on, see `RunArguments.of_training`.
    """

    judge: Judge
    stop: Stop
    folder: Path
    stopwatch: Stopwatch
    time_limit: float | None = None
    only_trained: bool = False
    options: Mapping[str, Any] = MappingProxyType({})

    def ends_in_time(self, seconds: float) -> bool:
        """Tell, on every process alike, whether something that takes so long would end within the time limit."""
        in_time = self.time_limit is None or self.stopwatch.total() + seconds <= 60 * self.time_limit
        return from_main_process(in_time)


class Record(NamedTuple):
    """What is known of an earlier part of a race: its heats, why it ended or "", and the arms that have left it."""

    heats: Heats
    ended: str = ""
    left: Sequence[str] = ()


def read_record(course: Course, arms: Sequence[Arm], named: Path | None = None) -> Record:
    """Return what an earlier part of a race has noted: on every process, what the main one has read.

    A record that is damaged, or of other arms, counts as none. A race that the time limit ended goes on where there is
    more time now.

    Args:
        course: of the race.
        arms: of the race.
        named: a checkpoint up to which heats count.

    Raises:
        UserError: the race was begun with other options.
    """
    path = course.folder / RACE
    text = from_main_process(path.read_bytes() if path.exists() else None)
    if text is None:
        return Record(Heats())
    try:
        record = json.loads(text)
        planned, ended, options = dict(record["arms"]), str(record["ended"]), dict(record["options"])
        kinds = Heat.__annotations__.items()
        heats = Heats(Heat(**{name: kind(row[name]) for name, kind in kinds}) for row in record["heats"])
        more_time = (course.time_limit or math.inf) > float(record["time_limit"] or math.inf)
        left = list(record.get("left", ()))
    except (ValueError, TypeError, KeyError) as error:
        logger.warning(f"Not used: {path}, which cannot be read ({error}). The checkpoints are")
        return Record(Heats())
    ends = {arm.recipe.name: list(arm.ends) for arm in arms}
    if planned.keys() != ends.keys():  # another race: its checkpoints are in other folders
        return Record(Heats())
    for name, now in course.options.items():
        if name in options and options[name] != now:
            raise UserError(
                f"{course.folder} was begun with {_in_words(name, options[name])}, and now there would be "
                f"{_in_words(name, now)}: give the options that the run was begun with, or another --output_dir"
            )
    if named:
        return Record(Heats(heat for heat in heats if heat.step <= step_of(named)))
    if planned != ends:  # it may go on
        return Record(heats)
    return Record(heats, "" if ended == NO_TIME and more_time else ended, left)


def _in_words(name: str, value: Any) -> str:
    return f"no --{name}" if value is None else f"--{name} {value}"


def write_record(
    course: Course, arms: Sequence[Arm], heats: Sequence[Heat], ended: str, left: Sequence[str] = ()
) -> None:
    """Write the options of a race and what `Record` has of it, on the main process."""
    if arms and arms[0].is_main_process:
        planned = {arm.recipe.name: arm.ends for arm in arms}
        rows = [heat._asdict() for heat in heats]
        begun = {"options": dict(course.options), "time_limit": course.time_limit}
        record = {**begun, "arms": planned, "ended": ended, "left": left, "heats": rows}
        with atomic_write(course.folder / RACE) as whole:
            whole.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
