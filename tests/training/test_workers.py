"""Data workers: as many as pay, and ended by the main process alone."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from luthier.processes import available_cores
from luthier.training.callbacks import SetEpoch
from luthier.training.workers import BATCHES, SeededAugmentation, StartWorker, WorkerTrainer

WORKERS = 2


class Rows(Dataset):
    """Rows that say which process made them."""

    def __init__(self, number: int):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> dict:
        return {"x": torch.tensor([float(row)]), "process": os.getpid()}


def build(tmp_path) -> WorkerTrainer:
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=1, dataloader_num_workers=WORKERS, use_cpu=True,
        remove_unused_columns=False, report_to="none",
    )  # fmt: skip
    return WorkerTrainer(torch.nn.Linear(1, 1), args)


def processes(loader) -> set[int]:
    return {int(process) for batch in loader for process in batch["process"]}


def test_short_evaluations_are_loaded_in_the_main_process(tmp_path):
    trainer = build(tmp_path)
    assert processes(trainer.get_test_dataloader(Rows(BATCHES * WORKERS - 1))) == {os.getpid()}
    many = processes(trainer.get_test_dataloader(Rows(BATCHES * WORKERS)))
    assert len(many) == WORKERS and os.getpid() not in many


def test_workers_outlive_signals_to_all_processes(tmp_path):
    batches = iter(build(tmp_path).get_test_dataloader(Rows(200)))
    first = int(next(batches)["process"])
    workers = [process.pid for process in multiprocessing.active_children()]
    assert first in workers
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
    time.sleep(0.2)
    assert len(list(batches)) == 199
    del batches  # ends them
    for _ in range(100):
        left = {process.pid for process in multiprocessing.active_children()} & set(workers)
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"workers are left: {left}")


class RandomRows(list):
    """Rows that are random numbers."""

    def __getitem__(self, row: int) -> float:
        return torch.rand(1).item()


def test_augmentation_differs_from_row_to_row_and_from_epoch_to_epoch():
    rows, seen = SeededAugmentation(RandomRows(range(4)), seed=1, workers=0), []
    callback = SetEpoch(rows.set_epoch)
    for epoch in (0.0, 1.0, 2.0):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
        seen += [rows[row] for row in range(4)]
    assert len(set(seen)) == 12
    assert rows[3] == seen[-1], "and in nothing else"


def test_augmentation_follows_from_the_seed_and_leaves_other_random_numbers_alone():
    rows, others = (SeededAugmentation(RandomRows(range(4)), seed, workers=0) for seed in (1, 2))
    state = torch.get_rng_state()
    assert rows[0] != others[0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("processes", "cores"), [(None, 16), ("4", 4), ("3", 5), ("32", 1)])
def test_processes_of_one_machine_share_its_cores(monkeypatch, processes, cores):
    monkeypatch.setattr("luthier.processes.count_cores", lambda: 16)
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert available_cores() == cores


def test_workers_are_forked_whatever_the_default_is(tmp_path):
    """Python 3.14 would start them afresh, with rows that are pickled."""
    before, rows = multiprocessing.get_start_method(), Rows(BATCHES * WORKERS)
    rows.transform = lambda: None  # which cannot be pickled
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert len(processes(build(tmp_path).get_test_dataloader(rows))) == WORKERS
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_ignore_a_terminal_that_is_closed():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        StartWorker(None)(0)
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
