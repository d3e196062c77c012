"""A dataset in Parquet files that is trained from as it is: rows are read in blocks, when they are needed."""

import contextlib
import hashlib
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict, Features, load_dataset_builder
from huggingface_hub import HfFileSystem
from torch.utils.data import get_worker_info

from luthier.cache import cache_key
from luthier.errors import UserError
from luthier.images.columns import (
    explain_loading,
    find_columns,
    index_of_labels,
    labels_of_splits,
    named_splits,
    resolved,
)
from luthier.images.decode import read_bytes, reason
from luthier.terminal import plural, say

logger = logging.getLogger(__name__)

BLOCK = 128  # rows that are read together, or more where the row groups of a file have more
SAMPLE = 10_000  # training images that are stored, for all but the training itself
VALIDATION, MAX_VALIDATION = 0.1, 10_000  # share and number of training images, where the data has no such split
# Batches are drawn from so many places in turns, each time from so many rows there: see `block_batches.BlockBatches`.
LANES, WINDOW = 8, 2 * BLOCK
READERS = 16  # files whose ends are read at the same time: each may be a request to the Hub


class Block(NamedTuple):
    """Rows of a Parquet file that are read together.

    Attributes:
        url: of the file, or its path.
        version: of the file; it changes with its content.
        first, last: row groups, `last` not included.
        rows: how many these have.
    """

    url: str
    version: str
    first: int
    last: int
    rows: int

    def read(self, columns: list[str]) -> Any:
        """Return columns of its rows, as a `pyarrow.Table`.

        Raises:
            UserError: the file has changed, or cannot be read.
        """
        try:
            if _version_of(self.url) != self.version:
                raise OSError("it has changed since the run began")
            with _opened(self.url) as file:
                return file.read_row_groups(range(self.first, self.last), columns=columns)
        except (OSError, ValueError) as error:  # pyarrow's own are of these
            raise UserError(
                f"{self.url} cannot be read: {reason(error)}. Mend it, and resume with --resume_from_checkpoint auto"
            ) from error


class Stream(NamedTuple):
    """A dataset whose training images stay in their files.

    Attributes:
        blocks: of the training images.
        labels: their class indices, int64 [N].
        image_column: name of the column.
        splits: train, validation and test with their own columns. Train is a sample, which has every class.
    """

    blocks: list[Block]
    labels: np.ndarray
    image_column: str
    splits: DatasetDict

    def rows(self, transform: Callable[[bytes], torch.Tensor]) -> "StreamedRows":
        """Return the training rows, with `pixel_values` that a function makes of an image file."""
        return StreamedRows(self.blocks, self.labels, self.image_column, transform)

    @property
    def fingerprint(self) -> str:
        """A hash of labels and sizes of the files, in any order of these; the images themselves are not read."""
        starts = np.cumsum([0, *(block.rows for block in self.blocks)])
        parts = [
            hashlib.sha256(self.labels[begin:end].tobytes()).hexdigest() for begin, end in itertools.pairwise(starts)
        ]
        return cache_key(sorted(parts))


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
        self._most_kept = 2 * WINDOW + 2 * max(self.sizes)  # rows of a lane: two windows, and what sticks out of them

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
                pixel_values = self.transform(read_bytes(image if isinstance(image, dict) else {"bytes": image}))
                return {"pixel_values": pixel_values, "labels": int(self.labels[begin + offset])}
            except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
                name = Path(self.blocks[number].url).name
                logger.warning(f"Not used: row {begin + offset} of train, in {name}: {reason(error)}")
        raise UserError(f"no image of the {plural(size, 'row')} of a block of {self.blocks[number].url} can be read")

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
    """A split in Parquet files.

    Attributes:
        blocks: of its rows.
        values: the label of each row, as it is in the files.
    """

    blocks: list[Block]
    values: list


def open_stream(
    name: str,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    split_seed: int = 1,
    validation_fraction: float | None = None,
) -> Stream:
    """Open a dataset of Parquet files: read all labels, and no image but those of the sample and the other splits.

    If there is no test split, that of validation takes its place. If there is no validation split, blocks of train
    are set apart for it.

    Args:
        name: a folder, or a dataset on the Hub.
        config: the configuration, where the dataset has several.
        image_column, label_column, group_column: see `data.list_images`.
        split_seed: decides which blocks are for validation, and which are the sample.
        validation_fraction: share of the training images that is set apart for validation; a tenth, and at most
            `MAX_VALIDATION` of them, if not given.

    Raises:
        UserError: it cannot be loaded, lacks a split that cannot be set apart, or is ordered by class.
    """
    with explain_loading(name):
        files, features = _list_files(name, config)
        image_column, label_column = find_columns(features, image_column, label_column)
        sources = {split: _read_labels(urls, image_column, label_column) for split, urls in files.items()}
    values = labels_of_splits({split: source.values for split, source in sources.items()}, label_column)
    blocks = {split: sources[split].blocks for split in values}
    if not sources["train"].values:
        raise UserError(f"{name} has no training images")
    if len(blocks) == 1:
        raise UserError(f"--streaming needs a test split, which {name} lacks. {_remedy(name)}")
    if "test" not in blocks:
        blocks["test"] = blocks.pop("validation")
        say("test", "the data has no test split: that of validation takes its place")
    index_of = index_of_labels(features[label_column], set().union(*map(set, values.values())), label_column)
    labels = np.array([index_of[value] for value in values["train"]])
    _check_order(labels, name)
    train = blocks["train"]
    of_block = np.split(labels, np.cumsum([block.rows for block in train])[:-1])
    order = np.random.default_rng(split_seed).permutation(len(train))
    if "validation" not in blocks and group_column:
        raise UserError(f"--group_column needs a validation split, which {name} lacks. {_remedy(name)}")
    if "validation" not in blocks:
        share = min(VALIDATION, MAX_VALIDATION / len(labels)) if validation_fraction is None else validation_fraction
        apart = _set_apart(of_block, order, share * len(labels))
        blocks["validation"], order = [train[number] for number in apart], order[~np.isin(order, apart)]
        if not apart or not len(order):
            raise UserError(f"{name} has too few row groups to set some apart for validation. {_remedy(name)}")
    blocks["train"] = [train[number] for number in _draw_sample(of_block, order)]
    kept = np.sort(order)
    images = plural(sum(len(of_block[number]) for number in kept), "training image")
    say("stream", f"{images}, read in blocks; below, train is a sample of them")
    columns = [image_column, label_column, *([group_column] if group_column in features else [])]
    with explain_loading(name):
        splits = _store(blocks, Features({column: features[column] for column in columns}))
    return Stream(
        [train[number] for number in kept], np.concatenate([of_block[number] for number in kept]), image_column, splits
    )


def _remedy(name: str) -> str:
    return f"Write files that have all: python prepare.py {name} shards, and train from the folder shards"


def _list_files(name: str, config: str | None) -> tuple[dict[str, list[str]], Features]:
    """Return the Parquet files of each split of a dataset, and its columns.

    Raises:
        UserError: it has other files.
    """
    builder = load_dataset_builder(resolved(name), config)
    if builder.name != "parquet" or not builder.config.data_files:
        raise UserError(f"--streaming reads Parquet files, and {name} has others. {_remedy(name)}")
    files = named_splits({str(split): list(urls) for split, urls in builder.config.data_files.items()}, name)
    if builder.info.features:
        return files, builder.info.features
    with _opened(files["train"][0]) as file:
        return files, Features.from_arrow_schema(file.schema_arrow)


@contextlib.contextmanager
def _opened(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of this machine or of the Hub."""
    # Without a cache each column of a row group is one request; with it labels would bring megabytes of images along.
    on_hub = url.startswith("hf://")
    with (
        HfFileSystem().open(url, cache_type="none") if on_hub else contextlib.nullcontext(url) as source,
        pq.ParquetFile(source) as file,
    ):
        yield file


def _version_of(url: str) -> str:
    """Return what changes with a file; the address of one on the Hub has its revision."""
    return "" if url.startswith("hf://") else "{0.st_size} {0.st_mtime_ns}".format(Path(url).stat())


def _read_labels(urls: list[str], image_column: str, label_column: str) -> Source:
    """Return the blocks of some files, and the labels of their rows."""
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda url: _read_end(url, image_column, label_column), urls))
    return Source(
        [block for part in parts for block in part.blocks], [value for part in parts for value in part.values]
    )


def _read_end(url: str, image_column: str, label_column: str) -> Source:
    """Return the blocks of a file, and the labels of its rows."""
    version, blocks, first, rows = _version_of(url), [], 0, 0
    with _opened(url) as file:
        missing = {image_column, label_column} - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"{url} has no column {min(missing)!r}, which other files have")
        groups = file.metadata.num_row_groups
        for group in range(groups):
            rows += file.metadata.row_group(group).num_rows
            if rows >= BLOCK or (rows and group == groups - 1):
                blocks.append(Block(url, version, first, group + 1, rows))
                first, rows = group + 1, 0
        return Source(blocks, file.read(columns=[label_column]).column(0).to_pylist())


def _check_order(labels: np.ndarray, name: str) -> None:
    """Raise UserError where neighbours are of one class much more often than by chance: blocks would be of one class.

    Args:
        labels: in the order of the files.
        name: of the dataset.
    """
    by_chance = float(np.square(np.bincount(labels) / len(labels)).sum())
    if (labels[1:] == labels[:-1]).mean() > (1 + by_chance) / 2:
        raise UserError(f"the images of {name} are ordered by class, which a stream does not mix. {_remedy(name)}")


def _set_apart(per_block: list[np.ndarray], order: np.ndarray, wanted: float) -> list[int]:
    """Return the first blocks of an order that have so many rows together, and less than twice as many.

    Every class keeps an image elsewhere.
    """
    left, taken, rows = np.bincount(np.concatenate(per_block)), [], 0
    for number in order:
        if rows >= wanted:
            break
        counts = np.bincount(per_block[number], minlength=len(left))
        if rows + len(per_block[number]) < 2 * wanted and not ((counts > 0) & (counts == left)).any():
            left, rows = left - counts, rows + len(per_block[number])
            taken.append(int(number))
    return taken


def _draw_sample(per_block: list[np.ndarray], order: np.ndarray) -> list[int]:
    """Return the first blocks of an order that have `SAMPLE` rows together, and later ones that have new classes."""
    seen: set[int] = set()
    drawn, rows = [], 0
    for number in order:
        classes = set(np.unique(per_block[number]).tolist())
        if rows < SAMPLE or classes - seen:
            rows += len(per_block[number])
            drawn.append(int(number))
            seen |= classes
    return drawn


def _store(blocks: Mapping[str, list[Block]], features: Features) -> DatasetDict:
    """Return the rows of all blocks as datasets on the disk, which are kept for the next run."""
    return DatasetDict(
        {
            split: Dataset.from_generator(
                _rows_of, features=features, gen_kwargs={"blocks": tuple(of_split), "columns": tuple(features)}
            )
            for split, of_split in blocks.items()
        }
    )


def _rows_of(blocks: Sequence[Block], columns: Sequence[str]) -> Iterator[dict]:
    for block in blocks:
        yield from block.read(list(columns)).to_pylist()
