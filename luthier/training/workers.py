"""Data workers: none where few batches would not repay their start, and deaf to signals that are not for them."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable

from torch.utils.data import DataLoader
from transformers import Trainer

BATCHES = 4  # for each worker of an evaluation; with fewer, threads of this process are done before workers have begun


class WorkerTrainer(Trainer):
    """The Trainer with these data workers.

    It overrides a private method, read in transformers 5.23. At an upgrade, check: do all loaders come from
    `_get_dataloader`, and does accelerate's wrapper still keep the loader as `base_dataloader`?
    """

    def _get_dataloader(self, *arguments, **options) -> DataLoader:
        loader = super()._get_dataloader(*arguments, **options)
        inner = getattr(loader, "base_dataloader", loader)  # which accelerate has wrapped
        if not options.get("is_training") and len(loader) < BATCHES * inner.num_workers:
            inner.num_workers = 0
        inner.worker_init_fn = StartWorker(inner.worker_init_fn)
        return loader


class StartWorker:
    """Lets a data worker ignore signals: it ends when the main process says so, or is gone.

    `timeout`, systemd, Slurm and Ctrl-C send a signal to all processes of a run. The main process answers with a
    checkpoint at the end of the step, and for the step it needs its workers.

    Args:
        then: what else is to be done at the start, with the number of the worker.
    """

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, number: int) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        if self.then:
            self.then(number)


@atexit.register
def _kill_workers() -> None:
    """End the workers that are left at the end; Python itself would send them SIGTERM, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:  # as data workers are; Python waits for others
            process.kill()
