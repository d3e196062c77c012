"""Checkpoints that are whole or not there, and the newest whole one; apart from trainer.py, which decides when."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments

from terminal import say

logger = logging.getLogger(__name__)

HASHES = "hashes.json"  # SHA-256 of every other file of a checkpoint; written last
PARTIAL = ".partial"  # where a checkpoint is written before it gets its name


def seal(folder: Path, name: Path) -> None:
    """Give a written checkpoint its name: hash its files, bring them to the disk, and rename it.

    Whatever happens in between, under its name stands the whole checkpoint, or none.
    """
    hashes = {path.name: _sync_and_hash(path) for path in sorted(folder.iterdir())}
    (folder / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    _sync_and_hash(folder / HASHES)
    _sync_folder(folder)
    if name.exists():
        shutil.rmtree(name)
    folder.rename(name)
    _sync_folder(name.parent)


def what_is_wrong(checkpoint: Path) -> str | None:
    """Say why a checkpoint is not as it was written; None if it is."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if _hash(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def steps_of(output_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, the newest first."""
    found = {int(path.name.split("-")[1]): path for path in output_dir.glob("checkpoint-*") if _is_checkpoint(path)}
    return dict(sorted(found.items(), reverse=True))


def newest(output_dir: Path) -> Path | None:
    """Return the checkpoint of the latest step, if there is one."""
    return next(iter(steps_of(output_dir).values()), None)


def newest_whole(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written; those after it are set aside, and said so."""
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
    for checkpoint in steps_of(output_dir).values():
        wrong = what_is_wrong(checkpoint)
        if wrong is None:
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        logger.warning(f"Not used: {checkpoint}, because {wrong}. It is now {aside.name}")
    return None


def find_checkpoint(training_args: TrainingArguments, resume: str | None) -> str | None:
    """Return the checkpoint to go on from: the one that is named, or for "auto" the newest whole one, and say which.

    Raises:
        ValueError: the one that is named is not as it was written.
    """
    if resume != "auto":
        wrong = what_is_wrong(Path(resume)) if resume and Path(resume, HASHES).exists() else None
        if wrong:
            raise ValueError(f"{resume} is damaged: {wrong}. Take another, or --resume_from_checkpoint auto")
        return resume
    answer = [newest_whole(Path(training_args.output_dir)) if training_args.process_index == 0 else None]
    found = broadcast_object_list(answer)[0]
    if found and not found.exists():
        raise ValueError(f"{found} is not on this machine: to resume, --output_dir must be on a disk that all share")
    say(training_args, "resume", f"from {found}" if found else "there is no whole checkpoint: from the start")
    return str(found) if found else None


def load_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Put the weights of a checkpoint into the model, all of them.

    The Trainer's own loading, at a resume as for the best epoch, does not check the names, which for ViT and others
    leaves most of the weights as they were; `from_pretrained` renames what has to be renamed.
    """
    saved = type(model).from_pretrained(checkpoint)
    model.load_state_dict(saved.state_dict(), strict=True)


def thin_out(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints, but for `limit` of them and the best."""
    older = list(steps_of(output_dir).items())[limit:] if limit else []
    for step, checkpoint in older:
        if step != best:
            shutil.rmtree(checkpoint)


def check_space(output_dir: Path, size: int, kept: int) -> None:
    """Foresee a full disk.

    Args:
        output_dir: where to.
        size: of a checkpoint, in bytes.
        kept: how many are kept; one more is the best, and one more is being written.

    Raises:
        ValueError: they will not fit.
    """
    needed, free = (kept + 2) * size, shutil.disk_usage(output_dir).free
    there = sum(file.stat().st_size for path in steps_of(output_dir).values() for file in path.iterdir())
    if free + there < needed:
        raise ValueError(
            f"{output_dir} has {free / 1e9:.2f} GB left, and this run's checkpoints need up to {needed / 1e9:.2f} GB: "
            "free some, give another --output_dir, or keep fewer (--save_total_limit 1, --save_only_model)"
        )


@contextmanager
def locked(output_dir: Path, continued: bool) -> Iterator[None]:
    """Make a run's directory, and keep it to one process; left empty, it goes again.

    The lock is the system's, and goes when the process does, however that ends.

    Args:
        output_dir: where to.
        continued: something may be there already.

    Raises:
        ValueError: another run writes there, or has meanwhile.
    """
    missing = next((path for path in reversed((output_dir, *output_dir.parents)) if not path.exists()), output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(output_dir):
            if not continued and any(output_dir.iterdir()):
                raise ValueError(f"another run has just written into {output_dir}: start again")
            yield
    finally:
        for path in (output_dir, *output_dir.parents):  # what was made for nothing
            if path == missing.parent or any(path.iterdir()):
                break
            path.rmdir()


@contextmanager
def _lock(output_dir: Path) -> Iterator[None]:
    import fcntl  # of Unix alone, as the rest of what follows

    folder = os.open(output_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(
                f"another run is writing into {output_dir}: wait for it, stop it, or give another --output_dir"
            ) from error
        logger.warning(f"{output_dir} cannot be locked against a second run: {error.strerror}")  # some network disks
        yield
        return
    try:
        yield
    finally:
        os.close(folder)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def _sync_and_hash(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
