"""What a person looks at after a run: the report page, the model card; and the files that programs read."""

import base64
import csv
import functools
import html
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import DatasetDict
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader
from scipy.special import log_softmax

import audit
import learning_curve
from images import decode_rgb, read
from predict import as_cell
from terminal import percent_with_interval

PICTURE = 160  # pixels: longer side of the pictures in a page
SHOWN = 12  # errors, and hits
FIGURES = {  # that a model card shows
    "confusion_matrix.png": "Confusion matrix",
    "reliability.png": "Accuracy by confidence",
    "coverage.png": "Accuracy by the share of pictures that are answered",
    "learning_curve.png": "Accuracy by number of training pictures",
    "curves.png": "Loss and accuracy by epoch",
}


def write_report(
    output_dir: Path, metrics: dict, found: dict, pictures: DatasetDict, logits: np.ndarray, references: np.ndarray
) -> None:
    """Write the figures as PNG and `report.html`, one page that needs no other file and no network.

    Args:
        output_dir: where to; its name is the page's title.
        metrics: what `metrics.json` holds.
        found: what `audit.audit` found.
        pictures: as `data.load_splits` returns them.
        logits, references: of test, [N, C] and [N].
    """
    import figures  # not before it draws: matplotlib takes half a second

    labels = metrics["data"]["labels"]
    figures.plot_confusion_matrix(metrics["test"], labels, output_dir / "confusion_matrix.png")
    figures.plot_confusion_matrix(metrics["test"], labels, output_dir / "confusion_matrix_rows.png", shares=True)
    figures.plot_reliability(metrics["calibration"]["reliability"], output_dir / "reliability.png")
    figures.plot_coverage(metrics["unsure"], output_dir / "coverage.png")
    if any("eval_loss" in entry for entry in metrics["history"]):
        figures.plot_curves(metrics["history"], output_dir / "curves.png")
    if metrics["learning_curve"]:
        figures.plot_learning_curve(metrics["learning_curve"], output_dir / "learning_curve.png")
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=-1))
    predicted, confidence = probabilities.argmax(axis=-1), probabilities.max(axis=-1)

    def entries(rows: np.ndarray) -> list[dict]:
        return [
            {
                "split": "test",
                "row": int(row),
                "name": pictures["test"][int(row)]["name"],
                "label": labels[references[row]],
                "why": f"taken for {labels[predicted[row]]}, {confidence[row]:.0%} sure"
                if predicted[row] != references[row]
                else f"{confidence[row]:.0%} sure",
            }
            for row in rows[:SHOWN]
        ]

    by_confidence = np.argsort(confidence, kind="stable")
    wrong = predicted[by_confidence] != references[by_confidence]
    _render(
        "report.html",
        output_dir / "report.html",
        pictures,
        name=output_dir.resolve().name,
        metrics=metrics,
        found=found,
        figures={path.name: _data_uri(path.read_bytes(), "png") for path in output_dir.glob("*.png")},
        errors=entries(by_confidence[wrong][::-1]),
        hits=entries(by_confidence[~wrong]),
        in_words=learning_curve.in_words,
        attribution=re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", metrics["data"]["attribution"]),
    )


def write_audit_page(path: Path, name: str, found: dict, pictures: DatasetDict) -> None:
    """Write the page of an audit that stands alone."""
    _render("audit.html", path, pictures, name=name, found=found)


def _render(template: str, path: Path, pictures: DatasetDict, **values) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(kinds=audit.KINDS, shown=_shower(pictures), **values)
    path.write_text(page, encoding="utf-8")


def _shower(pictures: DatasetDict) -> Callable[[dict], str | None]:
    """Return the function from an audit's or a test's picture to itself, small, as a data URI."""

    @functools.cache
    def show(split: str, row: int) -> str | None:
        try:
            image = decode_rgb(read(pictures[split][row]["image"]), PICTURE).image
        except Exception:  # it could be read when the run began; a page lacks a picture rather than a run its report
            return None
        image.thumbnail((PICTURE, PICTURE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        return _data_uri(file.getvalue(), "jpeg")

    return lambda entry: show(entry["split"], entry["row"]) if entry["row"] is not None else None


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def write_predictions(
    path: Path, labels: list[str], pictures: DatasetDict, logits: np.ndarray, references: np.ndarray
) -> None:
    """Write a row for each test picture: what it is, what the model says, how sure it is."""
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=-1))
    test = pictures["test"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["name", "digest", "label", "predicted", "confidence", "probability_of_label"])
        for name, digest, row, label in zip(
            test["name"][:], test["digest"][:], probabilities, references, strict=True
        ):
            words = [as_cell(word) for word in (name, digest, labels[label], labels[row.argmax()])]
            table.writerow([*words, f"{row.max():.6f}", f"{row[label]:.6f}"])


def write_model_card(path: Path, metrics: dict, custom_code: bool, repo_id: str | None = None) -> None:
    """Write the model card `README.md`: what the model is, what it scored, on which data, by which recipe.

    Args:
        metrics: what `metrics.json` holds.
        custom_code: the model needs the `models.py` beside it.
        repo_id: where it goes on the Hub; the card of a folder is called as the folder.
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
    per_class = "\n".join(
        f"| {_escape(label)} | {row['precision']:.1%} | {row['recall']:.1%} | {row['f1']:.3f} | {row['support']} |"
        for label, row in test["per_class"].items()
    )
    settings = "\n".join(f"| {key} | {_escape(value)} |" for key, value in metrics["recipe"].items())
    majority, probe = metrics["baselines"]["majority"], metrics["baselines"].get("linear_probe")
    beside = f"A logistic regression on the frozen features scores {probe['test']['accuracy']:.1%}.\n" if probe else ""
    always = f"Always answering {_escape(majority['label'])}, the commonest class, scores {majority['accuracy']:.1%}."
    figures = "\n".join(f"![{alt}]({file})\n" for file, alt in FIGURES.items() if (path.parent / file).exists())
    curve = f"{learning_curve.in_words(metrics['learning_curve'])}.\n\n" if metrics["learning_curve"] else ""
    trust = ", trust_remote_code=True" if custom_code else ""
    calibration = f"Expected calibration error on test {test['ece']:.1%}"
    if metrics["calibration"]["temperature"] != 1:
        calibration += f", before calibration {metrics['calibration']['before']['test']['ece']:.1%}"
    calibration += ".\n"
    unsure = metrics["unsure"]
    if unsure["answered"] < 1 and unsure["accuracy"] is not None:
        calibration += (
            f"Below a confidence of {unsure['threshold']:.0%} (`unsure_below` in `config.json`) it had better say "
            f"that it is unsure: it then answers {unsure['answered']:.1%} of the test pictures, "
            f"{unsure['accuracy']:.1%} of them right.\n"
        )
    written = path.with_name(f".{path.name}")  # under its name it is whole: it says that the run has ended
    written.write_text(
        f"""---
{metadata.to_yaml()}
---

# {_escape(name)}

An image classifier of {len(data["labels"])} classes, fine-tuned on {_escape(data["name"])} with Luthier.

```python
from transformers import pipeline

classify = pipeline("image-classification", {json.dumps(repo_id or "THIS_FOLDER")}{trust})
classify("picture.jpg")
```

## Score

Test accuracy **{percent_with_interval(test)}**, macro F1 {test["macro_f1"]:.3f}. Chosen on
validation (accuracy {percent_with_interval(metrics["validation"])}); test was looked at once, at the end.
{beside}{calibration}{always}

| class | precision | recall | F1 | test pictures |
|---|---|---|---|---|
{per_class}

{curve}{figures}
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
    written.replace(path)


def _escape(text: object) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{character}" if character in r"\`*_[]|~#" else character for character in escaped)


def write_metrics(path: Path, metrics: dict) -> None:
    """Write `metrics.json`; what is not a number, after a run that diverged, is null."""
    plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
