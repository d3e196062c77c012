"""The model card, `README.md`: what a model is, what it scores, on which data, by which recipe, and its exports."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from yaml import YAMLError

from luthier.escape import escape_markdown
from luthier.files import atomic_write
from luthier.output_dir import has_ended
from luthier.reporting.console import (
    balance_with_intervals,
    inflation_in_words,
    learning_curve_in_words,
    none_in_words,
    percent_with_interval,
    refit_in_words,
    trust_remote_code,
)
from luthier.run_files import CARD, EARLIER_CARD, EXPORTS, METRICS, ONNX
from luthier.scoring.audit import leaks_in_words
from luthier.terminal import fraction, percent, points, say

FIGURES = {  # that a model card shows
    "confusion_matrix.png": "Confusion matrix",
    "reliability.png": "Accuracy by confidence",
    "coverage.png": "Accuracy by share of images answered",
    "learning_curve.png": "Accuracy by number of training images",
    "curves.png": "Loss and accuracy by epoch",
}
ROWS = "confusion_matrix_rows.png"  # one more, for the report alone
# Metadata that only a person knows, or knows better.
ADDED = ("license", "license_name", "license_link", "language", "base_model", "datasets")
SHOWN_OF_EXPORT = {  # by a model card; the rest of `parity.Parity` is for programs
    "images", "weights", "precision", "n", "same", "largest_difference", "labelled", "accuracy", "difference_ci95",
}  # fmt: skip


def write_model_card(folder: Path, metrics: dict, repo_id: str | None = None) -> None:
    """Write the model card of a run. What a person has added to the metadata of an earlier one is kept, see `ADDED`.

    Args:
        folder: of the model.
        metrics: what `metrics.json` holds.
        repo_id: its repository on the Hub; the card of a folder is named after the folder.
    """
    test, data = metrics["test"], metrics["data"]
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    of_fold = "" if "train" in data["splits"] else "In the fold whose model is kept: "
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(  # Markdown escapes by a filter of its own
        loader=templates, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters |= {
        "text": escape_markdown,
        "fraction": fraction,
        "percent": percent,
        "interval": percent_with_interval,
        "points": points,
        "balance": balance_with_intervals,
    }
    card = environment.get_template("card.md").render(
        metadata=_describe(folder, metrics, name).to_yaml(),
        name=name,
        loaded_from=json.dumps(repo_id or "THIS_FOLDER"),
        trust=trust_remote_code(folder),
        metrics=metrics,
        learning_curve=metrics["learning_curve"] and of_fold + learning_curve_in_words(metrics["learning_curve"]),
        class_shares=metrics.get("class_shares"),
        groups=metrics.get("groups") and of_fold + inflation_in_words(metrics["groups"]),
        leaks=leaks_in_words(metrics),
        not_known="; ".join(none_in_words(test["none"], metrics["unsure"])) if "none" in test else "",
        refit=refit_in_words(metrics["refit"]) if metrics.get("refit") else "",
        figures={file: title for file, title in FIGURES.items() if (folder / file).exists()},
        exports=read_exports(folder),
        command=" ".join(metrics["command"].split()),
    )
    with atomic_write(folder / CARD) as whole:  # its presence says that the run has ended
        whole.write_text(card + "\n", encoding="utf-8")
    (folder / EARLIER_CARD).unlink(missing_ok=True)


def _describe(folder: Path, metrics: dict, name: str) -> ModelCardData:
    """Return what the Hub reads of a card: the scores, what was fine-tuned on what, and what a person has added."""
    test, data = metrics["test"], metrics["data"]
    # On the Hub a dataset is named with its owner. A folder may have any name, also that of another dataset.
    dataset = data["name"] if "/" in data["name"] else None
    own_test = "test" if "test" in data.get("own_splits", ()) else None  # a split of that name is in the data
    scores = (("accuracy", "Accuracy", test["accuracy"]), ("f1", "Macro F1", test["macro_f1"]))
    origin = {"base_model": metrics.get("base_model"), "datasets": [dataset] if dataset else None}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "luthier"],
        metrics=["accuracy", "f1"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset or "imagefolder",
                dataset_name=data["name"],
                dataset_split=own_test,
                metric_type=kind,
                metric_name=title,
                metric_value=value,
            )
            for kind, title, value in scores
        ],
        **(origin | _added(folder / CARD if (folder / CARD).is_file() else folder / EARLIER_CARD)),
    )


def _added(card: Path) -> dict:
    """Return what a person has added to the metadata of a card, see `ADDED`; nothing where there is no card."""
    if not card.is_file():
        return {}
    try:
        found = ModelCard(card.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError) as error:
        say("careful", f"what you added to the metadata of the model card is lost, because it cannot be read: {error}")
        return {}
    return {key: found[key] for key in ADDED if key in found}


def read_exports(folder: Path) -> dict[str, dict]:
    """Return how each exported file of a folder compares with the model, as far as is known."""
    try:
        noted = dict(json.loads((folder / EXPORTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}  # there is no note, or it is damaged
    whole = {file: row for file, row in noted.items() if isinstance(row, dict) and row.keys() >= SHOWN_OF_EXPORT}
    return {file: row for file, row in whole.items() if (folder / ONNX / file).is_file()}


def note_export(folder: Path, file: str, parity: Mapping) -> None:
    """Note in `EXPORTS` and in the model card of a folder how an exported file compares with the model.

    A run that has not ended has no card, and gets none.

    Args:
        folder: of the model.
        file: its name, one of `ONNX_FILES`.
        parity: the values of `parity.Parity`, and `images` and `weights`: on which and with which it was compared.
    """
    noted = read_exports(folder) | {file: dict(parity)}
    with atomic_write(folder / EXPORTS) as whole:
        whole.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    if not has_ended(folder):
        return
    # metrics.json may be missing, of another version, or edited by hand: then the card stays as it is.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, TemplateError):
        write_model_card(folder, json.loads((folder / METRICS).read_text(encoding="utf-8")))
