"""The splits that a table of image files describes: its columns and files are found, no row is lost in silence."""

import logging
import re
import unicodedata
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets import DatasetDict

from luthier.errors import UserError
from luthier.files import expand_home
from luthier.images.column_roles import (
    find_split_column,
    hint_at_flags,
    is_index,
    join_flags,
    say_likely_group,
    say_odd_values,
    say_source,
)
from luthier.images.columns import LABEL_COLUMNS
from luthier.images.decode import is_image
from luthier.images.folder_checks import METADATA, SPLIT_OF_FOLDER, holds_images, subfolders
from luthier.images.folders import SHARDS, check_folder, load_folder
from luthier.images.groups import build_grouping, check_groups
from luthier.images.image_files import SAMPLE, ImageFiles, as_text
from luthier.images.inspection import listing
from luthier.images.listed_images import Grouping, ListedImage, load_listed
from luthier.images.loading import PLAN
from luthier.images.tables import Table, read_table
from luthier.terminal import plural

logger = logging.getLogger(__name__)

# Names of an image column, where several columns name image files.
IMAGE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "filepath", "image_id", "id")
SPLIT_COLUMN = "split"
WHOLE_NUMBER = re.compile(r"-?\d+(\.0+)?")


class ForeignTableError(UserError):
    """A table of which no column, or more than one, names image files: it may be about something else."""


class Columns(NamedTuple):
    """The columns of a table; None where there is none, or where it is to be found."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


def load_directory(
    root: Path, labels: str | None, given: Columns, group_by: str | None, to_train: bool
) -> DatasetDict:
    """Load the images of a folder, with the labels of a table or of class folders.

    Args:
        root: the folder.
        labels: a table that the user has named.
        given: the columns that the user has named.
        group_by: see `groups.build_grouping`.
        to_train: False takes those of test (or validation) for `train` where a table has none, because a model is
            scored only.

    Returns the splits as `listed_images.load_listed` does.

    Raises:
        UserError: see `load_tables` and `folders.load_folder`.
    """
    if group_by and given.group:
        raise UserError("--group_by and --group_column both say what belongs together: give one of them")
    grouping, tables = build_grouping(group_by), find_tables(root, labels)
    named = [f"--{kind}_column" for kind, name in given._asdict().items() if name]
    if tables:
        try:
            splits = load_tables(root, tables, bool(labels) or group_by == "folder", given, grouping, to_train)
        except ForeignTableError as error:
            if labels or named:
                raise
            try:
                splits = load_folder(root, grouping, to_train)
            except UserError:
                raise error from None
            logger.warning(f"Not used: {next(iter(tables.values()))}. The labels are those of class folders; {error}")
    elif named:
        raise UserError(f"{named[0]} names a column of a table, but {root} has no metadata.csv: give --labels")
    else:
        splits = load_folder(root, grouping, to_train)
    if group_by:
        check_groups(splits, group_by)
    return splits


def has_shards(root: Path) -> bool:
    """Tell whether a folder holds a dataset as Parquet files or WebDataset archives, and no class folders or table."""
    if not root.is_dir() or _metadata_of(root) or any(folder.name != "data" for folder in subfolders(root)):
        return False
    files = [path for folder in (root, root / "data") for suffix in SHARDS for path in folder.glob(f"*{suffix}")]
    begun = (root / PLAN).is_file()  # by prepare.py, which may have been interrupted before its first file
    return not holds_images(root) and (bool(files) or begun)


def find_tables(root: Path, labels: str | None) -> dict[str, Path]:
    """Return the table of each split, or one for `all`; nothing where the labels are class folders.

    Args:
        root: the folder with the images.
        labels: a file that the user has named; otherwise metadata files in the folder, or in its split folders.

    Raises:
        UserError: a folder holds two metadata files, only some split folders have one, or `labels` lies in the folder.
    """
    if labels:
        named = expand_home(labels)
        if not named.is_file() and (root / labels).is_file():
            raise UserError(f"--labels {labels} is not a file here: did you mean {root / labels}?")
        return {"all": named}
    if not root.is_dir():
        return {}
    found = _metadata_of(root)
    if found:
        return {"all": found}
    folders = [folder for folder in subfolders(root) if folder.name.lower() in SPLIT_OF_FOLDER]
    tables = {SPLIT_OF_FOLDER[folder.name.lower()]: table for folder in folders if (table := _metadata_of(folder))}
    if tables and len(tables) < len(folders):
        missing = next(folder for folder in folders if _metadata_of(folder) not in tables.values())
        raise UserError(f"{missing} has no metadata file, but another split has one: add it, or remove the others")
    return tables


def _metadata_of(folder: Path) -> Path | None:
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(path.name for path in found)}: remove all but one")
    return found[0] if found else None


def load_tables(
    root: Path, tables: dict[str, Path], is_sure: bool, given: Columns, grouping: Grouping | None, to_train: bool
) -> DatasetDict:
    """Load the images that tables name, with their labels; without a split column all of them are `train`.

    Args:
        root: the folder that holds the images, at any depth.
        tables: of `find_tables`.
        is_sure: folders are no classes, because the user has named the table, or says what they are.
        given: the columns that the user has named.
        grouping: gives an image's group by its path below the folder; None where a column does, or nothing.
        to_train: see `load_directory`.

    Returns the splits as `listed_images.load_listed` does.

    Raises:
        UserError: a table cannot be read, or a row of it cannot be used; the message names rows and columns.
    """
    check_folder(root, "give the one that holds the images of the table")
    listed: dict[str, list[ListedImage]] = defaultdict(list)
    learned: str | None = None
    flags = frozenset[str]()  # of the tables before; where they are no classes, the row that is wrong is named
    for split, path in sorted(tables.items(), key=lambda item: item[0] != "train"):
        files, only = (ImageFiles(root), None) if split == "all" else (ImageFiles(path.parent), split)
        table, own = read_table(path, least=1 if listed else 2), given
        table = table if given.label else join_flags(table, given)
        if learned in table.columns:  # the first one, which is of train, tells the column of the others
            own = given._replace(label=learned)
        elif learned and not any(name.lower() in LABEL_COLUMNS or name in flags for name in table.columns):
            logger.warning(f"Not used: the {split} split, because {path} has no column {learned!r}")
            continue
        columns = _find_columns(table, files, own, only)
        say_source(table, columns.label, columns.split)
        if to_train and not (listed or grouping or columns.group):  # once, not for each split
            say_likely_group(table, columns)
        for name, images in _read_images(files, table, columns, grouping, only).items():
            listed[name] += images
        if not is_sure and not given.label and (table.flags or str(columns.label).lower() not in LABEL_COLUMNS):
            _check_folders(table, columns, listed)
        learned, flags = columns.label, flags.union(table.flags)
    if "train" not in listed and not to_train:
        listed = {"train": listed.get("test") or listed["validation"]}
    if not listed.get("train"):
        raise UserError(f"{next(iter(tables.values()))} has no row of the split train: name it in some rows")
    return load_listed({split: listed[split] for split in ("train", "validation", "test") if split in listed})


class Entry(NamedTuple):
    """What a row says: the number of the row, and the values of its columns."""

    number: int
    name: str
    label: str
    split: str
    group: str


def _check_folders(table: Table, columns: Columns, listed: dict[str, list[ListedImage]]) -> None:
    """Check that folders do not mean classes, where no name of a column says that it holds them.

    Raises:
        UserError: the images of a table are in several folders.
    """
    folders = {Path(image.path).parent.name for images in listed.values() for image in images}
    folders = {name for name in folders if name.lower() not in SPLIT_OF_FOLDER}
    if len(folders) > 1:
        which, remedy = f"the column {columns.label!r}", f"Give --label_column {columns.label}"
        if table.flags:
            which, remedy = f"the columns {', '.join(table.flags[:3])}", "Write one column label of class names"
        raise UserError(
            f"are the classes those of {which} of {table.path}, or the folders, such as "
            f"{', '.join(sorted(folders)[:3])}? {remedy}, or take {table.path.name} out of the folder"
        )


def _read_images(
    files: ImageFiles, table: Table, columns: Columns, grouping: Grouping | None, split: str | None
) -> dict[str, list[ListedImage]]:
    """Return the images of a table by split."""
    root, begin = files.root, 0
    entries = _read_entries(table, columns, split)
    found_of = files.find_all([entry.name for entry in entries])
    if not columns.split and not split and (of_folders := _split_by_folders(entries, found_of, root)):
        entries, begin = of_folders, 1  # a group lies below the folder of its split
    with_labels = {entry.split for entry in entries if entry.label} | {"train"}
    for name in sorted({entry.split for entry in entries} - with_labels):
        logger.warning(f"Not used: the {name} split of {table.path.name}, which has no labels")
    faults: list[str] = []
    named: set[Path | str] = set()
    first: dict[Path, Entry] = {}  # that names an image
    again = 0
    for entry, found in zip(entries, found_of, strict=True):
        named.add(found)
        if entry.split in with_labels:
            earlier = first.setdefault(found, entry) if isinstance(found, Path) else entry
            faults += _faults_of(entry, found, earlier, columns)
            again += earlier is not entry
    if faults:
        raise UserError(
            f"{table.path}: {plural(len(faults), 'value')} cannot be used. Mend them, or remove their rows:"
            f"{listing(faults)}"
        )
    if again:
        logger.warning(f"{table.path.name} names {plural(again, 'image')} more than once: each is used once")
    rest = [str(path) for path in files.paths if root / path not in named]
    if rest:
        logger.warning(
            f"Not used, because without a row in {table.path.name}: {plural(len(rest), 'image')}, such as "
            f"{', '.join(rest[:3])}"
        )
    images: dict[str, list[ListedImage]] = defaultdict(list)
    for path, entry in first.items():
        group = grouping(PurePosixPath(*path.relative_to(root).parts[begin:])) if grouping else entry.group
        images[entry.split].append(ListedImage(as_text(path), entry.label, group))
    return images


def _split_by_folders(entries: list[Entry], found: list[Path | str], root: Path) -> list[Entry]:
    """Return the rows with the splits whose folders their images are in; none where not all are in such folders."""
    split_of = {
        path: SPLIT_OF_FOLDER.get(path.relative_to(root).parts[0].lower()) for path in found if isinstance(path, Path)
    }
    splits = set(split_of.values())
    if "train" not in splits or None in splits:
        return []
    return [
        entry._replace(split=(isinstance(path, Path) and split_of[path]) or entry.split)
        for entry, path in zip(entries, found, strict=True)
    ]


def _read_entries(table: Table, columns: Columns, split: str | None) -> list[Entry]:
    assert columns.image is not None and columns.label  # they have been found; that of images may have no name
    say_odd_values(table, columns.label, columns.group)
    names, labels = (_without_points(table.column(name)) for name in (columns.image, columns.label))
    labels = [unicodedata.normalize("NFC", label) for label in labels]  # as of class folders
    splits = table.column(columns.split) if columns.split else [split or "train"] * len(names)
    splits = [SPLIT_OF_FOLDER.get(name.lower(), name) for name in splits]
    groups = _without_points(table.column(columns.group)) if columns.group else [""] * len(names)
    groups = [unicodedata.normalize("NFC", group) for group in groups]
    if columns.group and not any(groups):
        raise UserError(f"the column {columns.group!r} of {table.path} is empty: leave --group_column out, or fill it")
    return [Entry(*values) for values in zip(table.numbers, names, labels, splits, groups, strict=True)]


def _faults_of(entry: Entry, found: Path | str, earlier: Entry, columns: Columns) -> list[str]:
    """Return what is wrong with a row, with its number and column.

    Args:
        entry: the row.
        found: its image, or why there is none.
        earlier: the first row with this image.
        columns: of the table.
    """
    faults = []
    if isinstance(found, str):
        faults.append((columns.image, found))
    if not entry.label:
        faults.append((columns.label, "there is no label"))
    if entry.split not in SPLIT_OF_FOLDER.values():
        faults.append((columns.split, f"{entry.split!r} is not train, validation or test"))
    if entry[2:] != earlier[2:]:
        where = f"{entry.name!r} is in row {earlier.number} too"
        faults.append((columns.image, f"{where}, with another label, split or group"))
    return [f"row {entry.number}, column {column!r}: {what}" for column, what in faults]


def _find_columns(table: Table, files: ImageFiles, given: Columns, of_split: str | None) -> Columns:
    """Return the columns of a table: those that are given, and the others by their names and what they hold.

    Args:
        table: as it was read.
        files: that it names.
        given: by the user.
        of_split: the one split of all rows; None where a column may tell it.

    Raises:
        UserError: there is no such column, or more than one could be meant.
    """
    for kind, name in given._asdict().items():
        if name and name not in table.columns:
            raise UserError(
                f"there is no column {name!r} (--{kind}_column) in {table.path}; the columns are "
                f"{', '.join(table.columns)}"
            )
    split = given.split or next((name for name in table.columns if name.lower() == SPLIT_COLUMN), None)
    split = split or (None if of_split else find_split_column(table, given, bool(given.label)))
    rest = [name for name in table.columns if name not in (given.image, given.label, split, given.group)]
    named = [name for name in rest if name.lower() in LABEL_COLUMNS]
    image = given.image or _find_image_column(table, files, [name for name in rest if name not in named] or rest)
    skip = files.folders_to_skip([image, *table.column(image)])
    if image.lower() not in IMAGE_COLUMNS and files.matches(image, skip):
        raise UserError(
            f"the first row of {table.path} names an image, {image!r}: put a row with the names of the columns above "
            "it, such as file_name,label"
        )
    rest = [name for name in rest if name != image and name not in table.nested and not is_index(name)]
    likely = named if len(named) == 1 else rest
    if not given.label and len(likely) != 1:
        raise UserError(
            f"which column of {table.path} holds the labels? Name it with --label_column; the columns are "
            f"{', '.join(table.columns)}{hint_at_flags(table, rest)}. Where class folders tell them, take "
            f"{table.path.name} out of the folder"
        )
    columns = Columns(image, given.label or likely[0], split, given.group)
    for name in table.nested.intersection(filter(None, columns)):
        remedy = "write one value for each image, or name another column"
        raise UserError(f"the column {name!r} of {table.path} holds lists or objects: {remedy}")
    return columns


def _find_image_column(table: Table, files: ImageFiles, names: list[str]) -> str:
    """Return the column whose values name image files; of several the one with extensions, then one of a known name.

    Raises:
        ForeignTableError: no column does, or several do.
        UserError: only numbers do, and another column names other images.
    """
    ranks, absent = {}, dict[str, str]()  # of each column of names that are not here, the first one
    for name in names:
        values = _without_points(table.column(name))
        if is_index(name) and all(map(WHOLE_NUMBER.fullmatch, values)):
            continue
        skip, sample = files.folders_to_skip(values), values[:SAMPLE]
        share = sum(bool(files.matches(value, skip)) for value in sample) / len(sample)
        named = [value for value in sample if is_image(value.replace("\\", "/").rpartition("/")[2])]
        if share:
            known = IMAGE_COLUMNS.index(name.lower()) if name.lower() in IMAGE_COLUMNS else len(IMAGE_COLUMNS)
            ranks[name] = (round(share, 1), round(len(named) / len(sample), 1), -known - is_index(name))
        elif len(named) > len(sample) / 2:
            absent[name] = named[0]
    best = [name for name, rank in ranks.items() if rank == max(ranks.values())]
    which = f"{' and '.join(best)} both name" if best else "none of them names"
    example = "" if best or not absent else f" ({files.find(next(iter(absent.values())), 0)})"
    if len(best) == 1:
        others = [name for name, image in absent.items() if "://" not in image]  # addresses may end in any name
        if not others or not all(map(WHOLE_NUMBER.fullmatch, table.column(best[0]))):
            return best[0]
        # They may be the numbers of tasks, as labelling tools give them.
        which, example = f"{best[0]} has numbers that name", f", but {others[0]} names images that are not there"
    raise (UserError if len(best) == 1 else ForeignTableError)(
        f"which column of {table.path} holds the image files? The columns are {', '.join(table.columns)}, and {which} "
        f"files below {files.root}{example}. Name the column with --image_column, and the folder with --data_dir"
    )


def _without_points(values: list[str]) -> list[str]:
    """Return whole numbers that a table has as 1.0, 2.0, ... as 1, 2, ...; other values as they are."""
    if all(WHOLE_NUMBER.fullmatch(value) for value in values if value):
        return [value.partition(".")[0] for value in values]
    return values
