"""Tables of image files and labels: CSV, TSV, JSON lines and Parquet as text, row by row."""

import csv
import glob
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, Value
from datasets.exceptions import DatasetGenerationError

from luthier.errors import UserError
from luthier.images.columns import is_image_feature
from luthier.images.folder_checks import SPREADSHEETS, TABLES
from luthier.terminal import say

DELIMITERS = ",;\t|"
DELIMITER_OF = {".csv": ",", ".tsv": "\t"}  # the one that counts where several are as frequent


class Table(NamedTuple):
    """The text of a table.

    Attributes:
        path: of the file.
        columns: names, each of them once.
        rows: the values of each row, without white space around them; an empty text where there is none.
        numbers: of the rows, as an editor or a spreadsheet shows them.
        nested: the columns of lists or objects.
        flags: the columns of 0 and 1 that the column `label` was made of, see `column_roles.join_flags`.
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
            "(labelling tools export that; docs/usage.md has a script for COCO). A text with commas, semicolons or "
            "tabs may be called .csv"
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
    lines = [line for line in text.split("\n", 2)[:2] if line.strip()] or [first]
    # The names of columns may hold commas: what divides the first row divides the second one too.
    delimiter = max(
        DELIMITER_OF[path.suffix.lower()] + DELIMITERS,
        key=lambda each: (min(line.count(each) for line in lines), first.count(each)),
    )
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
    values = [texts_of(table, name) for name in table.column_names]
    rows = [(number, list(row)) for number, row in enumerate(zip(*values, strict=True), start=1)]
    plain = (Value, ClassLabel)
    nested = frozenset(name for name, feature in table.features.items() if not isinstance(feature, plain))
    return table.column_names or [""], rows, nested


def texts_of(rows: Dataset, column: str) -> list[str]:
    """Return a column as text, with the names of classes instead of numbers, which another file may give otherwise."""
    values, feature = rows[column][:], rows.features[column]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    return [_as_text(value) for value in values]


def _as_text(value: Any) -> str:
    """Return a value as a spreadsheet shows it; a whole number that was read as a float without its point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()
