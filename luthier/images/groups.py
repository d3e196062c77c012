"""What belongs together: images that are nearly the same, and those of one patient, video or place."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from datasets import Dataset, DatasetDict

from luthier.cache import list_of
from luthier.errors import UserError
from luthier.images.columns import add_numbers
from luthier.images.duplicates import connected_groups
from luthier.images.inspection import duplicate_pairs
from luthier.images.listed_images import GIVEN_GROUP, Grouping
from luthier.terminal import plural, say

# What file names of changed copies, bursts, videos and subjects look like: IMG_001_jpg.rf.0a1b2c.jpg (Roboflow),
# IMG_001_2.jpg, video3_frame_0001.jpg, patient12_left.jpg.
PATTERNS = (r"^(.+)\.rf\.[0-9A-Za-z]+\.", r"^(.+)[_-][0-9]+\.", r"^([A-Za-z]+[_-]?[0-9]+)[_-]")
SEPARATOR = re.compile(r"[\\/]")  # of folders, on this system or on Windows
MIN_NAMED = 0.8  # share of the files that a pattern must match, or that must be in folders of class folders
MAX_SHARE = 0.2  # of the files that one group may have


# An accent may be part of its letter or follow it. Groups that look alike are one, as in columns.
_composed = functools.partial(unicodedata.normalize, "NFC")


def build_grouping(group_by: str | None) -> Grouping | None:
    """Return the function from an image's path, below its class folder or the folder of a table, to its group.

    An empty group is none. There is no function where nothing is grouped.

    Args:
        group_by: `folder`, the first folder of the path; or a regular expression that is searched in the file name:
            its first group in brackets, or else what it matches. None groups nothing.

    Raises:
        UserError: it is not a regular expression.
    """
    if group_by is None:
        return None
    if group_by == "folder":
        return lambda path: _composed(path.parts[0]) if len(path.parts) > 1 else ""
    try:
        pattern = re.compile(_composed(group_by))
    except re.error as error:
        raise UserError(
            f"--group_by {group_by!r} is neither 'folder' nor a regular expression: {error}. One for names such as "
            'patient12_3.jpg is "^[^_]+"'
        ) from error

    def search(path: PurePosixPath) -> str:
        found = pattern.search(_composed(path.name))
        return "" if found is None else (found.group(1) if pattern.groups else found.group()) or ""

    return search


def check_groups(splits: DatasetDict, group_by: str) -> None:
    """Say how many of the loaded images have no group.

    Raises:
        UserError: none has one, or all have the same.
    """
    groups = given_groups(splits)
    alone, distinct = sum(not group for group in groups), len(set(groups) - {""})
    example = Path(splits["train"][0]["image"]["path"]).name
    if not distinct:
        raise UserError(
            f"--group_by {group_by!r} finds no group in any file, such as {example}: mend it, or leave it out"
        )
    if distinct == 1 and not alone:
        raise UserError(
            f"--group_by {group_by!r} puts all images into one group, {groups[0]!r}: mend it, or leave it out"
        )
    if alone:
        say("groups", f"{plural(alone, 'image')} without a group, each of them on its own")


def given_groups(splits: DatasetDict) -> list[str]:
    """Return the group that the user has told of each image of all splits, "" for none; nothing where none is told."""
    if any(GIVEN_GROUP not in dataset.column_names for dataset in splits.values()):
        return []
    return [group or "" for dataset in splits.values() for group in list_of(dataset, GIVEN_GROUP)]


def groups_of(dataset: Dataset) -> np.ndarray | None:
    """Return the group of each image of a loaded split, int [N]: one for near-duplicates and images of a given group.

    None where each image stands alone, and the user has given no groups.
    """
    if "group" not in dataset.column_names:
        return None
    groups = np.array(list_of(dataset, "group"))
    return groups if GIVEN_GROUP in dataset.column_names or len(np.unique(groups)) < len(groups) else None


def propose_grouping(names: Sequence[str], classes: int, labels: Sequence[str] = ()) -> str | None:
    """Return what to give as `--group_by` where folders or file names look like groups of several images each.

    It is `folder` where class folders hold the folders, or a regular expression for the names. There must be more than
    twice as many groups as classes, because many people write the class into the name, and class folders may hold a
    few folders of views or days.

    Args:
        names: of the files, with or without folders, of this system or of Windows.
        classes: how many there are.
        labels: the class of each file, which is the name of its class folder; without them folders are not looked at.
    """
    if _look_like_groups(Counter(filter(None, map(_folder_in_class, names, labels))), len(names), classes):
        return "folder"
    files = [SEPARATOR.split(name)[-1] for name in names]
    for pattern in PATTERNS:
        sizes = Counter(found.group(1) for file in files if (found := re.search(pattern, file)))
        if _look_like_groups(sizes, len(names), classes):
            return pattern
    return None


def _folder_in_class(name: str, label: str) -> str:
    """Return the first folder below the class folder in the name of a file; an empty text where there is none."""
    folders = SEPARATOR.split(_composed(name))[:-1]
    below = folders[folders.index(label) + 1 :] if label in folders else []
    return below[0] if below else ""


def _look_like_groups(sizes: Counter[str], images: int, classes: int) -> bool:
    """Tell whether the images of each name, of so many images and classes in all, may be groups."""
    matched = sum(sizes.values())
    return (
        matched >= MIN_NAMED * images
        and 2 * classes < len(sizes) <= matched / 2
        and max(sizes.values()) <= MAX_SHARE * images
    )


def add_groups(splits: DatasetDict) -> DatasetDict:
    """Return the inspected splits with the columns `duplicates` and `group`, int64.

    `duplicates` is the same for images that are equal or nearly so. `group` is the same for those too, and for images
    of one given group: a cut keeps them on one side.
    """
    pairs, ends = duplicate_pairs(splits), np.cumsum([len(dataset) for dataset in splits.values()])
    columns = {"duplicates": connected_groups(int(ends[-1]), pairs)}
    if told := given_groups(splits):
        number_of: dict[str, int] = {"": 0}  # an array of texts would have the size of the longest one for each
        numbers = np.array([number_of.setdefault(name, len(number_of)) for name in told])
        given = np.flatnonzero(numbers)
        _, first, number = np.unique(numbers[given], return_index=True, return_inverse=True)
        pairs = np.concatenate([pairs, np.stack([given[first][number], given], axis=1)])
    columns["group"] = connected_groups(int(ends[-1]), pairs)
    for name, values in columns.items():
        parts = np.split(values.astype(np.int64), ends[:-1])
        splits = DatasetDict(
            {split: add_numbers(rows, name, part) for (split, rows), part in zip(splits.items(), parts, strict=True)}
        )
    return splits
