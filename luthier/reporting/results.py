"""The files of a run that programs read: `metrics.json`, `predictions.csv`, `audit.json`."""

import csv
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from luthier.escape import escape_cell
from luthier.reporting.console import KEPT
from luthier.scoring.audit import KINDS
from luthier.scoring.metrics import TestPredictions
from luthier.scoring.selection import Candidate
from luthier.terminal import Stopwatch

PACKAGES = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")


def collect_metrics(
    *,
    scores: Mapping,
    majority: Mapping,
    linear_probe: Mapping | None = None,
    learning_curve: Mapping | None = None,
    data: Mapping,
    recipe: Mapping[str, str],
    kept: Candidate | None = None,
    history: list[dict],
    seeds: Mapping | None = None,
    findings: Mapping,
    command: str,
    settings: str,
) -> dict:
    """Return what `metrics.json` holds, without the seconds.

    Args:
        scores: of `selection.score_run` or `selection.score_test`.
        majority, linear_probe: the baselines; None where the model has no probe.
        learning_curve: of `learning_curve.learning_curve`.
        data: of `data.describe`.
        recipe: of `console.describe_setup`.
        kept: the weights that training ended with.
        history: the Trainer's log.
        seeds: of the training and the splits.
        findings: of `audit.audit_images`.
        command, settings: the command line, and the digest of all settings.
    """
    baselines = {"majority": majority} | ({"linear_probe": linear_probe} if linear_probe else {})
    return {
        **scores,
        "baselines": baselines,
        "learning_curve": learning_curve,
        "data": data,
        "recipe": {**recipe, **({"kept": KEPT[kept.share]} if kept else {})},
        "history": history,
        **({"seeds": seeds} if seeds else {}),
        "audit": {kind: None if findings[kind] is None else len(findings[kind]) for kind in KINDS},
        "versions": _versions(),
        "command": command,
        "settings": settings,
    }


def write_results(
    output_dir: Path, metrics: dict, test: TestPredictions, findings: dict, stopwatch: Stopwatch
) -> None:
    """Write all files of a run but its model and its card; add the seconds to the metrics.

    Args:
        output_dir: of the run.
        metrics: of `collect_metrics`.
        test: what the model predicts.
        findings: of `audit.audit_images`.
        stopwatch: of the run; its stage "save" ends here.
    """
    from luthier.reporting.page import write_report  # it draws figures, and matplotlib takes half a second

    metrics["seconds"] = stopwatch.seconds
    write_metrics(output_dir / "metrics.json", metrics)  # first: the rest can be made again
    write_predictions(output_dir / "predictions.csv", metrics["data"]["labels"], test)
    write_audit(output_dir / "audit.json", findings)
    write_report(output_dir, metrics, findings, test)
    stopwatch.stop("save")
    metrics["seconds"] = {**stopwatch.seconds, "total": round(sum(stopwatch.seconds.values()), 3)}
    write_metrics(output_dir / "metrics.json", metrics)


def write_metrics(path: Path, metrics: Mapping) -> None:
    """Write `metrics.json`; what is not a number, after a run that diverged, is null."""
    plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_audit(path: Path, findings: Mapping) -> None:
    """Write `audit.json`."""
    path.write_text(json.dumps(findings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_predictions(path: Path, labels: list[str], test: TestPredictions) -> None:
    """Write `predictions.csv`, a row for each test image: its name and digest, its class, the prediction."""
    images, probabilities = test.splits["test"], test.probabilities
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["name", "digest", "label", "predicted", "confidence", "probability_of_label"])
        for name, digest, row, label in zip(
            images["name"][:], images["digest"][:], probabilities, test.references, strict=True
        ):
            words = [escape_cell(word) for word in (name, digest, labels[label], labels[row.argmax()])]
            table.writerow([*words, f"{row.max():.6f}", f"{row[label]:.6f}"])


def read_correct(path: Path) -> list[tuple[str, bool]]:
    """Return the digest of each image of a `predictions.csv` and whether it is correct, sorted by digest."""
    with path.open(newline="", encoding="utf-8") as file:
        return sorted((row["digest"], row["label"] == row["predicted"]) for row in csv.DictReader(file))


def _versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
