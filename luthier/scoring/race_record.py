"""The record of a race, from which an interrupted one goes on."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from luthier.errors import UserError
from luthier.output_dir import written_whole
from luthier.training.arms import Arm
from luthier.training.checkpoints import step_of

logger = logging.getLogger(__name__)

RECORD = "race.json"  # in the directory of a run: when the heats of its arms end, those finished, why the race ended


class Heat(NamedTuple):
    """How an arm did in a heat.

    Attributes:
        arm: name of its recipe.
        step: at which the heat ended.
        epochs: that the arm has trained so far.
        loss: of its best weights so far, see `selection.Candidate.loss`.
        accuracy: on validation, of the same weights.
        seconds: that the heat took, with its evaluation; after an interruption within it at least those that were
            expected.
        metric: of the loss, see `criterion.Criterion`.
    """

    arm: str
    step: int
    epochs: float
    loss: float
    accuracy: float
    seconds: float
    metric: str = "log_loss"


def read_record(run_dir: Path, arms: Sequence[Arm], metric: str, named: Path | None = None) -> tuple[list[Heat], str]:
    """Return the heats of an earlier part of a race and why it ended, if it has.

    Args:
        run_dir: the directory of the run, or of its fold.
        arms: of the race.
        metric: of its losses, see `criterion.Criterion`.
        named: a checkpoint up to which heats count.

    Raises:
        UserError: their losses are of another metric.
    """
    path = run_dir / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        planned, heats, ended = record["arms"], [Heat(**row) for row in record["heats"]], record["ended"]
    except FileNotFoundError:
        return [], ""
    except (ValueError, TypeError, KeyError) as error:
        logger.warning(f"Not used: {path}, which cannot be read ({error}). The checkpoints are")
        return [], ""
    ends = {arm.recipe.name: list(arm.ends) for arm in arms}
    if planned.keys() != ends.keys():  # another race: its checkpoints are in other folders
        return [], ""
    for heat in heats:
        if heat.metric != metric:
            raise UserError(
                f"{run_dir} was begun with --metric {heat.metric}: resume it with the same, or give another "
                "--output_dir"
            )
    if named is None:
        return heats, ended if planned == ends else ""
    return [heat for heat in heats if heat.step <= step_of(named)], ""


def write_record(run_dir: Path, arms: Sequence[Arm], heats: Sequence[Heat], ended: str) -> None:
    """Write the heats of a race and why it has ended, or "", on the main process."""
    if arms and arms[0].is_main_process:
        planned = {arm.recipe.name: arm.ends for arm in arms}
        record = {"arms": planned, "ended": ended, "heats": [heat._asdict() for heat in heats]}
        with written_whole(run_dir / RECORD) as whole:
            whole.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
