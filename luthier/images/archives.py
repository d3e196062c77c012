"""WebDataset archives: which bytes hold which rows, and rows that are read from a part of the bytes."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

NUMBERS = ("cls", "cls2", "index", "inx", "id")  # files that hold a whole number, as `datasets` reads them
JSON = ("json", "jsn")  # files that hold JSON, as `datasets` reads them
CHUNK = 1 << 20  # bytes that are read at a time where nothing should be


class Part(NamedTuple):
    """Bytes of an archive.

    Attributes:
        begin, end: where they are, `end` not included.
        rows: how many they hold.
    """

    begin: int
    end: int
    rows: int


def index_archive(file: BinaryIO, column: str, image_column: str, rows: int, most: int) -> tuple[list[Part], list]:
    """Return the parts of an archive, with so many rows each, and the label of each row.

    It reads the headers and the files of the labels, and skips the others.

    Args:
        file: the archive, which is not compressed.
        column: ending of the labels' names.
        image_column: of the images'.
        rows: in a part; the last one may have fewer, and one whose files are large.
        most: bytes of a part that has several rows: it is read at once.

    Raises:
        tarfile.TarError: it is no archive, or damaged.
        ValueError: a file does not hold what its ending promises, a row has no image, or two files have one name.
    """
    parts: list[Part] = []
    values = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for row in _read_rows(archive):
            if image_column not in row.files:
                raise ValueError(
                    f"{row.name} has no image {row.name}.{image_column}, but .{', .'.join(sorted(row.files))}. Give "
                    "all images one ending, in small or capital letters alike"
                )
            if not parts or parts[-1].rows == rows or row.end - parts[-1].begin > most:
                parts.append(Part(row.begin, row.end, 0))
            parts[-1] = Part(parts[-1].begin, row.end, parts[-1].rows + 1)
            values.append(_read_value(archive, row.files[column]) if column in row.files else None)
        _check_end(file, archive)
    return parts, values


def check_whole(file: BinaryIO) -> None:
    """Read the headers of an archive, to know that it can be read to its end.

    Raises:
        tarfile.TarError: it is no archive, or damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for _ in _read_headers(archive):
            pass
        _check_end(file, archive)


def _check_end(file: BinaryIO, archive: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` where something follows the last file that was found.

    A damaged header ends an archive for `tarfile`, as do the zeros at the end of the first of two in one file.
    """
    file.seek(archive.offset)
    while rest := file.read(CHUNK):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"the header at byte {archive.offset:,} is damaged, or another archive follows")


def read_part(file: BinaryIO, begin: int, end: int, columns: Sequence[str], image_column: str) -> list[dict[str, Any]]:
    """Return columns of the rows of a part: images as `datasets.Image` has them, others as their endings promise.

    Args:
        file: the archive.
        begin, end: of the part.
        columns: endings of the files' names; a row without such a file has None.
        image_column: which of them are images.

    Raises:
        OSError: the file ends too early.
        tarfile.TarError: it is damaged.
        ValueError: as in `index_archive`.
    """
    file.seek(begin)
    data = file.read(end - begin)
    if len(data) < end - begin:
        raise OSError("it ends too early")
    table = []
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        for _, _, name, files in _read_rows(archive):
            values: dict[str, Any] = dict.fromkeys(columns)
            for column in files.keys() & values.keys():
                if column == image_column:
                    values[column] = {"bytes": _read(archive, files[column]), "path": f"{name}.{column}"}
                else:
                    values[column] = _read_value(archive, files[column])
            table.append(values)
    return table


class _Row(NamedTuple):
    """The files of a row: where they are, their common name, and each of them by the rest of its name."""

    begin: int
    end: int
    name: str
    files: dict[str, tarfile.TarInfo]


def _read_rows(archive: tarfile.TarFile) -> Iterator[_Row]:
    """Yield the rows of an archive: neighbouring files whose names are the same up to the first dot."""
    for name, group in itertools.groupby(_read_headers(archive), key=lambda row: row.name):
        rows = list(group)
        files = {column: file for row in rows for column, file in row.files.items()}
        if len(files) < len(rows):  # one of two images would be lost
            raise ValueError(
                f"two files of {name} that follow each other have one ending: give each image a name of its own"
            )
        yield _Row(rows[0].begin, rows[-1].end, name, files)


def _read_headers(archive: tarfile.TarFile) -> Iterator[_Row]:
    """Yield each file as a row of its own."""
    while file := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        folder, slash, last = file.name.rpartition("/")
        stem, dot, column = last.partition(".")
        if file.isfile() and stem and dot:
            yield _Row(file.offset, archive.offset, f"{folder}{slash}{stem}", {column: file})


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse():  # a few bytes may stand for any number of zeros
        raise tarfile.ReadError(f"{member.name} is a sparse file, which is not read")
    file = archive.extractfile(member)
    assert file is not None  # for it is a file
    return file.read()


def _read_value(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | int | float | None:
    """Return what a file holds: a whole number or a value of JSON if its ending says so, or else text."""
    data, ending = _read(archive, member), member.name.rpartition(".")[2].lower()
    if ending in JSON:
        try:
            value = json.loads(data)  # bytes, as `datasets` does: they may begin with a mark of their encoding
        except ValueError as error:
            raise ValueError(f"{member.name} is not JSON: {error}") from None
        if isinstance(value, (dict, list)):
            raise ValueError(f"{member.name} holds {data[:40]!r} where one value was expected")
        return value
    text = data.decode("utf-8")
    if ending not in NUMBERS:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{member.name} holds {text[:40]!r} where a whole number was expected") from None
