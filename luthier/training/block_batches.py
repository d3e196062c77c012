"""Batches of rows that lie together in blocks: in random order, with few blocks in use at a time."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from luthier.images.shards import LANES, WINDOW


class BlockBatches(Sampler[list[int]]):
    """The batches of one process: every row is in one batch of one process in an epoch.

    The blocks of an epoch come in random order, and form one long line of rows. Every process takes an equal part of
    it, which it divides into `LANES` lanes. In a lane rows are in random order within each `WINDOW` of them. Batches
    come from the lanes in turns: data workers take batches in turns too, so that up to `LANES` of them read different
    blocks. All processes have equally many batches, whose sizes differ by one at most; a process that has fewer rows
    than batches also takes the first row of the line, which another process has too.

    So all follows from seed and epoch: a run that is resumed skips the batches that it has had.

    Args:
        sizes: rows of each block.
        batch_size: images in a batch, at most.
        seed: of the training.
        epoch: of the next iteration, int64; its owner changes it in place.
        rank, processes: which process this is, and how many there are.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, seed: int, epoch: torch.Tensor, rank: int, processes: int
    ):
        self.sizes, self.batch_size, self.rank, self.processes = sizes, batch_size, rank, processes
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return math.ceil(sum(self.sizes) / (self.processes * self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        ends, generator = np.cumsum(self.sizes), np.random.default_rng([self.seed, int(self.epoch)])
        line = np.concatenate(
            [np.arange(ends[block] - self.sizes[block], ends[block]) for block in generator.permutation(len(ends))]
        )
        rows, count = np.array_split(line, self.processes)[self.rank], len(self)
        rows = np.append(rows, line[: max(0, count - len(rows))])
        batches = np.array([len(part) for part in np.array_split(rows, count)])  # their sizes
        lanes = np.split(rows, np.cumsum([batches[lane::LANES].sum() for lane in range(LANES)])[:-1])
        windows = [iter(np.array_split(lane, max(1, math.ceil(len(lane) / WINDOW)))) for lane in lanes]
        ready = [np.empty(0, int) for _ in lanes]
        for number, size in enumerate(batches):
            lane = number % LANES
            while len(ready[lane]) < size:
                ready[lane] = np.concatenate([ready[lane], generator.permutation(next(windows[lane]))])
            yield ready[lane][:size].tolist()
            ready[lane] = ready[lane][size:]
