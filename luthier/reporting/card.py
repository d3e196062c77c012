"""The model card, `README.md`: what a model is, what it scores, on which data, by which recipe."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from luthier.escape import escape_markdown
from luthier.output_dir import atomic_write
from luthier.reporting.console import (
    balance_with_intervals,
    inflation_in_words,
    learning_curve_in_words,
    none_in_words,
    percent_with_interval,
    refit_in_words,
    trust_remote_code,
)
from luthier.terminal import percent, points

ONNX = "onnx"  # folder of exported files
EXPORTS = "export.json"  # how they compare with the model
FIGURES = {  # that a model card shows
    "confusion_matrix.png": "Confusion matrix",
    "reliability.png": "Accuracy by confidence",
    "coverage.png": "Accuracy by share of images answered",
    "learning_curve.png": "Accuracy by number of training images",
    "curves.png": "Loss and accuracy by epoch",
}


def write_model_card(path: Path, metrics: dict, custom_code: bool, repo_id: str | None = None) -> None:
    """Write the model card of a run.

    Args:
        path: of the card, `README.md` in the folder of the model.
        metrics: what `metrics.json` holds.
        custom_code: the model needs the `models.py` beside it.
        repo_id: its repository on the Hub; the card of a folder is named after the folder.
    """
    test, data = metrics["test"], metrics["data"]
    name = repo_id.split("/")[-1] if repo_id else path.parent.resolve().name
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
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(  # Markdown escapes by a filter of its own
        loader=templates, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
    )
    environment.filters |= {
        "text": escape_markdown,
        "percent": percent,
        "interval": percent_with_interval,
        "points": points,
        "balance": balance_with_intervals,
    }
    exports = path.parent / EXPORTS
    compared = json.loads(exports.read_text(encoding="utf-8")) if exports.is_file() else {}
    card = environment.get_template("card.md").render(
        metadata=metadata.to_yaml(),
        name=name,
        loaded_from=json.dumps(repo_id or "THIS_FOLDER"),
        trust=trust_remote_code(custom_code),
        metrics=metrics,
        learning_curve=metrics["learning_curve"] and learning_curve_in_words(metrics["learning_curve"]),
        class_shares=metrics.get("class_shares"),
        groups=metrics.get("groups") and inflation_in_words(metrics["groups"]),
        not_known="; ".join(none_in_words(test["none"], metrics["unsure"])) if "none" in test else "",
        refit=refit_in_words(metrics["refit"]) if metrics.get("refit") else "",
        figures={file: title for file, title in FIGURES.items() if (path.parent / file).exists()},
        exports={file: row for file, row in compared.items() if (path.parent / "onnx" / file).is_file()},
        command=" ".join(metrics["command"].split()),
    )
    with atomic_write(path) as whole:  # its presence says that the run has ended
        whole.write_text(card + "\n", encoding="utf-8")
