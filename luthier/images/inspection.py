"""What every image is, before any is used: readable or not, and which others it duplicates."""

import functools
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets

from luthier.cache import cache_key, library_versions, list_of, make_rows, read_cached, write_cached
from luthier.cores import count_cores
from luthier.errors import UserError
from luthier.escape import escape_terminal
from luthier.images.columns import fixed_width
from luthier.images.decode import NOT_OPENED, decode_rgb, is_stack, read_bytes, reason
from luthier.images.duplicates import BITS, BORDERS, SIDE, connected_groups, fingerprint, near_duplicates
from luthier.images.listed_images import STAMP
from luthier.terminal import plural

logger = logging.getLogger(__name__)

MIN_CROWD = 50  # images of a class that look alike, and are most of it, or half where the others look alike too
MIN_SHARED = 10  # the same, where that is so in several classes: these images show one place, and are no copies
INSPECTION = 14  # part of the cache's key: raise it when what is found changes
SHORTER_SIDE = 256  # pixels at which large JPEGs are checked for damage and duplicates
MAX_UNREADABLE = 0.05  # share of images that may be left out because they cannot be read
MAX_LISTED = 10  # images that an error names


class UnreadableImage(NamedTuple):
    """An image that was left out because it cannot be read."""

    split: str
    name: str
    label: str
    reason: str


def inspect(dataset: Dataset, split: str, root: Path | None = None) -> Dataset:
    """Decode every image once, on all cores; what is found is cached, file by file.

    Large JPEGs are decoded at a reduced scale, which is enough to find damage and duplicates.

    Args:
        dataset: has the columns `image` (not decoded) and `label`. Files have a `listed_images.STAMP` too.
        split: names the images that have no name.
        root: a folder that holds the images; it is left out of their names.

    Returns the dataset with the columns `name`, `digest` (SHA-256 of the file), `pixels` (SHA-256 of the decoded
    image), `hashes` and `thumbnail` (see `duplicates.Fingerprint`), `format`, `width`, `height` and `error`
    (None, or why the image cannot be read).
    """
    text = ("name", "digest", "pixels", "format", "error")
    features = dict.fromkeys(text, Value("string")) | {"width": Value("int64"), "height": Value("int64")}
    features |= {"hashes": Value("binary"), "thumbnail": Value("binary"), "stack": Value("bool")}
    stamped = STAMP in dataset.column_names
    own = dataset.remove_columns(STAMP) if stamped else dataset.select_columns("image")
    inspected, _ = make_rows(
        own,
        list_of(dataset, STAMP) if stamped else [f"{dataset._fingerprint} {row}" for row in range(len(dataset))],
        "inspected",
        cache_key(split, root and root.absolute(), INSPECTION, library_versions("pillow", "pi-heif")),
        functools.partial(_inspect_batch, split=split, root=root),
        Features(features),
        lasts=lambda made: [not (error or "").startswith(NOT_OPENED) for error in made["error"]],
        topic="inspect",
        unit=f"images of {split}",
        beside=own.column_names if stamped else (),
    )
    stacks = np.flatnonzero(list_of(inspected, "stack"))
    if len(stacks):
        name = inspected[int(stacks[0])]["name"]
        logger.warning(
            f"{plural(len(stacks), 'TIFF')} of {split} with several pages, such as {name}: the first page alone is "
            "used. If others matter, as layers or channels do, save them as images of their own, or as one in RGB"
        )
    inspected = inspected.remove_columns("stack")
    # Side by side `datasets` would write rows of an index anew, all of them in each run.
    return inspected if stamped else concatenate_datasets([dataset, inspected], axis=1)


def _inspect_batch(batch: dict, indices: list[int], split: str, root: Path | None) -> dict:
    def inspect_one(source: dict | None, index: int) -> dict:
        path = (source or {}).get("path")
        name = f"{split} row {index}" if path is None else os.path.relpath(path, root) if root else Path(path).name
        row: dict = dict.fromkeys(("digest", "pixels", "format", "error", "hashes", "thumbnail", "width", "height"))
        row |= {"name": name, "stack": False}
        try:
            data = read_bytes(source)
            image, _, file_format, (width, height) = decode_rgb(data, SHORTER_SIDE)
            hashes, thumbnail = fingerprint(image)
        except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
            return row | {"error": reason(error)}
        pixels = hashlib.sha256(f"{width} {height}".encode() + image.tobytes()).hexdigest()
        row |= {"digest": hashlib.sha256(data).hexdigest(), "pixels": pixels, "format": file_format}
        row["stack"] = file_format == "TIFF" and is_stack(data)
        return row | {"width": width, "height": height, "hashes": hashes, "thumbnail": thumbnail}

    # Threads are enough, because Pillow releases the interpreter while it decodes, resizes and encodes.
    with ThreadPoolExecutor(count_cores()) as pool:
        rows = list(pool.map(inspect_one, batch["image"], indices))
    return {column: [row[column] for row in rows] for column in rows[0]}


def leave_out_unreadable(
    splits: DatasetDict, max_unreadable: float = MAX_UNREADABLE
) -> tuple[DatasetDict, list[UnreadableImage]]:
    """Return inspected splits without the images that cannot be read, and a list of those.

    Args:
        splits: with the columns of `inspect`.
        max_unreadable: share of all images that may be left out; with 1, also all images of a class.

    Raises:
        UserError: more are unreadable, or all images of a split, or all of a class in train.
    """
    names = splits["train"].features["label"].names
    unreadable: list[UnreadableImage] = []
    readable = DatasetDict()
    for split, dataset in splits.items():
        errors = list_of(dataset, "error")
        rows = [row for row, error in enumerate(errors) if error]
        unreadable += [
            UnreadableImage(split, entry["name"], names[entry["label"]], entry["error"])
            for entry in dataset.select_columns(["name", "label", "error"]).select(rows)
        ]
        dataset = dataset.remove_columns("error")
        readable[split] = dataset.select([row for row, error in enumerate(errors) if not error]) if rows else dataset
    total = sum(map(len, splits.values()))
    before, present = (set(list_of(each["train"], "label")) for each in (splits, readable))
    lost = [f"all of the {split} split" for split, dataset in readable.items() if not len(dataset)]
    gone = sorted(before - present) if max_unreadable < 1 else []
    lost += [f"all of the class {names[index]!r} in train" for index in gone]
    if unreadable and (lost or len(unreadable) > max_unreadable * total):
        listed = [f"{split}: {name}: {why}" for split, name, _, why in unreadable]
        which = f", {lost[0]}" if lost else f", which is more than {max_unreadable:.0%}" if max_unreadable else ""
        raise UserError(
            f"images that cannot be read: {len(unreadable)} of {total}{which}. Replace or remove them:"
            f"{listing(listed)}"
        )
    return readable, unreadable


def listing(lines: list[str]) -> str:
    """Return the first lines of a list, each on a line of its own, for an error."""
    more = f"\n  ... and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return "".join(f"\n  {escape_terminal(line)}" for line in lines[:MAX_LISTED]) + more


def duplicate_pairs(splits: DatasetDict) -> np.ndarray:
    """Return pairs of images with equal or nearly equal pixels, by their rows in all splits together, int64 [P, 2].

    Mirrored copies count within a class alone: `b` and `d` are two letters. Pairs of near-duplicates are cached.
    """
    columns = ["pixels", "hashes", "thumbnail", "label"]
    images = concatenate_datasets([dataset.select_columns(columns) for dataset in splits.values()])
    pixels = fixed_width(images, "pixels").view("S64").ravel()
    _, first, number = np.unique(pixels, return_index=True, return_inverse=True)
    exact = np.stack([first[number], np.arange(len(images))], axis=1)
    rows = np.sort(first)
    key = cache_key(INSPECTION, "nearest and mirrored", pixels[rows].tobytes())
    near = read_cached("near_duplicates", key)
    if near is None:
        hashes = fixed_width(images, "hashes")[rows].reshape(len(rows), len(BORDERS), BITS // 8)
        near = torch.from_numpy(near_duplicates(hashes, _Thumbnails(images.with_format("arrow"), rows)))
        write_cached("near_duplicates", key, near)
    pairs, mirrored = rows[near[:, :2].numpy()], near[:, 2].numpy() == 1
    labels = np.array(list_of(images, "label"))
    pairs = pairs[~mirrored | (labels[pairs[:, 0]] == labels[pairs[:, 1]])]
    crowded = np.zeros(len(images), dtype=bool)
    crowded[rows] = _crowded(connected_groups(len(images), pairs)[rows], labels[rows])  # one of each set of copies
    if crowded.any():
        logger.warning(
            f"{crowded.sum():,} images look alike, and are half of their class or more, as from a fixed camera. They "
            "count as different images, and may be in train and in test. If they are frames of few videos, or copies, "
            "the score is too high: name the groups with --group_by or --group_column"
        )
    return np.concatenate([exact[exact[:, 0] != exact[:, 1]], pairs[~crowded[pairs[:, 0]]]])


def _crowded(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which images are in near-duplicates that are most of a class, or one of its halves: bool [N]."""
    many = int(labels.max()) + 1
    cells, counts = np.unique(groups.astype(np.int64) * many + labels, return_counts=True)
    of = cells % many
    halves = np.bincount(of)[of] == 2  # the only groups of the class: they could not be in three splits
    most = 2 * counts + halves > np.bincount(labels)[of]
    shared, classes = np.unique(cells[most & (counts >= MIN_SHARED)] // many, return_counts=True)
    crowds = np.union1d(cells[most & (counts >= MIN_CROWD)] // many, shared[classes > 1])
    return np.isin(groups, crowds)


class _Thumbnails:
    """The thumbnails of some rows of a dataset, read when they are asked for: all of them could fill the memory."""

    def __init__(self, images: Dataset, rows: np.ndarray):
        self.images, self.rows = images, rows

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        column = self.images[self.rows[numbers]]["thumbnail"].to_numpy()
        return np.frombuffer(b"".join(column), np.uint8).reshape(-1, SIDE, SIDE)
