"""Loading: rows that are augmented alike in any process, and data workers where they pay, deaf to others' signals."""

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from luthier.images.shards import StreamedRows
from luthier.training.block_batches import BlockBatches
from luthier.training.signals import HANGUP

# What a loader of a stream has in common with the Trainer's own.
KEPT = (
    "num_workers", "collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor",
    "persistent_workers",
)  # fmt: skip
BATCHES = 4  # for each worker of an evaluation; with fewer, threads of this process are done before workers have begun


class SeededAugmentation(Dataset):
    """Training rows whose augmentation follows from seed, epoch and row alone.

    After a resume the library restores the random state only when the first batch has been made, and data workers have
    random states of their own. Here nothing depends on either, nor on how often a run was interrupted.
    """

    def __init__(self, rows: Sequence, seed: int, workers: int):
        self.rows, self.seed, self.epoch = rows, seed, torch.zeros((), dtype=torch.int64)
        if workers:  # which may outlive an epoch
            self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        key = f"{self.seed} {int(self.epoch)} {row}".encode()
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        try:
            return self.rows[row]
        finally:
            torch.set_rng_state(state)

    def set_epoch(self, epoch: int) -> None:
        """Change the augmentation to that of an epoch, in data workers too."""
        self.epoch.fill_(epoch)


class WorkerTrainer(Trainer):
    """The Trainer whose data workers ignore signals; a short evaluation has none, and a stream has `BlockBatches`.

    It overrides a private method, read in transformers 5.23. At an upgrade, check: do all loaders come from
    `_get_dataloader`, and does accelerate's wrapper still keep the loader as `base_dataloader`?
    """

    def _get_dataloader(self, dataset, description, batch_size, *arguments, **options) -> DataLoader:
        loader = super()._get_dataloader(dataset, description, batch_size, *arguments, **options)
        inner = getattr(loader, "base_dataloader", loader)  # which accelerate has wrapped
        if not options.get("is_training") and len(loader) < BATCHES * inner.num_workers:
            inner.num_workers = 0
        if inner.num_workers and inner.multiprocessing_context is None:
            inner.multiprocessing_context = "fork"  # Python 3.14 would pickle the rows, which hold functions
        inner.worker_init_fn = StartWorker(inner.worker_init_fn)
        if isinstance(dataset, SeededAugmentation) and isinstance(dataset.rows, StreamedRows):
            rank, processes = self.args.process_index, self.args.world_size
            batches = BlockBatches(dataset.rows.sizes, batch_size, dataset.seed, dataset.epoch, rank, processes)
            # Not prepared by accelerate: these batches are this process's own.
            return DataLoader(dataset, batch_sampler=batches, **{name: getattr(inner, name) for name in KEPT})
        return loader


class StartWorker:
    """Lets a data worker ignore signals: it ends when the main process says so, or is gone.

    `timeout`, systemd, Slurm, Ctrl-C and a terminal that is closed send a signal to all processes of a run. The main
    process answers with a checkpoint at the end of the step, and for the step it needs its workers.

    Args:
        then: what else is to be done at the start, with the number of the worker.
    """

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, number: int) -> None:
        for each in filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)):
            signal.signal(each, signal.SIG_IGN)
        if self.then:
            self.then(number)


@atexit.register
def _kill_workers() -> None:
    """End the workers that are left at the end; Python itself would send them SIGTERM, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:  # as data workers are; Python waits for others
            process.kill()
