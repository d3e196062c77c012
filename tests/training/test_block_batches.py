"""The order of streamed rows: each once in an epoch, mixed, with few blocks at a time, and the same after a skip."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import SkipBatchSampler

from luthier.training import block_batches
from luthier.training.block_batches import BlockBatches

SIZES = (5, 3, 7, 4, 1, 6) * 20  # 520 rows


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    monkeypatch.setattr(block_batches, "WINDOW", 10)


def batches(epoch: int = 0, rank: int = 0, processes: int = 1, batch: int = 8, seed: int = 1, sizes=SIZES) -> list:
    return list(BlockBatches(sizes, batch, seed, torch.tensor(epoch), rank, processes))


@pytest.mark.parametrize(("processes", "batch"), [(1, 8), (2, 8), (3, 8), (7, 3), (2, 520), (4, 1)])
def test_every_row_is_in_one_batch_of_one_process(processes, batch):
    parts = [batches(2, rank, processes, batch) for rank in range(processes)]
    assert sorted(row for part in parts for rows in part for row in rows) == list(range(sum(SIZES)))
    assert len({len(part) for part in parts}) == 1  # or a process would wait for ever for the others
    expected = len(BlockBatches(SIZES, batch, 1, torch.tensor(0), 0, processes))
    assert len(parts[0]) == expected == -(-sum(SIZES) // (processes * batch))
    sizes = [len(rows) for part in parts for rows in part]
    assert max(sizes) <= batch and max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize(("images", "processes", "batch"), [(5, 2, 1), (3, 4, 1), (1, 3, 8), (3, 1, 1)])
def test_no_process_has_an_empty_batch(images, processes, batch):
    """A process with fewer rows than batches takes one twice."""
    parts = [batches(0, rank, processes, batch, sizes=(images,)) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1 and all(rows for part in parts for rows in part)
    assert {row for part in parts for rows in part for row in rows} == set(range(images))


def test_order_follows_from_seed_and_epoch():
    epoch = torch.tensor(0)
    sampler = BlockBatches(SIZES, 8, 1, epoch, 0, 1)
    first = list(sampler)
    assert list(sampler) == first == batches()
    epoch.fill_(1)
    assert list(sampler) == batches(1) != first
    assert batches(seed=2) != first


def test_resumed_epoch_has_the_batches_that_are_left():
    whole = batches(3, 1, 2)
    skipped = SkipBatchSampler(BlockBatches(SIZES, 8, 1, torch.tensor(3), 1, 2), skip_batches=11)
    assert list(skipped) == whole[11:]


def test_neighbours_in_a_block_are_apart():
    """A batch has rows of several blocks, in random order."""
    ordered = batches(sizes=(5,) * 100, batch=8)
    assert np.mean([len({row // 5 for row in rows}) for rows in ordered]) > 2
    steps = np.concatenate([np.diff(rows) for rows in ordered])
    assert (steps == 1).mean() < 0.2
