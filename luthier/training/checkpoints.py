"""A checkpoint is whole or does not exist; the newest whole one is the one to resume from."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import PreTrainedModel

from luthier.errors import UserError
from luthier.files import copy_permissions_to_weights, rename, sync
from luthier.processes import from_main_process
from luthier.terminal import plural

logger = logging.getLogger(__name__)

HASHES = "hashes.json"  # SHA-256 of every other file of a checkpoint; written last
ORIGIN = "origin.json"  # in a checkpoint, see `Origin`
PARTIAL = ".partial"  # where a checkpoint is written before it gets its name


class Origin(NamedTuple):
    """What a resumed training must have in common with its beginning.

    Attributes:
        data: hash of the splits, see `splits.hash_splits`.
        batch: images in an optimizer step, of all processes together.
        order: of a stream: what the order of its images depends on.
        settings: in words, what else the weights have learned with.
        recipe: in words, how they learn, and from which model.
        processes: of a stream: among how many its images are divided; 0 where it does not matter.
        own_batch: of a stream: images in a batch of a process, by which its order follows; 0 where it does not matter.
    """

    data: str
    batch: int
    order: str = ""
    settings: str = ""
    recipe: str = ""
    processes: int = 0
    own_batch: int = 0


def seal(folder: Path, checkpoint: Path) -> None:
    """Give a written checkpoint its name: hash its files, sync them to the disk, and rename the folder.

    Whatever happens in between, the name stands for the whole checkpoint, or for none.
    """
    copy_permissions_to_weights(folder / "trainer_state.json")
    files = sorted(folder.iterdir())
    for path in files:
        sync(path)
    hashes = {path.name: _hash(path) for path in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    sync(folder / HASHES)
    _sync_folder(folder)
    earlier = folder.with_name(f"earlier-{checkpoint.name}")
    if checkpoint.exists():  # of the same step; to remove it takes longer than to rename it
        rename(checkpoint, earlier)
    rename(folder, checkpoint)
    _sync_folder(checkpoint.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def find_damage(checkpoint: Path, of_model: bool = False) -> str | None:
    """Return why a checkpoint, or its model alone (`load_weights`), is not as it was written; None if it is.

    Raises:
        UserError: it cannot be read, which says nothing about its content.
    """
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if of_model and not name.startswith(("model", "config.json")):
                continue
            if _hash(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    except OSError as error:
        raise UserError(
            f"{error.filename or checkpoint} cannot be read ({error.strerror}): check its owner, its permissions "
            "and the disk, and start again. Or remove the checkpoint, and the one before it is used"
        ) from error
    return None


def checkpoints_by_step(output_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, the newest first."""
    named = (path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    checkpoints = {int(path.name.split("-")[1]): path for path in named if path.is_dir()}
    return dict(sorted(checkpoints.items(), reverse=True))


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was written after."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def newest(output_dir: Path) -> Path | None:
    """Return the checkpoint of the latest step, if there is one."""
    return next(iter(checkpoints_by_step(output_dir).values()), None)


def newest_whole(output_dir: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written; rename damaged ones, with a warning.

    Raises:
        UserError: see `find_damage`.
    """
    shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
    for checkpoint in checkpoints_by_step(output_dir).values():
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        renamed = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(renamed, ignore_errors=True)
        rename(checkpoint, renamed)
        logger.warning(f"Not used: {checkpoint}, because {damage}. It is now called {renamed.name}")
    return None


def newest_shared(output_dir: Path, is_main_process: bool) -> Path | None:
    """Return the newest whole checkpoint of a directory, as the main process sees it, to all processes.

    Raises:
        UserError: it is not on this machine, or see `find_damage`.
    """
    checkpoint = from_main_process(newest_whole(output_dir) if is_main_process else None)
    if checkpoint and not _is_there(checkpoint):
        raise UserError(
            f"{checkpoint} is not on this machine: to resume, and to train in heats, --output_dir must be on a disk "
            "that all machines share. Or train in one: --recipe full --lr_scheduler_type linear"
        )
    return checkpoint


def check_named(checkpoint: Path, origin: Origin) -> None:
    """Refuse a checkpoint that is not as it was written, or of other data.

    Raises:
        UserError: it is damaged, or see `check_origin`.
    """
    damage = find_damage(checkpoint) if (checkpoint / HASHES).exists() else None
    if damage:
        raise UserError(f"{checkpoint} is damaged: {damage}. Use another, or --resume_from_checkpoint auto")
    check_origin(checkpoint, origin)


def write_origin(checkpoint: Path, origin: Origin) -> None:
    """Write into a checkpoint what a training that continues it must have in common with this one."""
    (checkpoint / ORIGIN).write_text(json.dumps(origin._asdict(), indent=2) + "\n", encoding="utf-8")


def check_origin(checkpoint: Path, origin: Origin) -> None:
    """Check that a checkpoint is of the same data and the same training.

    With other splits its weights may have learned from images that are tested now.

    Raises:
        UserError: images, classes, splits, the order, the batch, the processes of a stream, the recipe or the settings
            are others now, or not known.
    """
    record = checkpoint / ORIGIN
    if not record.exists():
        raise UserError(
            f"{checkpoint} does not say which images it has learned from, which may be tested now: continue one that "
            "Luthier has written. Its weights alone can be a --model_name, as a folder"
        )
    try:
        begun = Origin(**json.loads(record.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{record} is of another version of Luthier: begin a new run in another --output_dir"
        ) from error
    if (begun.data, begun.order) != (origin.data, origin.order):
        raise UserError(
            f"{checkpoint} is of other images or files, or of another cut into train, validation and test: it may "
            "have learned from images that are tested now. Restore the files, their names and the options (like "
            "--split_seed and --fold), or begin a new run in another --output_dir"
        )
    if begun.batch != origin.batch:
        raise UserError(
            f"{checkpoint} was trained with {plural(begun.batch, 'image')} in a step, and now there would be "
            f"{origin.batch}. Give --per_device_train_batch_size and --gradient_accumulation_steps: their product, "
            f"times the number of processes, must be {begun.batch}"
        )
    if begun.processes and begun.processes != origin.processes:
        raise UserError(
            f"{checkpoint} was trained by {plural(begun.processes, 'process', 'processes')}, each with a part of the "
            f"stream, and now there would be {origin.processes}: use as many as before, or begin a new run in another "
            "--output_dir"
        )
    if begun.own_batch and begun.own_batch != origin.own_batch:
        raise UserError(
            f"{checkpoint} was trained with batches of {plural(begun.own_batch, 'image')} in a process, by which the "
            f"order of a stream follows, and now there would be {origin.own_batch}: give "
            "--per_device_train_batch_size and --gradient_accumulation_steps as before, or begin a new run in another "
            "--output_dir"
        )
    for before, now in ((begun.recipe, origin.recipe), (begun.settings, origin.settings)):
        if before != now:
            raise UserError(
                f"{checkpoint} was trained with {before}, and now there would be {now}: give the options that the run "
                "was begun with, or another --output_dir"
            )


def bring_best(checkpoint: Path, output_dir: Path) -> None:
    """Copy the best checkpoint so far beside those of a training that continues in another directory."""
    best = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
    source, target = checkpoint.parent / f"checkpoint-{best}", output_dir / f"checkpoint-{best}"
    if source.exists() and not target.exists():
        partial = output_dir / PARTIAL / target.name
        shutil.copytree(source, partial, dirs_exist_ok=True)
        rename(partial, target)


def load_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load all weights of a checkpoint into the model.

    The Trainer's own loading, on resume as for the best epoch, does not check the names, and leaves most weights of a
    ViT and others as they were; `from_pretrained` renames what has to be renamed.

    Raises:
        UserError: the checkpoint is of another model, or not whole.
    """
    other = f"{checkpoint} is of another model, or of other classes: resume with the options of the run that wrote it"
    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] != model.config.model_type:
            raise UserError(other)
        loaded: Any = type(model).from_pretrained(checkpoint, output_loading_info=True)
        saved, loading = loaded
        if missing := loading["missing_keys"]:  # they would be random numbers
            raise ValueError(f"it lacks {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{checkpoint} is not a whole checkpoint ({error}): use another") from error
    try:
        model.load_state_dict(saved.state_dict(), strict=True)
    except RuntimeError as error:
        raise UserError(other) from error


def prune_checkpoints(output_dir: Path, limit: int | None, best: int | None) -> None:
    """Remove the oldest checkpoints, but keep the best one and the newest `limit`."""
    older = list(checkpoints_by_step(output_dir).items())[limit:] if limit else []
    for step, checkpoint in older:
        if step != best:
            # Windows removes no open file, and NFS leaves one of another name. The next save tries again.
            shutil.rmtree(checkpoint, ignore_errors=True)


def lacking_space(output_dir: Path, size: int, limit: int) -> str:
    """Foresee a full disk: return in words what checkpoints need and do not have, or nothing.

    Args:
        output_dir: where the checkpoints go.
        size: of a checkpoint, in bytes.
        limit: how many are kept, besides the best one and the one that is being written.
    """
    needed, free = (limit + 2) * size, shutil.disk_usage(output_dir).free
    there = sum(file.stat().st_size for path in checkpoints_by_step(output_dir).values() for file in path.iterdir())
    if free + there >= needed:
        return ""
    return (
        f"{output_dir} has {free / 1e6:,.0f} MB left, and this run's checkpoints need up to {needed / 1e6:,.0f} MB"
        ": free some space, give another --output_dir, or keep fewer (--save_total_limit 1)"
    )


def _is_there(checkpoint: Path) -> bool:
    """Tell whether this machine has all files of a checkpoint: the library goes on without those of the optimizer."""
    record = checkpoint / HASHES
    return record.exists() and all(
        (checkpoint / name).exists() for name in json.loads(record.read_text(encoding="utf-8"))
    )


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
