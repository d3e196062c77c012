"""Parquet files and WebDataset archives: their labels, and rows that are read in blocks when they are needed."""

import contextlib
import functools
import itertools
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Value, load_dataset_builder
from huggingface_hub import HfApi, HfFileSystem
from torch.utils.data import get_worker_info

from luthier.cache import cache_key, read_cached, write_cached
from luthier.errors import UserError
from luthier.images.archives import index_archive, read_part
from luthier.images.columns import find_columns
from luthier.images.decode import read_bytes, reason
from luthier.images.loading import (
    check_class_names,
    check_complete,
    check_own_files,
    explain_loading,
    named_splits,
    resolved,
)
from luthier.terminal import of_project, plural, quote

logger = logging.getLogger(__name__)

BLOCK = 128  # rows that are read together, or more where the row groups of a file have more
# Batches are drawn from so many places in turns, each time from so many rows there: see `block_batches.BlockBatches`.
LANES, WINDOW = 8, 2 * BLOCK
MAX_GROUP = 512_000_000  # bytes of the images of a row group
ARCHIVE, ARCHIVE_VERSION = ".tar", 3  # the version is that of an archive's index
BUCKETS = "hf://buckets/"  # how the addresses of their files begin
READERS = 16  # files whose ends are read at the same time: each may be a request to the Hub


class Block(NamedTuple):
    """Rows of a file that are read together.

    Attributes:
        url: of the file, or its path.
        version: of the file; it changes with its content.
        begin, end: row groups of a Parquet file, or bytes of an archive, `end` not included.
        rows: how many these have.
        image_column: of an archive: which column holds images.
    """

    url: str
    version: str
    begin: int
    end: int
    rows: int
    image_column: str = ""

    def read(self, columns: list[str]) -> Any:
        """Return columns of its rows, as a `pyarrow.Table`.

        Raises:
            UserError: the file has changed, or cannot be read.
        """
        try:
            if _version_of(self.url) != self.version:
                raise OSError("it has changed since the run began")
            with _opened(self.url) as file:
                if self.url.endswith(ARCHIVE):
                    table = pa.Table.from_pylist(read_part(file, self.begin, self.end, columns, self.image_column))
                else:
                    table = pq.ParquetFile(file).read_row_groups(range(self.begin, self.end), columns=columns)
            if len(table) != self.rows:
                raise OSError(f"{plural(self.rows, 'row')} were there before, and now {len(table)}")
            return table
        except Exception as error:  # of the file, pyarrow or the network: they have no common base
            raise UserError(
                f"{self.url} cannot be read: {reason(error)}. Mend it, and resume with --output_dir and "
                "--resume_from_checkpoint auto"
            ) from error


class StreamedRows:
    """Training rows that are read from their files, a block at a time; the last few blocks stay in memory.

    An image that cannot be read is replaced with the next one of its block.

    Args:
        blocks: of the rows.
        labels: class indices, int64 [N].
        image_column: name of the column.
        transform: makes `pixel_values` of an image file.

    Attributes:
        sizes: rows of each block.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        labels: np.ndarray,
        image_column: str,
        transform: Callable[[bytes], torch.Tensor],
    ):
        self.blocks, self.labels, self.image_column, self.transform = blocks, labels, image_column, transform
        self.sizes = [block.rows for block in blocks]
        self._ends = np.cumsum(self.sizes)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._unreadable: set[int] = set()  # rows that this process has named
        self._most_kept = 2 * WINDOW + 2 * max(self.sizes)  # rows of a lane: two windows, and what sticks out of them

    @property
    def order(self) -> str:
        """A hash of the labels and the blocks in their order, on which the batches of an epoch depend."""
        return cache_key(self.sizes, self.labels.tobytes())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        begin, size = int(self._ends[number]) - self.sizes[number], self.sizes[number]
        images = self.images_of(number)
        for step in range(size):
            offset = (row - begin + step) % size
            try:
                image = images[offset].as_py()
                data = image["bytes"] if isinstance(image, dict) else image
                pixel_values = self.transform(read_bytes({"bytes": data, "path": None}))  # see `check_holds_images`
                return {"pixel_values": pixel_values, "labels": int(self.labels[begin + offset])}
            except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
                if begin + offset not in self._unreadable:  # in each epoch again
                    self._unreadable.add(begin + offset)
                    name = Path(self.blocks[number].url).name
                    logger.warning(f"Not used: row {begin + offset} of train, in {name}: {reason(error)}")
        raise UserError(
            f"no image of the {plural(size, 'row')} of a block of {self.blocks[number].url} can be read: write the "
            "file again, or remove it"
        )

    def images_of(self, number: int) -> Any:
        """Return the images of a block, of which the last few stay in memory."""
        if number not in self._kept:
            worker = get_worker_info()
            lanes = LANES // math.gcd(LANES, worker.num_workers if worker else 1)  # that this process sees
            while self._kept and sum(map(len, self._kept.values())) + self.sizes[number] > lanes * self._most_kept:
                self._kept.popitem(last=False)
            self._kept[number] = self.blocks[number].read([self.image_column]).column(0)
        self._kept.move_to_end(number)
        return self._kept[number]


class Source(NamedTuple):
    """A split in files.

    Attributes:
        blocks: of its rows.
        values: the label of each row, as it is in the files.
    """

    blocks: list[Block]
    values: list


def read_sources(
    name: str, config: str | None, image_column: str | None, label_column: str | None, group_column: str | None
) -> tuple[dict[str, Source], Features, tuple[str, str]]:
    """Return the splits of a dataset, its features, and which columns are those of images and labels.

    Args:
        name: a folder, or a dataset on the Hub.
        config: the configuration, where the dataset has several.
        image_column, label_column, group_column: see `data.list_images`.

    Raises:
        UserError: it cannot be loaded, is not complete or in other files, or see `columns.find_columns`.
    """
    check_complete(Path(name))
    with explain_loading(name):
        files, features = _list_files(name, config)
        image_column, label_column = find_columns(features, image_column, label_column, group_column)
        sources = {split: _read_labels(urls, image_column, label_column, features) for split, urls in files.items()}
    return sources, features, (image_column, label_column)


def remedy(name: str) -> str:
    """Return what to do where a dataset cannot be streamed."""
    command = quote("python", of_project("prepare.py"), name, "shards")
    return f"To write such files, run {command}. Then train with --data_dir shards --streaming"


def _list_files(name: str, config: str | None) -> tuple[dict[str, list[str]], Features]:
    """Return the files of each split of a dataset, and its columns.

    Raises:
        UserError: they are neither Parquet files nor archives.
    """
    builder = load_dataset_builder(resolved(name), config)
    files = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
    check_own_files(itertools.chain.from_iterable(files.values()), name)
    in_archives = builder.name == "webdataset" and all(
        url.endswith(ARCHIVE) for urls in files.values() for url in urls
    )
    if not files or not (in_archives or builder.name == "parquet"):
        raise UserError(
            f"--streaming reads Parquet files and WebDataset archives (.tar), and {name} has others. {remedy(name)}"
        )
    files = named_splits(files, name)
    elsewhere = [url for url in itertools.chain.from_iterable(files.values()) if url.startswith("https://")]
    if elsewhere:
        raise UserError(f"--streaming reads files of this machine and of the Hub, not {elsewhere[0]}. {remedy(name)}")
    if builder.info.features:
        return files, builder.info.features
    if in_archives:
        return files, next(iter(builder.as_streaming_dataset().values())).features
    with _opened(files["train"][0]) as file:
        return files, Features.from_arrow_schema(pq.ParquetFile(file).schema_arrow)


@contextlib.contextmanager
def _opened(url: str, in_order: bool = False) -> Iterator[Any]:
    """Open a file of this machine or of the Hub, which is read in order or here and there."""
    if url.startswith("hf://"):
        # Without a cache each column of a row group is one request; with it labels would bring megabytes of images.
        with HfFileSystem().open(url, cache_type="readahead" if in_order else "none") as file:
            yield file
    else:
        with pa.OSFile(url) as file:  # which Parquet is read from without Python
            yield file


def _version_of(url: str) -> str:
    """Return what changes with a file; the address of one on the Hub has its revision, but for one in a bucket."""
    if url.startswith(BUCKETS):
        owner, name, path = url.removeprefix(BUCKETS).split("/", 2)
        facts = next(iter(HfApi().get_bucket_paths_info(f"{owner}/{name}", [path])), None)
        if facts is None:
            raise FileNotFoundError(f"there is no file {url}")
        return f"{facts.size} {facts.xet_hash}"
    return "" if url.startswith("hf://") else "{0.st_size} {0.st_mtime_ns}".format(Path(url).stat())


def _read_labels(urls: list[str], image_column: str, label_column: str, features: Features) -> Source:
    """Return the blocks of some files, and the labels of their rows."""
    in_archives = urls[0].endswith(ARCHIVE)
    index = _index_archive if in_archives else functools.partial(_index_parquet, features=features)
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda url: index(url, image_column, label_column), urls))
    values = [value for part in parts for value in part.values]
    stored = {value: _as_stored(features[label_column], value) for value in set(values)}
    return Source([block for part in parts for block in part.blocks], [stored[value] for value in values])


def _index_parquet(url: str, image_column: str, label_column: str, features: Features) -> Source:
    """Return the blocks of a Parquet file, and the labels of its rows."""
    version, blocks, first, rows, held = _version_of(url), [], 0, 0, 0
    with _opened(url) as source:
        file = pq.ParquetFile(source)
        missing = {image_column, label_column} - set(file.schema_arrow.names)
        if missing:
            raise UserError(
                f"{url} has no column {min(missing)!r}, which other files have: write the file again with it, or "
                "remove the file"
            )
        check_class_names(url, file.schema_arrow, features)
        groups = file.metadata.num_row_groups
        for group in range(groups):
            size = _size_of(file.metadata.row_group(group), image_column)
            if size > MAX_GROUP:
                raise UserError(
                    f"{url} has a row group with {size / 1e6:,.0f} MB of images. They are read together, and a stream "
                    f"has several in memory at a time: at most {MAX_GROUP / 1e6:,.0f} MB. Write it in row groups of "
                    "a hundred rows, by python prepare.py or with to_parquet(row_group_size=100)"
                )
            if rows and held + size > MAX_GROUP:  # together they would be too large to be read at once
                blocks.append(Block(url, version, first, group, rows))
                first, rows, held = group, 0, 0
            rows, held = rows + file.metadata.row_group(group).num_rows, held + size
            if rows >= BLOCK or (rows and group == groups - 1):
                blocks.append(Block(url, version, first, group + 1, rows))
                first, rows, held = group + 1, 0, 0
        return Source(blocks, file.read(columns=[label_column]).column(0).to_pylist())


def _size_of(group: Any, column: str) -> int:
    """Return the bytes of a column in a row group, when it has been read."""
    parts = [group.column(number) for number in range(group.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if f"{part.path_in_schema}.".startswith(f"{column}."))


def _index_archive(url: str, image_column: str, label_column: str) -> Source:
    """Return the blocks of an archive, and the labels of its rows; both are kept for the next run.

    An archive of the Hub has to be read as a whole for this, because its labels lie between the images.

    Raises:
        UserError: it is damaged, or a row has no image or not the label that its ending promises.
    """
    version = _version_of(url)
    key = cache_key(ARCHIVE_VERSION, url, version, label_column, image_column, BLOCK, MAX_GROUP)
    kept = read_cached("archives", key)
    if kept is None:
        try:
            with _opened(url, in_order=True) as file:
                index = json.dumps(index_archive(file, label_column, image_column, BLOCK, MAX_GROUP)).encode()
        except (TarError, ValueError) as error:
            raise UserError(f"{url} cannot be read: {reason(error)}. Write it again, or remove it") from error
        kept = torch.frombuffer(bytearray(index), dtype=torch.uint8)
        write_cached("archives", key, kept)
    parts, values = json.loads(kept.numpy().tobytes())
    return Source([Block(url, version, begin, end, rows, image_column) for begin, end, rows in parts], values)


def _as_stored(feature: Any, value: Any) -> Any:
    """Return a value of a file as `datasets` stores it: text as a number where the column has numbers or classes."""
    if isinstance(feature, ClassLabel):
        try:
            return feature.encode_example(value) if isinstance(value, str) else value
        except ValueError:  # no class is called so, which `index_of_labels` says
            return value
    return feature.encode_example(value) if isinstance(feature, Value) and value is not None else value
