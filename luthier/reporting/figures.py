"""The figures of a run, as PNG."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from luthier.escape import escape_terminal
from luthier.reporting.console import percent_with_interval
from luthier.terminal import percent, plural, shorten

DARK = 0.72  # share of a cell from which on white is easier to read on it than black
MAX_CELLS = 40  # classes whose confusion matrix has a number in each cell
LEGIBLE = 4.0  # points: where the names of classes would be smaller, the confusion matrix has none

BLUE, ORANGE = "#0072B2", "#D55E00"  # of the Okabe-Ito palette, which the colour-blind can tell apart
# matplotlib's own font lacks most scripts. Of these, those that are installed are asked for what it lacks.
FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "PingFang SC", "Yu Gothic",
         "Microsoft YaHei", "Malgun Gothic", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans Devanagari",
         "Noto Sans Thai", "Arial Unicode MS", "Unifont")  # fmt: skip


def plot_confusion_matrix(scored: dict, labels: list[str], path: Path, shares: bool = False) -> None:
    """Draw the confusion matrix [C, C] of `metrics.score`: colour by the share of the true class.

    Each cell holds the number of images, or with `shares` the percentage of the true class; above `MAX_CELLS` classes
    nothing. Of some hundred classes it has no names.
    """
    matrix = np.array(scored["confusion_matrix"])
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.0, 0.45 * len(labels)), 24.0)
    with _figure(path, side + 1.5, side + 0.5) as figure:
        axes = figure.subplots()
        image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, format=PercentFormatter(1), shrink=0.8, label="share of the true class")
        size = float(np.clip(72 * side / len(labels) / 4, 3, 10))
        short = [shorten(escape_terminal(" ".join(name.split()))) for name in labels]
        # Names are data: a dollar sign in one must not start a formula.
        text: dict[str, Any] = {"fontsize": min(10.0, 72 * side / len(labels) * 0.6), "parse_math": False}
        ticks, order = range(len(labels)), ""
        if text["fontsize"] < LEGIBLE:
            ticks, short, order = range(0), [], ", in the order of the table"
        axes.set_xticks(ticks, short, rotation=45, ha="right", rotation_mode="anchor", **text)
        axes.set_yticks(ticks, short, **text)
        axes.set(xlabel=f"predicted class{order}", ylabel=f"true class{order}")
        # Above names and cells, because the title of the axes would be cut off where names are long.
        more = f"\nand {plural(scored['none']['n'], 'image')} of none of the classes" if "none" in scored else ""
        figure.suptitle(f"Test accuracy {percent_with_interval(scored)}{more}", fontsize=10, x=0.01, ha="left")
        if len(labels) <= MAX_CELLS:
            for row, column in zip(*matrix.nonzero(), strict=True):
                colour = "white" if share[row, column] > DARK else "black"
                cell = matrix[row, column]
                if shares:
                    cell = percent(share[row, column], 0) if share[row, column] >= 0.01 else "<1%"
                axes.text(column, row, cell, ha="center", va="center", color=colour, fontsize=size)


def plot_curves(log_history: list[dict], path: Path, augmented: bool) -> None:
    """Draw loss and accuracy by epoch, of training and validation, from the Trainer's log history.

    Args:
        log_history: of the Trainer.
        path: of the figure.
        augmented: whether the training images were; the figure says so.
    """
    name = "train (augmented)" if augmented else "train"
    with _figure(path, 9, 3.6) as figure:
        loss, accuracy = figure.subplots(1, 2)
        _plot_pair(loss, log_history, name, "loss", "eval_loss")
        _plot_pair(accuracy, log_history, name, "train_accuracy", "eval_accuracy")
        loss.set(xlabel="epoch", ylabel="loss")
        accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.04))
        accuracy.yaxis.set_major_formatter(PercentFormatter(1))
        accuracy.legend(loc="best")


def _plot_pair(axes: Axes, log_history: list[dict], train_name: str, train_key: str, validation_key: str) -> None:
    # Two markers, which differ without colour too.
    for key, name, colour, marker in (
        (train_key, train_name, BLUE, "o"),
        (validation_key, "validation", ORANGE, "s"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry]
        axes.plot([epoch for epoch, _ in points], [y for _, y in points], color=colour, marker=marker, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=1.08 * axes.dataLim.ymax if axes.dataLim.ymax > 0 else None)


def plot_reliability(bins: list[dict], path: Path) -> None:
    """Draw accuracy by confidence from `metrics.reliability`, and how many images each point stands for."""
    with _figure(path, 5, 4.4) as figure:
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot((0, 1), (0, 1), color="#999999", linestyle="--", label="perfectly calibrated")
        confidence = [b["confidence"] for b in bins]
        axes.plot(confidence, [b["accuracy"] for b in bins], color=BLUE, marker="o", label="this model, on test")
        axes.set(ylabel="accuracy", ylim=(-0.02, 1.02), xlim=(0, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="upper left")
        counts.bar(confidence, [b["n"] for b in bins], width=0.04, color=BLUE)
        counts.set(xlabel="confidence", ylabel="images")
        counts.xaxis.set_major_formatter(PercentFormatter(1))


def plot_coverage(unsure: dict, path: Path) -> None:
    """Draw accuracy by the share of images that are answered, from `metrics.selective`."""
    curve = unsure["curve"]
    with _figure(path, 5, 3.4) as figure:
        axes = figure.subplots()
        axes.plot([point["coverage"] for point in curve], [point["accuracy"] for point in curve], color=BLUE)
        if unsure["accuracy"] is not None:
            mark = f"unsure of {percent(1 - unsure['answered'])} of the images"
            axes.plot(unsure["answered"], unsure["accuracy"], color=ORANGE, marker="s", linestyle="", label=mark)
            axes.legend(loc="lower left")
        lowest = min(point["accuracy"] for point in curve)
        axes.set(xlabel="share of test images answered", ylabel="accuracy of the answers", xlim=(0, 1.02))
        axes.set_ylim(max(0, lowest - 0.05), 1.005)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def plot_learning_curve(curve: dict, path: Path) -> None:
    """Draw what `learning_curve.learning_curve` measured, and what it expects of twice the images."""
    fitted, points = curve["curve"], curve["points"]
    with _figure(path, 6, 3.8) as figure:
        axes = figure.subplots()
        axes.fill_between(fitted["n"], fitted["low"], fitted["high"], color=BLUE, alpha=0.2, label="95% interval")
        axes.plot(fitted["n"], fitted["accuracy"], color=BLUE, label="fitted")
        accuracy = [point["accuracy"] for point in points]
        spread = [
            [max(0.0, point["accuracy"] - point["lowest"]) for point in points],
            [max(0.0, point["highest"] - point["accuracy"]) for point in points],
        ]
        axes.errorbar(
            [point["n"] for point in points],
            accuracy,
            spread,
            color=ORANGE,
            fmt="s",
            capsize=3,
            label="measured, all draws",
        )
        axes.axvline(curve["now"]["n"], color="#999999", linestyle=":", label="training images of this run")
        axes.set(xlabel="training images", ylabel="accuracy of a linear probe", xscale="log")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xticks([*(point["n"] for point in points), curve["twice"]["n"]])
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(loc="lower right")


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Give a figure in the project's style, with fonts for names of classes in any script; at the end it is saved.

    Args:
        path: of the PNG.
        width, height: in inches.
    """
    installed = set(font_manager.get_font_names())
    fonts = [*matplotlib.rcParams["font.family"], *(font for font in FONTS if font in installed)]
    style: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style | {"font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # one for each character, in a name that shows as boxes
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=120)
