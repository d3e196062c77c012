"""SIGTERM, Ctrl-C and a closed terminal: a checkpoint at the end of the step, and out."""

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed
from transformers import TrainerCallback

from luthier.terminal import is_first_process, quote, say
from luthier.training.checkpoints import newest
from luthier.training.heats import ends_epoch

HANGUP = getattr(signal, "SIGHUP", None)  # the terminal is closed; Windows has no such signal
PATIENCE = 6  # seconds that an evaluation may go on after a signal


class StoppedInEvaluation(Exception):
    """A signal came in an evaluation that takes too long to wait for."""


class Stop(TrainerCallback):
    """Turns a signal into a checkpoint at the end of the step; where nothing is trained, ends the process at once.

    Attributes:
        run_dir: the directory that a stopped run is resumed with: that of the run, not of its fold.
        received: the signal that this process has received, None before it.
        stopping: all processes stop after this step.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.received: int | None = None
        self.training, self.stopping, self.exits, self.since = False, False, False, 0.0
        self.group: Any = None  # of the hosts, to agree in; None where there is one process
        self.handlers: dict[int, object] = {}  # that were there before

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # `nohup` has it ignored
                numbers.append(HANGUP)
            self.handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _leave_terminal()
        # A second Ctrl-C is meant. A SIGTERM after one comes from the launcher, which ends before its process.
        again = self.received is not None and number == signal.SIGINT and time.monotonic() - self.since > 1
        if not self.training or again:
            if not self.exits:  # the launcher may send a second one
                begun = any(self.run_dir.rglob("checkpoint-*/trainer_state.json"))
                how = f"; {self.how_to_resume()}" if begun else ""
                _write(f"stopped  by {signal.Signals(number).name}{how}")
            self.exits = True
            sys.exit(128 + number)
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if is_first_process():
                _write("stopping after this step: wait for the checkpoint")

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True
        if args.world_size > 1 and self.group is None:
            # Between the hosts: a signal must not make a device wait at every step.
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def on_step_end(self, args, state, control, **kwargs):
        if self.agree():
            self.stopping = control.should_training_stop = True
            # After the last step of an epoch comes its evaluation, and then its checkpoint. An evaluation that comes
            # now, as with `--eval_strategy steps`, stays too: a run that is resumed from here would not make it.
            control.should_save = not ends_epoch(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping and ends_epoch(state):
            control.should_save = True  # whatever the strategy: `on_step_end` has left it to this
        elif self.stopping:
            control.should_save = control.should_evaluate = control.should_log = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training:
            late = self.received is not None and time.monotonic() - self.since > PATIENCE
            if self._highest(int(late)):
                raise StoppedInEvaluation

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        """Count the training as over when the block ends, however it ends; `on_train_begin` counts it as begun."""
        try:
            yield
        finally:
            self.training = False

    def agree(self) -> int:
        """Return the signal that any process has received, or 0: all must do the same.

        Nothing else may decide it: a signal may come to one process while they agree, and counts at the next time.
        """
        return self._highest(self.received or 0)

    def exit_with(self, received: int, checkpoints: Path) -> NoReturn:
        """Say how to resume a run that was stopped, and exit as a shell expects of a process that a signal ended.

        Args:
            received: the signal.
            checkpoints: the folder of the checkpoints that were being written.
        """
        last = newest(checkpoints)
        how = f"{last}; {self.how_to_resume()}" if last else "there is no checkpoint yet"
        say("stopped", f"by {signal.Signals(received).name}: {how}")
        sys.exit(128 + received)

    def how_to_resume(self) -> str:
        """Return the options that go on with the run."""
        return f"resume with --output_dir {quote(str(self.run_dir))} --resume_from_checkpoint auto"

    def _highest(self, number: int) -> int:
        """Return the highest number of all processes."""
        if self.group is None:
            return number
        shared = torch.tensor(number)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(shared)


def _leave_terminal() -> None:
    """Print nowhere from here on: a terminal that is gone would raise an error at each line."""
    with Path(os.devnull).open("w") as nowhere:
        for number in (1, 2):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere.fileno(), number)


def _write(line: str) -> None:
    """Write a line to stderr from a signal handler: not by `print`, which may have been interrupted itself."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
