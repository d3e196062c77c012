"""What columns of a table or a dataset may mean, besides images and labels: splits, groups, one class each."""

import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence

from datasets import ClassLabel, Dataset, Value

from luthier.images.columns import BINARY, LABEL_COLUMNS
from luthier.images.folder_checks import SPLIT_OF_FOLDER, are_splits
from luthier.images.tables import Table, texts_of
from luthier.terminal import plural, say

logger = logging.getLogger(__name__)

# Names of columns that say what an image is for, if one of their values does.
OF_SPLITS = {"set", "subset", "data_set", "dataset", "partition", "phase", "stage", "usage", "use", "fold"}
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
# As R, Python, databases and Excel write it.
NO_VALUE = ("NA", "N/A", "n/a", "NaN", "nan", "<NA>", "NULL", "null", "#N/A", "#NV")
NO_GROUP = (*NO_VALUE, "None", "none")  # as a label, that is the class of anything else
# What columns of groups are called, without "id" at the end; the first ones hold the others.
OF_GROUPS = ("patient", "subject", "person", "specimen", "slide", "lesion", "video", "sequence", "seq")


def say_source(table: Table, label: str | None, split: str | None) -> None:
    """Say which columns the labels and the splits are of."""
    shown = ", ".join(table.flags[:3]) + (", ..." if len(table.flags) > 3 else "")
    column = f"columns {shown}, from the one with 1," if table.flags else f"column {label!r}"
    splits = f", the splits of {split!r}" if split else ""
    say("labels", f"of the {column} of {table.path}{splits}")


def say_odd_values(table: Table, label: str, group: str | None) -> None:
    """Say which labels and groups may be none, and which labels are several classes in one cell."""
    labels = table.column(label)
    for column, odd, meaning in (
        (label, NO_VALUE, "a class. If it means that there is no label, remove these rows"),
        (group, NO_GROUP, "one group. If it means that there is none, empty these cells"),
    ):
        values = table.column(column) if column else []
        if found := [value for value in values if value in odd]:
            where = f"{plural(len(found), 'row')} of the column {column!r} of {table.path.name}"
            say("careful", f"{found[0]!r} in {where} is taken for {meaning}")
    # Lists, as Python writes them, have brackets and quotes.
    plain = {value: re.sub(r"[][\"']", "", value).strip() for value in {*labels} - {""}}
    joined = {
        value
        for value, names in plain.items()
        if len(parts := re.split(r"\s*[,;|+&/]\s*|\s+", names)) > 1 and {*plain.values()}.issuperset(parts)
    }
    if joined:
        rows = plural(sum(value in joined for value in labels), "row")
        say(
            "careful",
            f"{rows} of {table.path.name} with several classes in one label, such as {min(joined)!r}, which is taken "
            "for one more class. Each image has one: give these rows one label, or remove them",
        )


def say_likely_group(table: Table, used: Sequence[str | None]) -> None:
    """Say which column may hold groups, such as patients, where none is given.

    Args:
        table: whose columns are looked at.
        used: the columns that hold something else.
    """
    _say_group(table.path.name, [name for name in table.columns if name not in used], table.column)


def say_unused_columns(train: Dataset, source: str, used: Sequence[str], group: str | None) -> None:
    """Say which columns of a dataset may hold its splits or, where no column of groups is given, its groups.

    Args:
        train: the rows of train, with their own columns.
        source: the dataset's name.
        used: the columns of images and labels.
        group: the column of groups that the user has named.
    """
    plain = [
        name
        for name, feature in train.features.items()
        if isinstance(feature, (Value, ClassLabel)) and feature not in BINARY and name not in (*used, group)
    ]
    values_of = functools.partial(texts_of, train)
    for name in filter(_is_of_splits, plain):
        if are_splits(set(values_of(name))):
            logger.warning(
                f"Not used: the column {name!r} of {source}, which names splits. To keep these, write the rows of "
                "each into files of their own, such as train.parquet and test.parquet"
            )
    if group is None:
        # prepare.py numbers near-duplicates in `group` too. They are found again, and are few.
        shared = Counter(values_of("group")) if "group" in plain else Counter[str]()
        if 2 * sum(count for count in shared.values() if count > 1) <= len(train):
            plain = [name for name in plain if name != "group"]
        _say_group(source, plain, values_of, ("group", *OF_GROUPS))


def _say_group(
    source: str, names: Sequence[str], values_of: Callable[[str], list[str]], kinds: Sequence[str] = OF_GROUPS
) -> None:
    """Say which of some columns may hold groups, by its name and by values that several rows share."""
    called = {re.sub("[^a-z]", "", name.lower()).removesuffix("id"): name for name in names}
    for name in (called[kind] for kind in kinds if kind in called):
        values = [value for value in values_of(name) if value]
        if 1 < len(set(values)) < len(values):
            say(
                "careful",
                f"rows of {source} share values in the column {name!r}. If their images belong together, such as "
                f"those of one patient, add --group_column {name!r}: otherwise they count as independent, the score "
                "may be too high, and its interval too narrow",
            )
            return


def find_split_column(table: Table, given: Sequence[str | None], has_label: bool) -> str | None:
    """Return the column all of whose values are names of splits, if there is one; of several none.

    Args:
        table: that has no column called `split`.
        given: the columns that the user has named.
        has_label: one of these holds the labels.
    """
    found, flags = list[str](), list[str]()
    labelled = has_label or any(name.lower() in LABEL_COLUMNS for name in table.columns)
    for name in [name for name in table.columns if name not in given and name.lower() not in LABEL_COLUMNS]:
        values = {value.lower() for value in table.column(name)}
        others = sorted(values - SPLIT_OF_FOLDER.keys())
        splits = {SPLIT_OF_FOLDER[value] for value in values & SPLIT_OF_FOLDER.keys()}
        if "train" in splits and len(splits) > 1 and not others:
            found.append(name)
        elif "train" in splits and others and (len(splits) > 1 or (labelled and _is_of_splits(name))):
            logger.warning(
                f"Not used: the column {name!r} of {table.path}. It names splits, but also {others[0]!r}: correct it"
            )
        elif values <= FLAGS.keys() and name.lower().startswith("is_") and _is_flag_of_split(name):
            flags.append(name)
    if flags and labelled and not found:  # without another column of labels, `is_valid` may hold them
        logger.warning(
            f"Not used: the column {flags[0]!r} of {table.path}. If it says what the images are for, call it split, "
            "and write train, validation or test into each row"
        )
    if len(found) > 1:
        logger.warning(f"{table.path} has several columns of splits, {', '.join(found)}: name one with --split_column")
    return found[0] if len(found) == 1 else None


def _is_of_splits(name: str) -> bool:
    """Tell whether a column is called as if it said what an image is for."""
    return "split" in name.lower() or name.lower().replace(" ", "_") in OF_SPLITS


def is_index(name: str) -> bool:
    """Tell whether a column is the number of the row, as pandas writes it."""
    return not name or name.startswith(("Unnamed: ", "__index_level_"))


def join_flags(table: Table, given: Sequence[str | None]) -> Table:
    """Return a table with one column `label` in the place of a column of 0 and 1 for each class.

    Many competitions and labelling tools write such columns. They are classes only if each row has a single 1 (or none
    has one, as in the table of a test split without labels), and if there is nothing else beside images and splits.

    Args:
        table: as it was read.
        given: the columns that the user has named, that of the images first; none is that of the labels.
    """
    unnamed = [name for name in table.columns if name not in given and is_index(name)]
    rest = [name for name in table.columns if name not in (*given, *unnamed)]
    flags = _find_flags(table, rest)
    others = [name for name in rest if name not in flags and not _holds_splits(table, name)]
    # An index may be the column of the images, where there is no other.
    images, classes = [*others, given[0]] if given[0] else others or unnamed, _classes_of(table, flags)
    is_clear = len(flags) > 1 and len(images) == 1 and {len(each) for each in classes} in ({0}, {1})
    if not is_clear or any(name.lower() in LABEL_COLUMNS or _is_flag_of_split(name) for name in rest):
        return table
    kept = [number for number, name in enumerate(table.columns) if name not in flags]
    rows = [
        [*(row[number] for number in kept), *(each or [""])] for row, each in zip(table.rows, classes, strict=True)
    ]
    columns = [*(table.columns[number] for number in kept), "label"]
    return table._replace(columns=columns, rows=rows, flags=tuple(flags))


def _find_flags(table: Table, names: Sequence[str]) -> list[str]:
    """Return the columns that hold nothing but yes or no."""
    values = {name: {value.lower() for value in table.column(name) if value} for name in names}
    return [name for name, found in values.items() if found and found <= FLAGS.keys()]


def _classes_of(table: Table, flags: Sequence[str]) -> list[list[str]]:
    """Return for each row the columns of yes or no that hold yes."""
    columns = [[FLAGS.get(value.lower(), False) for value in table.column(name)] for name in flags]
    return [[name for name, is_set in zip(flags, row, strict=True) if is_set] for row in zip(*columns, strict=True)]


def _holds_splits(table: Table, name: str) -> bool:
    return name.lower() == "split" or SPLIT_OF_FOLDER.keys() >= {value.lower() for value in table.column(name)}


def _is_flag_of_split(name: str) -> bool:
    """Tell whether a column is called like a split, as `test` or `is_test`."""
    return name.lower().removeprefix("is_") in SPLIT_OF_FOLDER


def hint_at_flags(table: Table, names: Sequence[str]) -> str:
    """Return why columns of yes or no were not taken for classes; an empty text where there are no such columns."""
    flags = _find_flags(table, names)
    if len(flags) < 2:
        return ""
    counts = [len(each) for each in _classes_of(table, flags)]
    odd = next((index for index, count in enumerate(counts) if count != 1), None)
    others = [name for name in names if name not in flags]
    remedy = "write one column with the name of the class in each row"
    if odd is not None:
        where = f"row {table.numbers[odd]} has {counts[odd] or 'none'}"
        remedy = f"each image has one, but {where}: correct such rows"
    elif others:
        remedy = f"remove the other columns ({', '.join(others)})"
    return f". {', '.join(flags)} hold 0 or 1. If each is a class, {remedy}"
