"""What a run prints: its few lines, the epoch table, the seconds."""

import time

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainingArguments


def say(training_args: TrainingArguments, what: str, line: str) -> None:
    """Print one of the run's few lines, once, whatever the number of processes."""
    if training_args.process_index == 0:
        print(f"{what:<9}{line}", flush=True)


class ProgressBar(ProgressCallback):
    """The Trainer's progress bars without its log, which `EpochTable` prints."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class EpochTable(TrainerCallback):
    """Prints a row for each evaluation, where the Trainer prints its log as a dict.

    It also measures the training accuracy, on the augmented views and while the weights change, and adds it to the
    Trainer's log history as `train_accuracy`.
    """

    HEADER = (
        "         ------ train ------   --------- validation ---------\n"
        "epoch        loss   accuracy        loss   accuracy   macro F1   seconds"
    )

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.hits, self.seen = 0, 0
        self.train = {}
        self.epoch_start = time.perf_counter()
        self.hook = model.register_forward_hook(self._count, with_kwargs=True)
        if state.is_world_process_zero:
            tqdm.write(self.HEADER)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.train = {"loss": logs["loss"]}
            if self.seen:
                self.train["accuracy"] = state.log_history[-1]["train_accuracy"] = float(self.hits) / self.seen
            self.hits, self.seen = 0, 0
        if "eval_loss" in logs and state.is_world_process_zero:
            now = time.perf_counter()
            tqdm.write(
                f"{state.epoch:5.4g}  {self.train.get('loss', float('nan')):10.3f}"
                f"  {self.train.get('accuracy', float('nan')):9.1%}  {logs['eval_loss']:10.3f}"
                f"  {logs['eval_accuracy']:9.1%}  {logs['eval_macro_f1']:9.3f}  {now - self.epoch_start:8.1f}"
            )
            self.epoch_start = now

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()

    def _count(self, module, args, kwargs, output):
        labels = kwargs.get("labels")
        if module.training and labels is not None:
            # Summed on the device and read once an epoch: reading it here would make a GPU wait at every step.
            self.hits = self.hits + (output.logits.detach().argmax(dim=-1) == labels).sum()
            self.seen += labels.numel()


class Stopwatch(TrainerCallback):
    """Seconds by stage, each counted from the end of the one before; as a callback it splits the training loop.

    On a GPU the host runs ahead of the device: "data" is what the device waited for at most, and "train" holds the
    rest of the loop.
    """

    def __init__(self, start: float):
        self.seconds = {}
        self.last = start
        self.stop("start")

    def stop(self, stage: str) -> None:
        """End a stage, or one more part of it."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self.last, 3)
        self.last = now

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop("train")

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop("data")

    def on_step_end(self, args, state, control, **kwargs):
        self.stop("train")

    def on_evaluate(self, args, state, control, **kwargs):
        self.stop("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.stop("save")


def percent_with_interval(scored: dict) -> str:
    """Say an accuracy, its interval and n in words: `71.8% (95% interval 65.3% to 77.4%, n = 209)`."""
    low, high = scored["accuracy_ci95"]
    return f"{scored['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, n = {scored['n']})"
