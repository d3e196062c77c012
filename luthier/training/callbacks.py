"""Trainer callbacks: what a run prints while it trains, its seconds by stage, and the epoch of the augmentation."""

import time
from collections.abc import Callable

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments

from luthier.terminal import Stopwatch, Tenths, ignore_closed, percent

QUIET_SECONDS = 10  # of an evaluation before its progress is said line by line


class ProgressBar(ProgressCallback):
    """The Trainer's progress bars, with names and gone at their end, without its log, which `EpochTable` prints."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        _name(self.training_bar, "train")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        _name(self.prediction_bar, "predict")

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def _name(bar: tqdm | None, name: str) -> None:
    """Give a bar of the library its name; it is cleared when it ends, which may be before it is full."""
    if bar is not None and not bar.desc:
        bar.leave = False
        bar.set_description(name)


class ProgressLines(TrainerCallback):
    """A line at each tenth of the training, and of evaluations that take long, for where there is no terminal."""

    def __init__(self):
        self.evaluation: Tenths | None = None
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = Tenths("train", state.max_steps, "steps")

    def on_step_end(self, args, state, control, **kwargs):
        self.training.reach(state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.evaluation is None:
            self.evaluation, self.steps = Tenths("evaluate", len(eval_dataloader), "batches", QUIET_SECONDS), 0
        self.steps += 1
        self.evaluation.reach(self.steps)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluation = None

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.evaluation = None


class EpochTable(TrainerCallback):
    """Prints a row for each evaluation, where the Trainer prints its log as a dict.

    It also measures the training accuracy, on the augmented views and while the weights change, and adds it to the
    Trainer's log history as `train_accuracy`.

    Args:
        recipe: name in the rows.
    """

    HEADER = (
        "       ----- train -----   ------- validation --------\n"
        "epoch    loss   accuracy     loss  accuracy   macro F1  seconds  recipe"
    )

    def __init__(self, recipe: str):
        self.recipe = recipe
        self.correct: torch.Tensor | int = 0
        self.seen = 0

    @classmethod
    def write_header(cls, args: TrainingArguments) -> None:
        """Print the names of the columns, where rows will follow."""
        if args.process_index == 0 and args.eval_strategy != "no":
            with ignore_closed("stdout"):
                tqdm.write(cls.HEADER)

    def on_train_begin(self, args, state, control, **kwargs):
        self.correct, self.seen, self.train = 0, 0, dict[str, float]()
        self.epoch_start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.train = {"loss": logs["loss"]}
            counts = torch.tensor([int(self.correct), self.seen], device=args.device)
            correct, seen = reduce(counts, "sum").tolist()  # of all processes
            if seen:
                self.train["accuracy"] = state.log_history[-1]["train_accuracy"] = correct / seen
            self.correct, self.seen = 0, 0
        if "eval_loss" in logs and state.is_world_process_zero:
            now = time.perf_counter()
            row = (
                f"{state.epoch:5.4g}  {self.train.get('loss', float('nan')):6.3f}"
                f"  {percent(self.train.get('accuracy', float('nan'))):>9}  {logs['eval_loss']:7.3f}"
                f"  {percent(logs['eval_accuracy']):>8}  {logs['eval_macro_f1']:9.3f}  {now - self.epoch_start:7.1f}"
                f"  {self.recipe}"
            )
            with ignore_closed("stdout"):
                tqdm.write(row)
            self.epoch_start = now

    def count(self, adjusted: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the correct answers of a training step, from adjusted logits [N, C] and labels [N]."""
        # Summed on the device and read once an epoch: reading it here would make a GPU wait at every step.
        self.correct = self.correct + (adjusted.argmax(dim=-1) == labels).sum()
        self.seen += labels.numel()


class StageTimes(TrainerCallback):
    """Divides the seconds of the training loop among the stages data, train, evaluate and save.

    On a GPU the host runs ahead of the device: "data" is what the device waited for at most, and "train" holds the
    rest of the loop.
    """

    def __init__(self, stopwatch: Stopwatch):
        self.stopwatch = stopwatch

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopwatch.end("train")

    def on_step_begin(self, args, state, control, **kwargs):
        self.stopwatch.end("data")

    def on_step_end(self, args, state, control, **kwargs):
        self.stopwatch.end("train")

    def on_evaluate(self, args, state, control, **kwargs):
        self.stopwatch.end("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.stopwatch.end("save")


class SetEpoch(TrainerCallback):
    """Tells the training rows the epoch, from which their augmentation follows."""

    def __init__(self, set_epoch: Callable[[int], None]):
        self.set_epoch = set_epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.set_epoch(int(state.epoch or 0))
