"""The directory of a run: which one is free, whether its run has ended, and a lock against a second run."""

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from luthier.errors import UserError
from luthier.files import expand_home, lock_folder
from luthier.run_files import (
    BACKBONE,
    CARD,
    CONFIG,
    EARLIER_CARD,
    LEARNED_FROM,
    METRICS,
    ONNX,
    RACE,
    SCORED,
    WRITTEN,
)
from luthier.terminal import quote

NO_TIME = "the time limit"  # why a race ended, or why there is no refit: in race.json and metrics.json too
# What a run writes first; another folder that holds folders, such as classes, is none of a run.
# The Trainer makes the folder of an arm before there is a record, and a kept probe has none.
OF_RUNS = (
    RACE, "race/*/", "checkpoint-*", "damaged-checkpoint-*", "fold-*", BACKBONE, LEARNED_FROM,
    f"{SCORED}/{LEARNED_FROM}", METRICS,
)  # fmt: skip
ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".onnx", ".png")  # of its weights and figures
LOCK = ".lock"  # in the directory while a run writes there


def free_output_dir(
    given: str | None, name: str, resume_from_checkpoint: str | None, replaced: Collection[str] = ()
) -> Path:
    """Return where a run writes: the directory asked for, or the next free one under `outputs/`.

    Args:
        given: `--output_dir`.
        name: of the directory under `outputs/` where none is given.
        resume_from_checkpoint: `auto`, a checkpoint, or None.
        replaced: files that the command writes again.

    Raises:
        UserError: the directory asked for holds something that the run does not continue.
    """
    if given is None:
        if resume_from_checkpoint == "auto":
            return Path("outputs", name)
        candidates = (Path("outputs", name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
        return next(path for path in candidates if not path.exists())
    path = expand_home(given)
    continues = resume_from_checkpoint == "auto" or (
        resume_from_checkpoint is not None and path.resolve() in Path(resume_from_checkpoint).resolve().parents
    )
    if path.is_file() or (path.is_dir() and not is_empty(path, replaced) and not continues):
        raise UserError(
            f"--output_dir {given} already holds something, which is neither overwritten nor deleted: give another, "
            "leave the option out to use the next free name under outputs/, or let train.py continue an interrupted "
            "run with --resume_from_checkpoint auto"
        )
    has_run = any(any(path.glob(pattern)) for pattern in OF_RUNS)
    if path.is_dir() and not has_run and any(entry.is_dir() for entry in path.iterdir()):
        raise UserError(f"--output_dir {given} holds folders, but no run that could go on: give another")
    return path


def is_of_run(path: Path) -> bool:
    """Tell whether a file was written by a run, or belongs to the model that it lies beside."""
    folders = (path.parent, path.parent.parent) if path.parent.name == ONNX else (path.parent,)
    beside_model = any((folder / name).exists() for folder in folders for name in (CONFIG, METRICS))
    return beside_model and path.exists() and (path.name in WRITTEN or path.name.endswith(ENDINGS))


def check_folds(output_dir: Path, folds: int | None) -> None:
    """Check that an interrupted run goes on with folds, or without, as it was begun.

    Args:
        output_dir: of the run; it may not be there yet.
        folds: of `--folds`.

    Raises:
        UserError: it was begun otherwise, so that nothing of it would be used.
    """
    if output_dir.is_dir() and not has_ended(output_dir):
        in_folds = any(output_dir.glob("fold-*/*"))
        alone = (output_dir / RACE).exists() or any(output_dir.glob("checkpoint-*"))
        begun_otherwise = alone if folds else in_folds
        if begun_otherwise:
            raise UserError(
                f"the run in {output_dir} was begun with{'out' if folds else ''} --folds: go on with it as it was "
                "begun, or give another --output_dir"
            )


def is_empty(folder: Path, besides: Collection[str] = ()) -> bool:
    """Tell whether a directory holds nothing but some files, and the lock that a killed run may have left."""
    return {path.name for path in folder.iterdir()} <= {LOCK, *besides}


def has_ended(output_dir: Path) -> bool:
    """Tell whether a run has written all of its output.

    The model card comes last. Mounted buckets upload in an order of their own, so the weights must be there too.
    """
    return all((output_dir / name).exists() for name in (METRICS, CARD)) and has_weights(output_dir)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds the weights of a model, or some of them."""
    return any(folder.glob("model*.safetensors"))


def describe_if_ended(output_dir: Path, settings: str, time_limit: float | None) -> str:
    """Return in words that a run has ended and has nothing left to do.

    The text is empty for a run that goes on: one that has not ended, or one that its time limit cut short and that has
    more time now.

    Args:
        output_dir: of the run.
        settings: digest of the settings given now. A run that had others does not go on: its results would be lost.
        time_limit: the minutes given now; None is no limit.

    Raises:
        UserError: see `read_metrics`.
    """
    if not has_ended(output_dir):
        return ""
    metrics = read_metrics(output_dir)
    before, done = metrics.get("time_limit"), f"{output_dir} holds a finished run: nothing is left to train"
    if metrics.get("settings") != settings:
        return (
            f"{done}. It had other options, or another version of Luthier: to train again, give another --output_dir"
        )
    if not _is_cut_short(output_dir, metrics):
        return f"{done}. If the images have changed, give another --output_dir"
    if before is not None and (time_limit is None or time_limit > before):
        return ""
    return f"{done} in the time that it had. With a larger --time_limit it goes on"


def _is_cut_short(output_dir: Path, metrics: dict) -> bool:
    """Tell whether the time limit ended a run's race, or left no time for its refit, so that it could go on."""
    race, refit = (metrics.get(part) or {} for part in ("race", "refit"))
    cut_short = NO_TIME in (race.get("ended"), refit.get("refusal"))
    # The record of a race may be deleted once a run has ended.
    return cut_short and (not race.get("heats") or any(output_dir.rglob(RACE)))


def read_metrics(output_dir: Path) -> dict:
    """Return what `metrics.json` of a run holds.

    Raises:
        UserError: it is damaged.
    """
    path = output_dir / METRICS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, and let the run write it again with --output_dir "
            f"{quote(str(output_dir))} --resume_from_checkpoint auto"
        ) from error


def mark_unfinished(output_dir: Path) -> None:
    """Let a run that goes on not count as finished before it has written all of its output again."""
    with contextlib.suppress(FileNotFoundError):  # there is none, or another process was first
        (output_dir / CARD).replace(output_dir / EARLIER_CARD)


def create_output_dir(output_dir: Path) -> None:
    """Create a directory, and those above it, where they are not there.

    Raises:
        UserError: it cannot be created.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --output_dir {output_dir}: {error.strerror}. Give another") from error


@contextlib.contextmanager
def claim_output_dir(output_dir: Path, continues: bool, enabled: bool = True) -> Iterator[None]:
    """Create a run's directory and keep other runs out of it; remove what was created if it stays empty.

    The lock belongs to the system and ends with the process, however that ends.

    Args:
        output_dir: the directory.
        continues: it may hold the earlier part of the same run.
        enabled: False does nothing, for all processes but the main one.

    Raises:
        UserError: it cannot be created or written, or another run writes there or has just done so.
    """
    if not enabled:
        yield
        return
    created = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    create_output_dir(output_dir)
    # One that has ended may only be pushed. Its first file would be written after all images have been prepared.
    if not (has_ended(output_dir) or os.access(output_dir, os.W_OK)):
        raise UserError(f"--output_dir {output_dir} cannot be written: check its permissions, or give another")
    try:
        busy = f"another run is writing into {output_dir}: wait for it, stop it, or give another --output_dir"
        with lock_folder(output_dir, LOCK, busy):
            if not continues and not is_empty(output_dir):
                raise UserError(f"another run has just written into {output_dir}: start again")
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty; nothing here may hide the run's own error
            for path in (*output_dir.glob("fold-*"), *created):
                path.rmdir()


def wait_for_lock(folder: Path, seconds: float) -> None:
    """Wait until no run writes into a folder, for so long at most."""
    if folder.is_dir():
        with contextlib.suppress(Timeout, OSError, NotImplementedError), FileLock(folder / LOCK).acquire(seconds):
            pass
