"""The pages that a person looks at: the report of a run, and the audit of a dataset; each one file, no network."""

import base64
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from jinja2 import Environment, FileSystemLoader

from luthier.images.decode import decode_rgb, read_bytes
from luthier.reporting import figures
from luthier.reporting.card import ROWS
from luthier.reporting.console import (
    KIND_NAMES,
    count_epochs,
    count_in_words,
    grouping_in_words,
    inflation_in_words,
    learning_curve_in_words,
    none_in_words,
    refit_in_words,
)
from luthier.run_files import REPORT
from luthier.scoring.audit import leaks_in_words
from luthier.scoring.metrics import TestPredictions
from luthier.terminal import fraction, percent, plural

THUMBNAIL = 160  # pixels: longer side of the images in a page
MAX_SHOWN = 12  # wrong predictions, and correct ones
MAX_PAIRS, MAX_OF_PAIR = 10, 6  # pairs of classes that are confused, and images of each pair


def write_report(output_dir: Path, metrics: dict, findings: dict, test: TestPredictions) -> None:
    """Write the figures as PNG and `report.html`, one page that needs no other file and no network.

    Args:
        output_dir: of the run; its name is the page's title.
        metrics: what `metrics.json` holds.
        findings: of `audit.audit_images`.
        test: what the model predicts.
    """
    labels = metrics["data"]["labels"]
    if metrics["test"]["confusion_matrix"]:
        figures.plot_confusion_matrix(metrics["test"], labels, output_dir / "confusion_matrix.png")
        if len(labels) <= figures.MAX_CELLS:  # the figures differ in what is written into the cells alone
            figures.plot_confusion_matrix(metrics["test"], labels, output_dir / ROWS, shares=True)
    figures.plot_reliability(metrics["calibration"]["reliability"], output_dir / "reliability.png")
    figures.plot_coverage(metrics["unsure"], output_dir / "coverage.png")
    if any("eval_loss" in entry for entry in metrics["history"]):
        augmented = metrics.get("augmentation") != "none"
        figures.plot_curves(metrics["history"], output_dir / "curves.png", augmented)
    if metrics["learning_curve"]:
        figures.plot_learning_curve(metrics["learning_curve"], output_dir / "learning_curve.png")
    wrong, correct, confusions = most_telling(test, labels)
    _render(
        "report.html",
        output_dir / REPORT,
        test.splits,
        name=output_dir.resolve().name,
        metrics=metrics,
        findings=findings,
        leaks=leaks_in_words(metrics | {"leaks": findings["leaks"]}),  # the page has the images learned from itself
        figures={path.name: _data_uri(path.read_bytes(), "png") for path in output_dir.glob("*.png")},
        wrong=wrong,
        correct=correct,
        confusions=confusions,
        attribution=re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", metrics["data"]["attribution"]),
    )


def most_telling(test: TestPredictions, labels: list[str]) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the most confident wrong predictions, the least confident correct ones, and what is confused most often.

    The first two are images of a page. The third are pairs of a class and what it is taken for, at least twice: how
    often, of how many, and the most confident of these images.
    """
    predicted, confidence, _ = test.likeliest()

    def entry(row: int) -> dict:
        correct, sure = predicted[row] == test.references[row], f"{percent(confidence[row], 0)} sure"
        return {
            "split": "test",
            "row": row,
            "name": test.splits["test"][row]["name"],
            "label": labels[test.references[row]],
            "predicted": None if correct else labels[predicted[row]],
            "why": sure,
        }

    rows = np.argsort(confidence, kind="stable")
    right = predicted[rows] == test.references[rows]
    wrong, correct = rows[~right][::-1], rows[right]  # the most confident, and the least confident, first
    pairs, pair_of, counts = np.unique(
        test.references[wrong] * len(labels) + predicted[wrong], return_inverse=True, return_counts=True
    )
    confusions = []
    for number in np.argsort(-counts, kind="stable")[:MAX_PAIRS]:
        label, taken_for = divmod(int(pairs[number]), len(labels))
        if (count := int(counts[number])) > 1:
            of = int((test.references == label).sum())
            images = [entry(int(row)) for row in wrong[pair_of == number][:MAX_OF_PAIR]]
            confusions.append(
                {"label": labels[label], "predicted": labels[taken_for], "count": count, "of": of, "images": images}
            )
    shown_wrong, shown_correct = ([entry(int(row)) for row in part[:MAX_SHOWN]] for part in (wrong, correct))
    return shown_wrong, shown_correct, confusions


def write_audit_page(path: Path, name: str, findings: dict, splits: DatasetDict) -> None:
    """Write the page of an audit without a run."""
    _render("audit.html", path, splits, name=name, findings=findings)


def _render(template: str, path: Path, splits: DatasetDict, **values) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = (
        count_epochs,
        count_in_words,
        fraction,
        grouping_in_words,
        inflation_in_words,
        learning_curve_in_words,
        none_in_words,
        percent,
        plural,
        refit_in_words,
    )
    environment.globals |= {function.__name__: function for function in words}
    page = environment.get_template(template).render(kinds=KIND_NAMES, thumbnail=_thumbnails(splits), **values)
    path.write_text(page, encoding="utf-8")


def _thumbnails(splits: DatasetDict) -> Callable[[dict], str | None]:
    """Return the function from an image of a finding or a prediction to its thumbnail, as a data URI."""

    @functools.cache
    def thumbnail(split: str, row: int) -> str | None:
        try:
            image = decode_rgb(read_bytes(splits[split][row]["image"]), THUMBNAIL).image
        except Exception:  # it could be read when the run began; better a page without an image than a run without one
            return None
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return _data_uri(file.getvalue(), "jpeg")

    return lambda entry: thumbnail(entry["split"], entry["row"]) if entry["row"] is not None else None


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
