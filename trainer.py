"""The Trainer, where the library's own loses runs: resume, checkpoints, signals, broken losses, memory."""

import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
from datasets import Dataset, DatasetDict
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from checkpoints import PARTIAL, check_space, newest, seal, thin_out
from data import collate
from metrics import build_compute_metrics
from models import parameter_groups
from recipe import Recipe
from terminal import EpochTable, ProgressBar, say

PATIENCE = 6  # seconds from a signal on that an evaluation may go on


class SafeTrainer(Trainer):
    """The Trainer whose checkpoints are whole, and which stops where nothing can be learned any more."""

    writing_to: str | None = None
    postponed = False
    broken_at: torch.Tensor | None = None  # step of the first loss or gradient that was not finite, or -1

    def _get_output_dir(self, trial) -> str:
        return self.writing_to or super()._get_output_dir(trial)

    def _maybe_log_save_evaluate(self, *arguments, **options) -> None:
        # A checkpoint of an epoch's last step waits for the epoch's evaluation, which a resume from it would not make.
        last_step = self.args.eval_strategy == "epoch" and float(self.state.epoch).is_integer()
        if self.control.should_evaluate:
            self.control.should_save |= self.postponed
            self.postponed = False
        elif last_step and self.control.should_save:
            self.control.should_save, self.postponed = False, True
        super()._maybe_log_save_evaluate(*arguments, **options)

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint aside, hash it, bring it to the disk, and only then give it its name."""
        self.stop_if_not_finite()
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        self.writing_to = str(output_dir / PARTIAL)
        written, name = output_dir / PARTIAL / f"checkpoint-{step}", output_dir / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                best = self.state.best_global_step
                # The library looks for it where this one is being written.
                self.state.best_model_checkpoint = str(output_dir / f"checkpoint-{best}") if best else None
                self.state.save_to_json(str(written / "trainer_state.json"))
                seal(written, name)
                thin_out(output_dir, self.args.save_total_limit, best)
        except Exception as error:  # safetensors and torch have errors of their own for a full disk
            full = "No space left" in str(error) or shutil.disk_usage(output_dir).free < self.checkpoint_size()
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
            if not full:
                raise
            last = newest(output_dir)
            rest = f"{last} is whole: free some space, and go on with" if last else "free some space, and start with"
            raise OSError(
                f"the disk is full: no checkpoint of step {step} in {output_dir}. {rest} --resume_from_checkpoint auto"
            ) from error
        finally:
            self.writing_to = None
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:  # on every machine, each of which may have a disk of its own
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)

    def checkpoint_size(self) -> int:
        """Return about how many bytes a checkpoint takes: weights, and two moments of what is trained."""
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return weights + (0 if self.args.save_only_model else 2 * trained)

    def training_step(self, *arguments, **options) -> torch.Tensor:
        """Do a step, and see that its loss is finite."""
        loss = super().training_step(*arguments, **options)
        self._watch(loss)
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if self.accelerator.scaler is None:  # which skips such steps by itself
            self._watch(norm)
        return norm

    def _watch(self, value: torch.Tensor | float) -> None:
        value = torch.as_tensor(value, device=self.args.device).detach()
        if self.broken_at is None:
            self.broken_at = torch.full((), -1, device=self.args.device)
        broken = (self.broken_at < 0) & ~torch.isfinite(value).all()
        self.broken_at = torch.where(broken, self.state.global_step + 1, self.broken_at)
        if self.args.device.type == "cpu":  # elsewhere reading it would make the device wait at every step
            self.stop_if_not_finite()

    def log(self, *arguments, **options) -> None:
        """Log, unless what was learned since the last time is worth nothing."""
        self.stop_if_not_finite()
        super().log(*arguments, **options)

    def stop_if_not_finite(self) -> None:
        """Raise ValueError if a loss or a gradient was not finite."""
        step = -1 if self.broken_at is None else int(self.broken_at)
        if step >= 0:
            self.broken_at = None
            last = newest(Path(self.args.output_dir))
            kept = f" {last} is from before and whole." if last else ""
            raise ValueError(
                f"the loss or its gradient is not a finite number at step {step}. Likely causes: a learning rate "
                f"that is too high (it is {self.args.learning_rate:g}: try a tenth), half precision (--bf16 False, "
                f"--fp16 False), or damaged weights.{kept}"
            )


class Repeatable(torch.utils.data.Dataset, TrainerCallback):
    """Training pictures whose augmentation follows from seed, epoch and row alone.

    The library brings back the generators' states after a resume, but only when the first batch has been made, and
    data workers have generators of their own. Here nothing depends on either, nor on how often a run was interrupted.
    """

    def __init__(self, dataset: Dataset, seed: int, workers: int):
        self.dataset, self.seed, self.epoch = dataset, seed, torch.zeros((), dtype=torch.int64)
        if workers:  # which may outlive an epoch
            self.epoch.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        key = f"{self.seed} {int(self.epoch)} {row}".encode()
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big"))
        try:
            return self.dataset[row]
        finally:
            torch.set_rng_state(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch.fill_(int(state.epoch or 0))


class Stop(TrainerCallback):
    """SIGTERM and Ctrl-C: a checkpoint at the end of the step, and out; where nothing is trained, out at once.

    Attributes:
        received: the signal, None before it.
    """

    def __init__(self):
        self.received, self.training, self.since, self.group = None, False, 0.0, None
        self.before = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        # A second Ctrl-C is meant; a SIGTERM after one comes of the launcher, which has gone before its process.
        again = self.received is not None and number == signal.SIGINT and time.monotonic() - self.since > 1
        if not self.training or again:
            print(f"stopped  by {signal.Signals(number).name}", file=sys.stderr, flush=True)
            sys.exit(128 + number)
        if self.received is None:
            self.received, self.since = number, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True
        if args.world_size > 1:  # of the hosts: a signal must not make a device wait at every step
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        if self._agreed():
            control.should_training_stop = True
            # After the last step of an epoch comes its evaluation, and then its checkpoint, as always.
            control.should_save = not float(state.epoch).is_integer()
            control.should_evaluate = control.should_log = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received and not float(state.epoch).is_integer():
            control.should_save = control.should_evaluate = control.should_log = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training and self.received and time.monotonic() - self.since > PATIENCE:
            raise StoppedInEvaluation

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _agreed(self) -> bool:
        """Whether any process has got a signal: all must stop after the same step."""
        if self.group is not None:
            number = torch.tensor(self.received or 0)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
            if number and self.received is None:
                self.received, self.since = int(number), time.monotonic()
        return self.received is not None


class StoppedInEvaluation(Exception):
    """A signal came in an evaluation that takes too long to be waited for."""


def die_with_launcher() -> None:
    """Get SIGTERM when `accelerate launch` dies: it passes none on to its process, which would go on alone."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def build_trainer(
    model: PreTrainedModel, recipe: Recipe, training_args: TrainingArguments, splits: DatasetDict, labels: list[str]
) -> SafeTrainer:
    """Return the Trainer of a run, with the learning rates of the recipe's layers.

    Raises:
        ValueError: a tracker or an optimizer is not installed, or the checkpoints will not fit on the disk.
    """
    rate = training_args.learning_rate
    train_dataset = Repeatable(splits["train"], training_args.seed, training_args.dataloader_num_workers)
    groups = parameter_groups(model, rate, rate * recipe.backbone, recipe.layer_decay, training_args.weight_decay)
    optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    try:
        trainer = SafeTrainer(
            model=model,
            args=training_args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=splits["validation"],
            compute_metrics=build_compute_metrics(labels),
            optimizer_cls_and_kwargs=(optimizer_class, {**optimizer_kwargs, "params": groups}),
        )
    except (ImportError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if training_args.save_strategy != "no" and trainer.is_world_process_zero():
        limit = training_args.save_total_limit or round(training_args.num_train_epochs)
        check_space(Path(training_args.output_dir), trainer.checkpoint_size(), limit)
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(train_dataset)
    trainer.add_callback(EpochTable)
    if not training_args.disable_tqdm:
        trainer.add_callback(ProgressBar)
    return trainer


@contextmanager
def memory_advice(training_args: TrainingArguments) -> Iterator[None]:
    """Turn the errors of exhausted memory into advice.

    Raises:
        ValueError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = ("out of memory", "can't allocate memory", "not enough memory", "No executable batch size found")
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        batch = training_args.per_device_train_batch_size
        raise ValueError(
            f"not enough memory for batches of {batch}: take smaller ones and as many as before in a step "
            f"(--per_device_train_batch_size {max(1, batch // 2)} --gradient_accumulation_steps "
            f"{2 * training_args.gradient_accumulation_steps}), let --auto_find_batch_size try, or take fewer pixels "
            "(--image_size)"
        ) from error


def say_stopped(training_args: TrainingArguments, received: int) -> None:
    """Say where a run that was stopped goes on, and exit as a shell expects of a process that a signal ended."""
    last = newest(Path(training_args.output_dir))
    where = f"{last}; go on with --output_dir {training_args.output_dir} --resume_from_checkpoint auto"
    say(
        training_args,
        "stopped",
        f"by {signal.Signals(received).name}: {where if last else 'there is no checkpoint yet'}",
    )
    sys.exit(128 + received)
