"""What a person looks at: the epoch table in the terminal, the figures, the model card."""

import html
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback


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


def percent_with_interval(scored: dict) -> str:
    """Say an accuracy, its interval and n in words: `71.8% (95% interval 65.3% to 77.4%, n = 209)`."""
    low, high = scored["accuracy_ci95"]
    return f"{scored['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, n = {scored['n']})"


def plot_confusion_matrix(scored: dict, labels: list[str], path: Path) -> None:
    """Draw the confusion matrix [C, C] of `metrics.score` as a PNG: colour by the share of the true class, counts."""
    matrix = np.array(scored["confusion_matrix"])
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.0, 0.45 * len(labels)), 24.0)
    with _style():
        figure = Figure(figsize=(side + 1.5, side + 0.5), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, format=PercentFormatter(1), shrink=0.8, label="share of the true class")
        size = float(np.clip(72 * side / len(labels) / 4, 3, 10))
        short = [name if len(name) <= 24 else f"{name[:23]}…" for name in labels]
        # Names are data: a dollar sign in one must not start a formula.
        axes.set_xticks(
            range(len(labels)), short, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False
        )
        axes.set_yticks(range(len(labels)), short, fontsize=size, parse_math=False)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(f"Test accuracy {percent_with_interval(scored)}", fontsize=10, loc="left")
        if len(labels) <= 40:
            for row, column in zip(*matrix.nonzero(), strict=True):
                colour = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=size)
        figure.savefig(path, dpi=120)


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Draw loss and accuracy by epoch, of training and validation, from the Trainer's log history."""
    train = [entry for entry in log_history if "loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    with _style():
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        _plot_pair(loss, train, "loss", validation, "eval_loss")
        _plot_pair(accuracy, train, "train_accuracy", validation, "eval_accuracy")
        loss.set(xlabel="epoch", ylabel="loss")
        accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        accuracy.legend(loc="lower right")
        figure.savefig(path, dpi=120)


def _plot_pair(axes: Axes, train: list[dict], train_key: str, validation: list[dict], validation_key: str) -> None:
    # Blue and orange of the Okabe-Ito palette, and two markers: told apart without colour as well.
    for entries, key, name, colour, marker in (
        (train, train_key, "train (augmented)", "#0072B2", "o"),
        (validation, validation_key, "validation", "#D55E00", "s"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in entries if key in entry]
        axes.plot([epoch for epoch, _ in points], [y for _, y in points], color=colour, marker=marker, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _style():
    return matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def write_model_card(path: Path, metrics: dict, custom_code: bool) -> None:
    """Write the model card `README.md`: what the model is, what it scored, on which data, by which recipe.

    Args:
        metrics: what `metrics.json` holds.
        custom_code: the model needs the `models.py` beside it.
    """
    test, data = metrics["test"], metrics["data"]
    name = path.parent.resolve().name
    results = [
        EvalResult("image-classification", data["name"], data["name"], kind, value, dataset_split="test")
        for kind, value in (("accuracy", test["accuracy"]), ("f1", test["macro_f1"]))
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "luthier"],
        metrics=["accuracy", "f1"],
        model_name=name,
        eval_results=results,
    )
    per_class = "\n".join(
        f"| {_escape(label)} | {row['precision']:.1%} | {row['recall']:.1%} | {row['f1']:.3f} | {row['support']} |"
        for label, row in test["per_class"].items()
    )
    settings = "\n".join(f"| {key} | {_escape(value)} |" for key, value in metrics["recipe"].items())
    majority, probe = metrics["baselines"]["majority"], metrics["baselines"].get("linear_probe")
    beside = f"A logistic regression on the frozen features scores {probe['test']['accuracy']:.1%}.\n" if probe else ""
    curves = "\n![Loss and accuracy by epoch](curves.png)\n" if (path.parent / "curves.png").exists() else ""
    path.write_text(
        f"""---
{metadata.to_yaml()}
---

# {_escape(name)}

An image classifier of {len(data["labels"])} classes, fine-tuned on {_escape(data["name"])} with Luthier.

```python
from transformers import pipeline

classify = pipeline("image-classification", "THIS_FOLDER_OR_REPOSITORY"{", trust_remote_code=True" * custom_code})
classify("picture.jpg")
```

## Score

Test accuracy **{percent_with_interval(test)}**, macro F1 {test["macro_f1"]:.3f}. Chosen on validation
(accuracy {percent_with_interval(metrics["validation"])}); test was looked at once, at the end.
{beside}Always answering {_escape(majority["label"])}, the commonest class, would score {majority["accuracy"]:.1%}.

| class | precision | recall | F1 | test pictures |
|---|---|---|---|---|
{per_class}

![Confusion matrix](confusion_matrix.png)
{curves}

## Data

{_escape(data["name"])}: {", ".join(f"{split} {count['n']:,}" for split, count in data["splits"].items())} pictures.
SHA-256 over the files, their classes and splits: `{data["fingerprint"]}`.

{data["attribution"]}

## Recipe

| | |
|---|---|
{settings}
| versions | {_escape(", ".join(f"{name} {version}" for name, version in metrics["versions"].items()))} |

The command, indented so that nothing in it is markup:

    {" ".join(metrics["command"].split())}
""",
        encoding="utf-8",
    )


def _escape(text: object) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{character}" if character in r"\`*_[]|~#" else character for character in escaped)


def write_metrics(path: Path, metrics: dict) -> None:
    """Write `metrics.json`."""
    path.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
