"""A dataset whose training images stay in their files: its sample, its other splits, and its rows."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from datasets import DatasetDict, Features

from luthier.cache import cache_key, dataset_of
from luthier.errors import UserError
from luthier.images.columns import index_of_labels, labels_of_splits
from luthier.images.loading import check_holds_images, explain_loading
from luthier.images.shards import Block, StreamedRows, read_sources, remedy
from luthier.images.splits import MAX_VALIDATION
from luthier.options import check_fraction
from luthier.terminal import plural, say

VALIDATION = 0.1  # share of training images, where the data has no such split
SAMPLE, OF_CLASS = 10_000, 3  # training images that are stored, for all but the training itself; at least, of a class


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

    def rows(self, transform: Callable[[bytes], torch.Tensor]) -> StreamedRows:
        """Return the training rows, with `pixel_values` that a function makes of an image file."""
        return StreamedRows(self.blocks, self.labels, self.image_column, transform)

    @property
    def fingerprint(self) -> str:
        """A hash of labels and sizes of the blocks, in any order of these; the images themselves are not read."""
        parts = _divide_by_blocks(self.labels, self.blocks)
        return cache_key(sorted(hashlib.sha256(part.tobytes()).hexdigest() for part in parts))


def open_stream(
    name: str,
    config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    split_seed: int = 1,
    validation_fraction: float | None = None,
) -> Stream:
    """Open a dataset of Parquet files or WebDataset archives.

    All labels are read, and no image but those of the sample and the other splits.

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
    sources, features, (image_column, label_column) = read_sources(
        name, config, image_column, label_column, group_column
    )
    values = labels_of_splits({split: source.values for split, source in sources.items()}, label_column)
    blocks = {split: sources[split].blocks for split in values}
    _check_splits(blocks, name, group_column)
    index_of = index_of_labels(features[label_column], set().union(*values.values()), label_column)
    labels, train = np.array([index_of[value] for value in values["train"]]), blocks["train"]
    _check_order(labels, name)
    per_block = _divide_by_blocks(labels, train)
    order = np.random.default_rng(split_seed).permutation(len(train))
    if "validation" not in blocks:
        share = min(VALIDATION, MAX_VALIDATION / len(labels)) if validation_fraction is None else validation_fraction
        check_fraction("validation", share)
        apart = _set_apart(per_block, order, share * len(labels))
        blocks["validation"], order = [train[number] for number in apart], order[~np.isin(order, apart)]
        if not apart or not len(order):
            raise UserError(f"{name} has too few row groups to set some apart for validation. {remedy(name)}")
    blocks["train"] = [train[number] for number in _draw_sample(per_block, order)]
    columns = [image_column, label_column, *([group_column] if group_column in features else [])]
    with explain_loading(name):
        splits = _store(blocks, Features({column: features[column] for column in columns}))
    check_holds_images(splits, name)
    kept = np.sort(order)
    labels = np.concatenate([per_block[number] for number in kept])
    images = plural(len(labels), "training image")
    say("stream", f"{images}, read in blocks; below, train is a sample of them")
    return Stream([train[number] for number in kept], labels, image_column, splits)


def _divide_by_blocks(labels: np.ndarray, blocks: Sequence[Block]) -> list[np.ndarray]:
    """Return the labels of each block."""
    return np.split(labels, np.cumsum([block.rows for block in blocks])[:-1])


def _check_splits(blocks: dict[str, list[Block]], name: str, group_column: str | None) -> None:
    """Let validation take the place of test where that is missing.

    Raises:
        UserError: there is neither, or nothing to train on; or images of a group would be torn apart.
    """
    if not blocks["train"]:
        raise UserError(f"{name} has no training images: add files of the split train")
    if len(blocks) == 1:
        raise UserError(f"--streaming needs a test split, which {name} lacks. {remedy(name)}")
    if "test" not in blocks:
        blocks["test"] = blocks.pop("validation")
        say("test", "the data has no test split: that of validation takes its place")
    if "validation" not in blocks and group_column:
        raise UserError(f"--group_column needs a validation split, which {name} lacks. {remedy(name)}")


def _check_order(labels: np.ndarray, name: str) -> None:
    """Raise UserError where neighbours are of one class much more often than by chance: blocks would be of one class.

    Args:
        labels: in the order of the files.
        name: of the dataset.
    """
    by_chance = float(np.square(np.bincount(labels) / len(labels)).sum())
    if (labels[1:] == labels[:-1]).mean() > (1 + by_chance) / 2:
        raise UserError(f"the images of {name} are ordered by class, which a stream does not mix. {remedy(name)}")


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
    """Return the first blocks of an order that have `SAMPLE` rows together, and later ones that have rare classes.

    Every class has `OF_CLASS` rows if there are so many: one of them may be an image that cannot be read.
    """
    counts = np.zeros(1 + max(int(labels.max()) for labels in per_block), dtype=int)
    drawn, rows = [], 0
    for number in order:
        if rows < SAMPLE or (counts[per_block[number]] < OF_CLASS).any():
            rows += len(per_block[number])
            drawn.append(int(number))
            counts += np.bincount(per_block[number], minlength=len(counts))
    return drawn


def _store(blocks: Mapping[str, list[Block]], features: Features) -> DatasetDict:
    """Return the rows of all blocks as datasets on the disk, which are kept for the next run."""
    return DatasetDict(
        {
            split: dataset_of(_rows_of, features, {"blocks": tuple(of_split), "columns": tuple(features)})
            for split, of_split in blocks.items()
        }
    )


def _rows_of(blocks: Sequence[Block], columns: Sequence[str]) -> Iterator[dict]:
    for block in blocks:
        yield from block.read(list(columns)).to_pylist()
