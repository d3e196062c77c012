"""Costly results, kept on disk in the cache directory of `datasets`: of each image by itself, or of all together.

What is kept of each image is in files of many, so that a run that has more images than an earlier one makes only what
is new. A file is written whole or not at all, and never changed.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from luthier.errors import UserError, message_for_user
from luthier.files import atomic_copy, rename
from luthier.terminal import Tenths

logger = logging.getLogger(__name__)

PART = "rows-"  # how the names of files of rows begin; `datasets` puts its own beside them
PART_ROWS = 16_384  # new rows in a file: a run that is killed loses at most so many
KEY = "key"  # the column, or tensor, that tells what a row is made of
AT_ONCE = 2048  # rows of features that are worked on at a time: of four times as many the heap kept 400 MB
STALE_SECONDS = 24 * 3600  # seconds after which a temporary file is one of a process that was killed


def cache_key(*parts: object) -> str:
    """Return 40 hex digits of SHA-256 over the parts: bytes and views of bytes as they are, anything else as text."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, (bytes, memoryview)) else str(part).encode()
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()[:40]


def library_versions(*packages: str) -> str:
    """Return the installed versions of packages, as a part of a key; None of one that is not installed."""

    def version_of(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # as of pi-heif: only HEIC needs it
            return None

    return " ".join(f"{name} {version_of(name)}" for name in packages)


# --- all together


def read_cached(kind: str, key: str) -> torch.Tensor | None:
    """Return the tensor that was kept under a key; None where there is none, or the file is damaged."""
    return _read_tensors(_folder(kind, f"{key}.safetensors")).get("tensor")


def write_cached(kind: str, key: str, tensor: torch.Tensor) -> None:
    """Keep a tensor under a key.

    Args:
        kind: what it is, such as `near_duplicates`; it names the folder.
        key: of `cache_key`.
        tensor: of any shape; where there is no space or no right to write, it is computed again next time.
    """
    _remove_stale_files(kind)
    _write_tensors(_folder(kind, f"{key}.safetensors"), {"tensor": tensor})


# --- of each image


def fill_rows(kind: str, key: str, digests: Sequence[str], rows: torch.Tensor) -> np.ndarray:
    """Copy the rows that are kept of images into `rows`; return which these are, bool [N].

    Of several images with one digest, the first gets its row.

    Args:
        kind, key: as `write_rows` was given them.
        digests: SHA-256 of each image [N], in hexadecimal.
        rows: [N, ...], which is changed.
    """
    is_known, names = np.zeros(len(digests), dtype=bool), as_bytes(digests)
    order = np.argsort(names, kind="stable")
    if not len(order):
        return is_known
    for file in sorted(_folder(kind, key).glob("*.safetensors")):
        kept = _read_tensors(file)
        if {KEY, "tensor"} - set(kept):
            continue
        own = kept[KEY].numpy().view(names.dtype).ravel()
        place = order[np.searchsorted(names, own, sorter=order).clip(max=len(names) - 1)]
        found = np.flatnonzero((own == names[place]) & ~is_known[place])
        for part in np.split(found, range(AT_ONCE, len(found), AT_ONCE)):
            rows[place[part]] = kept["tensor"][part]
        is_known[place[found]] = True
    return is_known


def write_rows(kind: str, key: str, digests: Sequence[str], rows: torch.Tensor) -> None:
    """Keep a row of a tensor for each image.

    Args:
        kind: what it is, such as `features`; it names the folder.
        key: of all that a row depends on besides its image.
        digests: SHA-256 of each image [N], in hexadecimal, each once.
        rows: [N, ...]; where there is no space or no right to write, they are computed again next time.
    """
    _remove_stale_files(kind)
    names = as_bytes(digests).view(np.uint8).reshape(len(digests), -1)
    path = _folder(kind, key, f"{cache_key(*digests)}.safetensors")
    _write_tensors(path, {KEY: torch.from_numpy(names.copy()), "tensor": rows})


def as_bytes(digests: Sequence[str]) -> np.ndarray:
    """Return digests in hexadecimal as bytes, [N], of a type that can be compared and sorted."""
    size = len(digests[0]) // 2 if digests else 1
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.dtype(("S", size)))


def values_of(dataset: Dataset, column: str) -> pyarrow.ChunkedArray:
    """Return the values of a column as Arrow has them, in the order of the rows.

    Where rows have been left out or moved, `datasets` would make a table of each row.
    """
    values = dataset.data.column(column)
    return values if dataset._indices is None else values.take(dataset._indices.column(0))


def list_of(dataset: Dataset, column: str) -> list:
    """Return the values of a column of texts or numbers as a list; see `values_of`."""
    return values_of(dataset, column).to_pylist()


def make_rows(
    dataset: Dataset,
    keys: Sequence[str],
    kind: str,
    key: str,
    make: Callable[[dict, list[int]], dict],
    features: Features,
    lasts: Callable[[dict], list[bool]],
    topic: str,
    unit: str,
    beside: Sequence[str],
) -> tuple[Dataset, int]:
    """Return what a function makes of each row of a dataset, and how many rows were made by an earlier run.

    What was made stays in its files. The answer has an index, unless these hold just its rows, in their order.

    Args:
        dataset: N rows; those that are new are mapped 32 at a time, so that few photographs are in memory, and kept
            `PART_ROWS` at a time.
        keys: what each row is, such as the digest of its image [N].
        kind: what is made; it names the folder.
        key: of all that the function depends on.
        make: as `Dataset.map` takes it, for batches with the numbers of their rows.
        features: of what it makes.
        lasts: tells of each row that was made whether it may be kept; one that may not is made again next time.
        topic, unit: of the lines of progress, see `terminal.Tenths`.
        beside: columns that the answer has too, as they are in the dataset. They are held in memory: no images.
    """
    keys, folder = _number(keys), _folder(kind, key)
    parts, place_of = _open_parts(folder, set(keys))
    new = [row for row, name in enumerate(keys) if name not in place_of]
    begin, progress = sum(map(len, parts)), Tenths(topic, len(new), unit, quiet_seconds=10)
    place_of |= {keys[row]: begin + number for number, row in enumerate(new)}
    file = f"{PART}{cache_key(*(keys[row] for row in new))}"
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale_files(kind)
    for first in range(0, len(new), PART_ROWS):
        rows = new[first : first + PART_ROWS]

        def make_batch(batch: dict, indices: list[int], first: int = first, rows: list[int] = rows) -> dict:
            numbers = [rows[index] for index in indices]
            made = make(batch, numbers)
            # A row that may not be kept has an empty key, which no run looks for: it alone is made again.
            made[KEY] = [keys[row] if kept else "" for row, kept in zip(numbers, lasts(made), strict=True)]
            progress.reach(first + indices[-1] + 1)
            return made

        path = folder / f"tmp{uuid.uuid4().hex}.arrow"  # which no other process writes
        part = dataset.select(rows).map(
            make_batch, batched=True, with_indices=True, batch_size=32, writer_batch_size=32,
            remove_columns=dataset.column_names, features=Features(features | {KEY: Value("string")}),
            cache_file_name=str(path), load_from_cache_file=False, new_fingerprint=cache_key(key, file, first),
            desc=f"{topic}: {unit}" + (f", {first:,} of {len(new):,} done" if len(new) > PART_ROWS else ""),
        )  # fmt: skip
        parts.append(_keep(part, path, f"{file}-{first:09}.arrow"))
    made, places = concatenate_datasets(parts).remove_columns(KEY), [place_of[name] for name in keys]
    for column in beside:
        made = _add_values(made, dataset, column, places)
    return (made if places == list(range(len(made))) else made.select(places)), len(keys) - len(new)


def _keep(part: Dataset, path: Path, name: str) -> Dataset:
    """Give the file of a part its name, by which files are in the order of the rows; return the part.

    Without its name the file stays readable for this process, not for the next one.
    """
    if not any(part[KEY][:]):  # nothing of it may be kept
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        return part
    target = path.with_name(name)
    try:
        path.replace(target)
    except OSError:  # Windows renames no open file: a copy gets the name, and this one is removed as a stale one
        try:
            atomic_copy(path, target)
        except OSError:  # it is made again next time
            return part
    return Dataset.from_file(str(target))


@functools.cache
def _remove_stale_files(kind: str) -> None:
    """Remove temporary files that nobody has written to lately, as processes leave them that are killed."""
    for path in (*_folder(kind).glob("tmp*"), *_folder(kind).glob("*/tmp*")):
        with contextlib.suppress(OSError):  # another process may remove it
            if path.stat().st_mtime < time.time() - STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _add_values(made: Dataset, dataset: Dataset, column: str, places: list[int]) -> Dataset:
    """Return rows with a column of a dataset, each of its values at its place; the other rows have any value."""
    row_of = np.zeros(len(made), dtype=np.int64)
    row_of[places] = np.arange(len(places))
    values = values_of(dataset, column).take(pyarrow.array(row_of))
    return made.add_column(column, values, feature=dataset.features[column])


def _open_parts(folder: Path, wanted: Collection[str]) -> tuple[list[Dataset], dict[str, int]]:
    """Return the files of a folder that hold some of the rows, and where in all of them together each row is."""
    parts: list[Dataset] = []
    place_of: dict[str, int] = {}
    for path in sorted(folder.glob(f"{PART}*.arrow")):
        try:
            part = Dataset.from_file(str(path))
            names = part[KEY][:]
        except (OSError, KeyError, ValueError) as error:
            logger.warning(f"{path} is left out, because it is damaged: {error}")
            continue
        begin = sum(map(len, parts))
        found = {name: begin + row for row, name in enumerate(names) if name in wanted and name not in place_of}
        if found:
            parts.append(part)
            place_of |= found
    return parts, place_of


def _number(keys: Sequence[str]) -> list[str]:
    """Return the keys with a number after the second, third, ... of the same: each row has a place of its own."""
    seen: Counter[str] = Counter()
    numbered = []
    for name in keys:
        numbered.append(f"{name} {seen[name]}" if seen[name] else name)
        seen[name] += 1
    return numbered


# --- files


def _folder(kind: str, *below: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE, f"luthier_{kind}", *below)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder, path.name))
            rename(Path(folder, path.name), path)
    except (OSError, SafetensorError) as error:
        warn_once(f"{path.parent.name} is not kept for the next run: {error}")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, but the same one never again."""
    logger.warning(text)


def dataset_of(
    rows: Callable, features: Features, arguments: dict, split: datasets.NamedSplit = datasets.Split.TRAIN
) -> Dataset:
    """Return the rows that a generator yields as a dataset on the disk, which `datasets` keeps for the next run.

    Args:
        rows: the generator.
        features: of the rows.
        arguments: of the generator: texts, numbers, and tuples of them. They are its key in the cache.
        split: its name.

    Raises:
        UserError: what the cache has of an earlier run is damaged.
    """
    # The key of `datasets` would be a pickle of all arguments, made in memory, object by object.
    key = hashlib.sha256(f"{Hasher.hash(rows)} {features} {split}".encode())
    for name, value in sorted(arguments.items()):
        for part in value if isinstance(value, tuple) else (value,):
            key.update(f"{name} {part!r}\n".encode())
    try:
        return Dataset.from_generator(
            rows, features=features, gen_kwargs=arguments, split=split, fingerprint=key.hexdigest()[:40]
        )
    except (json.JSONDecodeError, pyarrow.ArrowException, OSError) as error:
        if isinstance(error, TimeoutError) or message_for_user(error) is not None:
            raise
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "generator"
        raise UserError(f"the cache in {folder} is damaged ({error}): remove this folder. It is made again") from error
