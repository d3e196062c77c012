"""Tables of image files and labels: CSV, TSV, JSON lines and Parquet as text, row by row."""

import csv
import glob
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Value
from datasets.exceptions import DatasetGenerationError

from luthier.errors import UserError
from luthier.images.columns import BINARY, LABEL_COLUMNS, is_image_feature
from luthier.images.folders import SPLIT_OF_FOLDER, SPREADSHEETS, TABLES
from luthier.terminal import plural, say

logger = logging.getLogger(__name__)

DELIMITERS = ",;\t|"
DELIMITER_OF = {".csv": ",", ".tsv": "\t"}  # the one that counts where several are as frequent
# Names of columns that say what an image is for, if one of their values does.
OF_SPLITS = {"set", "subset", "data_set", "dataset", "partition", "phase", "stage", "usage", "use", "fold"}
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True, "no": False, "yes": True}
# As R, Python, databases and Excel write it.
NO_VALUE = ("NA", "N/A", "n/a", "NaN", "nan", "<NA>", "NULL", "null", "#N/A", "#NV")
NO_GROUP = (*NO_VALUE, "None", "none")  # as a label, that is the class of anything else
# What columns of groups are called, without "id" at the end; the first ones hold the others.
OF_GROUPS = ("patient", "subject", "person", "specimen", "slide", "lesion", "video", "sequence", "seq")


class Table(NamedTuple):
    """The text of a table.

    Attributes:
        path: of the file.
        columns: names, each of them once.
        rows: the values of each row, without white space around them; an empty text where there is none.
        numbers: of the rows, as an editor or a spreadsheet shows them.
        nested: the columns of lists or objects.
        flags: the columns of 0 and 1 that the column `label` was made of, see `join_flags`.
    """

    path: Path
    columns: list[str]
    rows: list[list[str]]
    numbers: list[int]
    nested: frozenset[str]
    flags: tuple[str, ...] = ()

    def column(self, name: str) -> list[str]:
        """Return the values of a column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]


def read_table(path: Path, least: int = 2) -> Table:
    """Read a CSV, TSV, JSON lines or Parquet file; rows without any value are left out.

    Args:
        path: of the file.
        least: how many columns it must have.

    Raises:
        UserError: it is not such a file, or not a table.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"--labels {path} is not a file: give a table ({', '.join(TABLES)})")
    if suffix in SPREADSHEETS:
        raise UserError(f"{path} is a spreadsheet: save it as CSV, and give that file")
    if suffix in (".json", ".xml", ".txt"):
        raise UserError(
            f"{path} is not read as a table. Write one as CSV, with a row for each image: its file and its class "
            "(labelling tools export that). A text with commas, semicolons or tabs may be called .csv"
        )
    if suffix not in TABLES:
        raise UserError(f"{path} is not a table that can be read: give one of {', '.join(TABLES)}")
    nested = frozenset[str]()
    if suffix in DELIMITER_OF:
        columns, rows = _read_delimited(path)
    elif suffix == ".parquet":
        columns, rows, nested = _read_parquet(path)
    else:
        columns, rows, nested = _read_json_lines(path)
    _check_columns(path, columns, least)
    filled = [(number, row) for number, row in rows if any(row)]
    if not filled:
        raise UserError(f"{path} has no rows: give a table with a row for each image")
    return Table(path, columns, [row for _, row in filled], [number for number, _ in filled], nested)


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
    known = {*labels} - {""}
    joined = {
        value for value in known if len(parts := re.split(r"\s*[,;|+&/]\s*", value)) > 1 and known.issuperset(parts)
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


def say_unused_columns(train: Dataset, source: str, used: Sequence[str | None], group: str | None) -> None:
    """Say which columns of a dataset may hold its splits or, where no column of groups is given, its groups.

    Args:
        train: the rows of train, with their own columns.
        source: the dataset's name.
        used: the columns that the user has named for something else.
        group: the column of groups that the user has named.
    """
    plain = [
        name
        for name, feature in train.features.items()
        if isinstance(feature, (Value, ClassLabel)) and feature not in BINARY and name not in (*used, group)
    ]

    def values_of(name: str) -> list[str]:
        return [_as_text(value) for value in _named(train[name][:], train.features[name])]

    for name in filter(_is_of_splits, plain):
        values = {value.lower() for value in values_of(name)}
        splits = {SPLIT_OF_FOLDER.get(value) for value in values}
        if "train" in splits and len(splits) > 1 and None not in splits:
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
    rest = [name for name in table.columns if name not in given and not is_index(name)]
    flags = _find_flags(table, rest)
    others = [name for name in rest if name not in flags and not _holds_splits(table, name)]
    image, classes = given[0], _classes_of(table, flags)
    is_clear = len(flags) > 1 and len(others) + bool(image) == 1 and {len(each) for each in classes} in ({0}, {1})
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


def _check_columns(path: Path, columns: list[str], least: int) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}: rename or remove one")
    if len(columns) == 1 and any(delimiter in columns[0] for delimiter in DELIMITERS):
        raise UserError(f"{path} has quotation marks around whole rows, which makes one value of each: remove them")
    if len(columns) < least:
        has = f"has the one column {columns[0]!r}" if columns[0] else "has no columns"
        raise UserError(
            f"{path} {has}: it needs one for the image files and one for the labels, "
            f"with a name for each in the first row, divided by one of {' '.join(map(repr, DELIMITERS))}"
        )


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8 or UTF-16, or else in Windows' Western European encoding."""
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        remedy = "if letters look wrong, save it as UTF-8"
        say("table", f"{path.name} is not in UTF-8, and is read as Windows-1252: {remedy}")
        return data.decode("cp1252", errors="replace")


def _read_delimited(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    text = _read_text(path)
    if "\0" in text:
        raise UserError(f"{path} holds binary data: save it as CSV in UTF-8")
    first, begin = text.partition("\n")[0], 1
    if first.startswith("sep="):  # Excel's own line
        text, begin = text.partition("\n")[2], 2
        first = text.partition("\n")[0]
    delimiter = max(DELIMITER_OF[path.suffix.lower()] + DELIMITERS, key=first.count)
    # Strict, or one quote too many would take the rest of the file for a value.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows, last = [], 0
    try:
        columns = [name.strip() for name in next(reader, [])]
        while len(columns) > 1 and not columns[-1]:
            columns.pop()  # a delimiter at the end of the line
        last = reader.line_num
        for values in reader:
            number, last = last + begin, reader.line_num
            row = [value.strip() for value in values]
            if any(row[len(columns) :]) or (0 < len(row) < len(columns) and any(row)):
                if len(columns) == 1:
                    raise UserError(
                        f"the first row of {path}, {columns[0]!r}, does not name the columns of row {number}, which "
                        f"has {len(row)} values: remove what is above the names, or add those that are missing; a "
                        f"value that holds {delimiter!r} needs quotes around it"
                    )
                raise UserError(
                    f"{path}, row {number} has {len(row)} values, but there are {len(columns)} columns "
                    f"({', '.join(columns)}): mend the row; a value that holds {delimiter!r} needs quotes around it"
                )
            rows.append((number, row[: len(columns)]))
    except csv.Error as error:
        raise UserError(
            f"{path}, row {last + begin} cannot be read: {error}. Is there a quotation mark too many, or missing?"
        ) from error
    return columns or [""], rows


def _read_json_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], frozenset[str]]:
    found: list[tuple[int, dict]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, row {number} is not JSON: {error}. Each line holds one object") from error
            if not isinstance(values, dict):
                raise UserError(f"{path}, row {number} is not an object in curly brackets: each line holds one")
            try:
                json.dumps(values, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{path}, row {number} holds half of a character (\\ud8..): write it anew") from error
            found.append((number, values))
    columns = list(dict.fromkeys(name for _, values in found for name in values)) or [""]
    nested = frozenset(name for _, row in found for name, value in row.items() if isinstance(value, (list, dict)))
    rows = [(number, [_as_text(values.get(name)) for name in columns]) for number, values in found]
    return columns, rows, nested


def _read_parquet(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], frozenset[str]]:
    try:
        table = Dataset.from_parquet(glob.escape(str(path)), keep_in_memory=True)
    except (DatasetGenerationError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read: write it anew, or save it as CSV") from error
    if any(map(is_image_feature, table.features.values())):
        raise UserError(f"{path} holds the images themselves: load it with --dataset_name {path.parent}")
    values = [map(_as_text, _named(table[name][:], table.features[name])) for name in table.column_names]
    rows = [(number, list(row)) for number, row in enumerate(zip(*values, strict=True), start=1)]
    plain = (Value, ClassLabel)
    nested = frozenset(name for name, feature in table.features.items() if not isinstance(feature, plain))
    return table.column_names or [""], rows, nested


def _named(values: Sequence[Any], feature: Any) -> Sequence[Any]:
    """Return values with the names of classes instead of numbers, which another file may give otherwise."""
    if not isinstance(feature, ClassLabel):
        return values
    return [None if value is None or value < 0 else feature.int2str(value) for value in values]


def _as_text(value: Any) -> str:
    """Return a value as a spreadsheet shows it; a whole number that was read as a float without its point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
