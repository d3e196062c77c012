"""What every picture is, before any is used: readable or not, and which others it is like.

Apart from data.py, because nothing in it depends on a model.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from duplicates import MOST, Fingerprint, fingerprint, group_pictures, near_duplicates
from images import UNOPENED, decode_rgb, read, reason

logger = logging.getLogger(__name__)

INSPECTION = 2  # part of the cache's key: raise it when what is found changes
SHORTEST = 256  # pixels: shorter side at which large JPEGs are looked through for damage and duplicates
MOST_BAD = 0.05  # share of pictures that may be left out because they cannot be read


class BadImage(NamedTuple):
    """A picture that was left out because it cannot be read."""

    split: str
    name: str
    label: str
    reason: str


def inspect(dataset: Dataset, split: str, root: Path | None = None) -> Dataset:
    """Look every picture through once, on all cores; `datasets` caches what was found.

    Large JPEGs are decoded at a part of their size, which is enough to tell damage and duplicates.

    Args:
        dataset: has the columns `image` (not decoded) and `label`.
        split: for the names of pictures that have none.
        root: a folder below which the pictures lie; it is left out of their names.

    Returns the dataset with the columns `name`, `digest` (SHA-256 of the file), `pixels` (SHA-256 of the decoded
    picture), `hashes` and `thumbnail` (see `duplicates.Fingerprint`), `format`, `width`, `height` and `error`
    (None, or why the picture cannot be read).
    """
    text = ("name", "digest", "pixels", "format", "error")
    features = dict.fromkeys(text, Value("string")) | {"width": Value("int64"), "height": Value("int64")}
    features |= {"hashes": Value("binary"), "thumbnail": Value("binary")}
    key = f"{dataset._fingerprint} {split} {root} {INSPECTION} {versions('pillow', 'imagehash')}"
    found = dataset.map(
        functools.partial(_inspect_batch, split=split, root=root),
        batched=True,
        with_indices=True,
        batch_size=32,
        writer_batch_size=32,
        remove_columns=dataset.column_names,
        features=Features(features),
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:40],
        desc=f"Looking through {split}",
    )
    if any(error and error.startswith(UNOPENED) for error in found["error"][:]):
        forget(found)
    return concatenate_datasets([dataset, found], axis=1)


def _inspect_batch(batch: dict, indices: list[int], split: str, root: Path | None) -> dict:
    def inspect_one(source: dict | None, index: int) -> dict:
        path = (source or {}).get("path")
        name = f"{split} row {index}" if path is None else os.path.relpath(path, root) if root else Path(path).name
        row = dict.fromkeys(("digest", "pixels", "format", "error", "hashes", "thumbnail", "width", "height"))
        row["name"] = name
        try:
            data = read(source)
            image, _, file_format, (width, height) = decode_rgb(data, SHORTEST)
            hashes, thumbnail = fingerprint(image)
        except Exception as error:  # Pillow's plugins raise whatever they like on damaged data
            return row | {"error": reason(error)}
        pixels = hashlib.sha256(f"{width} {height}".encode() + image.tobytes()).hexdigest()
        row |= {"digest": hashlib.sha256(data).hexdigest(), "pixels": pixels, "format": file_format}
        return row | {"width": width, "height": height, "hashes": hashes, "thumbnail": thumbnail}

    # Threads suffice, because Pillow lets go of the interpreter while it decodes, resizes and encodes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(inspect_one, batch["image"], indices))
    return {column: [row[column] for row in rows] for column in rows[0]}


def forget(dataset: Dataset) -> None:
    """Take a result out of the cache: what failed may have been the disk or the rights, and work the next time."""
    for file in dataset.cache_files:
        Path(file["filename"]).unlink(missing_ok=True)


def leave_out(splits: DatasetDict, most_bad: float) -> tuple[DatasetDict, list[BadImage]]:
    """Return inspected splits without the pictures that cannot be read, and those.

    Raises:
        ValueError: more than this share of the pictures is bad, or all of a split, or of a class in train.
    """
    names = splits["train"].features["label"].names
    bad, kept = [], DatasetDict()
    for split, dataset in splits.items():
        errors = dataset["error"][:]
        rows = [row for row, error in enumerate(errors) if error]
        bad += [
            BadImage(split, entry["name"], names[entry["label"]], entry["error"])
            for entry in dataset.select_columns(["name", "label", "error"]).select(rows)
        ]
        dataset = dataset.remove_columns("error")
        kept[split] = dataset.select([row for row, error in enumerate(errors) if not error]) if rows else dataset
    total = sum(map(len, splits.values()))
    present = set(kept["train"]["label"][:])
    lost = [f"all of the {split} split" for split, dataset in kept.items() if not len(dataset)]
    lost += [f"all of the class {name!r} in train" for index, name in enumerate(names) if index not in present]
    if bad and (lost or len(bad) > most_bad * total):
        listing = "".join(f"\n  {split}: {name}: {why}" for split, name, _, why in bad[:10])
        more = f"\n  ... and {len(bad) - 10} more" if len(bad) > 10 else ""
        which = f", {lost[0]}" if lost else f", which is more than {most_bad:.0%}" if most_bad else ""
        raise ValueError(
            f"pictures that cannot be read: {len(bad)} of {total}{which}. Replace or remove them:{listing}{more}"
        )
    return kept, bad


def group(splits: DatasetDict) -> dict[str, np.ndarray]:
    """Return the group of each picture of each split, int64: equal pixels, or nearly.

    The pairs of near-duplicates are kept in the cache directory of `datasets`. Among more than `duplicates.MOST`
    pictures only equal ones are looked for.
    """

    def column(name: str) -> list:
        return [value for dataset in splits.values() for value in dataset[name][:]]

    all_pixels = column("pixels")
    first = {pixels: row for row, pixels in reversed(list(enumerate(all_pixels)))}
    pairs = [(first[pixels], row) for row, pixels in enumerate(all_pixels)]
    rows = sorted(first.values())
    if len(rows) > MOST:
        logger.warning(f"Near-duplicates are not looked for among more than {MOST:,} pictures; equal ones are")
    else:
        everyone = [Fingerprint(*parts) for parts in zip(column("hashes"), column("thumbnail"), strict=True)]
        pairs += [(rows[i], rows[j]) for i, j in _cached_near_duplicates([everyone[row] for row in rows])]
    groups = group_pictures(len(all_pixels), pairs).astype(np.int64)
    ends = np.cumsum([len(dataset) for dataset in splits.values()])
    return dict(zip(splits, np.split(groups, ends[:-1]), strict=True))


def _cached_near_duplicates(fingerprints: list[Fingerprint]) -> list[tuple[int, int]]:
    key = hashlib.sha256(f"{INSPECTION}".encode() + b"".join(part for f in fingerprints for part in f))
    path = Path(datasets.config.HF_DATASETS_CACHE, "luthier_duplicates", f"{key.hexdigest()[:40]}.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pairs = near_duplicates(fingerprints)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(pairs))
    except OSError as error:
        logger.warning(f"The near-duplicates are not kept for the next run: {error}")
    return pairs


def versions(*packages: str) -> str:
    """Return the installed versions of packages, for a cache's key."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
