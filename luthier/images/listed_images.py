"""Image files and their labels as a dataset."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets import ClassLabel, DatasetDict, Features, Image, NamedSplit, Value

from luthier.cache import dataset_of
from luthier.terminal import Tenths

# Columns that no dataset of a user has: one called "stamp" would be taken for the state of files.
GIVEN_GROUP = "luthier_given_group"  # of what an image belongs to, where the user has told it
STAMP = "luthier_stamp"  # changes with a file: its path, size in bytes, and times of the last change

Grouping = Callable[[PurePosixPath], str]  # the group of an image; an empty one is none


class ListedImage(NamedTuple):
    """An image file, its class, and what it belongs to, such as a patient; an empty group is none."""

    path: str
    label: str
    group: str


def sort_names(names: Iterable[str]) -> list[str]:
    """Return names of classes in order, numbers by value."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isascii() and name.isdecimal() for name in names) else names


def letters_of(name: str) -> str:
    """Return a name of a class without spaces and capitals, which people write one way and another."""
    return "".join(name.casefold().split())


def load_listed(files: dict[str, list[ListedImage]]) -> DatasetDict:
    """Return the listed images of each split as a dataset.

    Its columns are `image` (a path, not decoded), `label` (ClassLabel, sorted and the same in all splits), `STAMP`
    and, if an image has a group, `GIVEN_GROUP`.

    Raises:
        UserError: see `cache.dataset_of`.
    """
    # Names come from all splits together, so that a class keeps its number wherever it appears.
    names = sort_names({image.label for listed in files.values() for image in listed})
    columns = {"image": Image(decode=False), "label": ClassLabel(names=names), STAMP: Value("string")}
    if any(image.group for listed in files.values() for image in listed):
        columns[GIVEN_GROUP] = Value("string")
    return DatasetDict(
        {
            # The generator's arguments are its key in the cache, so a changed file is read again.
            split: dataset_of(
                _file_rows,
                Features(columns),
                {"files": _with_stamps(listed), "columns": tuple(columns)},
                NamedSplit(split),
            )
            for split, listed in files.items()
        }
    )


def _with_stamps(files: list[ListedImage]) -> tuple[tuple, ...]:
    rows, progress = list[tuple](), Tenths("list", len(files), "files", quiet_seconds=10)
    for image in files:
        progress.reach(len(rows))
        try:
            rows.append((*image, stamp_of(image.path)))
        except OSError:  # a link to nowhere, which the inspection names among the images that cannot be read
            rows.append((*image, Path(image.path).absolute().as_posix()))
    return tuple(rows)


def stamp_of(path: str) -> str:
    """Return the `STAMP` of a file.

    Raises:
        OSError: it cannot be read.
    """
    status = Path(path).stat()
    # Archives give all files one time, and `cp -p` keeps it. So `st_ctime` too, when the file's entry last changed (on
    # Windows when the file was made, which tells less).
    return f"{Path(path).absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _file_rows(files: tuple[tuple, ...], columns: tuple[str, ...]) -> Iterator[dict]:
    for path, label, group, stamp in files:
        row = {"image": {"bytes": None, "path": path}, "label": label, STAMP: stamp, GIVEN_GROUP: group}
        yield {column: row[column] for column in columns}
