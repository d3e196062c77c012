"""The files of a run that programs read: `metrics.json`, `predictions.csv`, `audit.json`."""

import csv
import importlib.metadata
import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from transformers import BaseImageProcessor, PreTrainedModel

from luthier.escape import escape_cell
from luthier.familiarity import Familiarity, describe_in_config, save_bank
from luthier.images.description import describe
from luthier.output_dir import LEARNED_FROM, atomic_write, copy_permissions_to_weights, has_ended, mark_unfinished
from luthier.reporting.card import EXPORTS, ONNX, write_model_card
from luthier.reporting.console import describe_recipe, say_results
from luthier.scoring.audit import KINDS
from luthier.scoring.baselines import majority_baseline
from luthier.scoring.experiment import Experiment, Result
from luthier.scoring.metrics import TestPredictions
from luthier.scoring.refit import Plan, Refitted
from luthier.scoring.selection import score_run
from luthier.terminal import Stopwatch, say
from models import save_model

SCORED = "scored"  # folder of the scored weights, where others are shipped
DIGEST = 16  # the first hexadecimal digits of a digest, which `LEARNED_FROM` has
IMAGES = "images.json"  # the options that load a run's images again on this machine, and which of them are of test
PACKAGES = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")


def collect_run(
    experiment: Experiment, result: Result, plan: Plan, augmentation: str, record: Mapping[str, Any]
) -> dict:
    """Return what `metrics.json` holds of a run, without the seconds, and `images`, which is for a file of its own.

    Args:
        experiment, result: of the run.
        plan: of the refit.
        augmentation: of the training images.
        record: `data`, the dataset's name and whether it is built in; `images`, the options that load the images
            again; and the rest of what `collect_metrics` takes.
    """
    outcome = result.outcome
    of_run = {key: value for key, value in record.items() if key not in ("data", "images")}
    data = describe(experiment.prepared, **record["data"], stream=experiment.stream)
    test = result.predictions(experiment.splits)
    metrics = collect_metrics(
        scores=score_run(result.kept, test, result.threshold),
        majority=majority_baseline(data, test),
        linear_probe=result.probe.scores,
        learning_curve=result.probe.learning_curve,
        groups=result.probe.inflation,
        class_shares=result.kept.class_shares,
        data=data,
        recipe=experiment.setup | describe_recipe(result, augmentation),
        race={
            "probe": outcome.probe and {"loss": outcome.probe.loss, "accuracy": outcome.probe.validation["accuracy"]},
            "heats": [heat._asdict() for heat in outcome.heats],
            "ended": outcome.ended,
        },
        refit={**plan._asdict(), "done": plan.pays},
        history=outcome.history,
        findings=experiment.findings,
        **of_run,
    )
    return metrics | {"images": record["images"]}


def collect_metrics(
    *,
    scores: Mapping,
    majority: Mapping,
    linear_probe: Mapping | None = None,
    learning_curve: Mapping | None = None,
    groups: Mapping | None = None,
    class_shares: Sequence[float] | np.ndarray | None = None,
    data: Mapping,
    recipe: Mapping[str, str],
    race: Mapping | None = None,
    refit: Mapping | None = None,
    history: Sequence[dict] = (),
    seeds: Mapping | None = None,
    findings: Mapping,
    command: str,
    settings: str,
    time_limit: float | None = None,
) -> dict:
    """Return what `metrics.json` holds, without the seconds.

    Args:
        scores: of `selection.score_run` or `selection.score_test`.
        majority, linear_probe: the baselines; None where the model has no probe.
        learning_curve: of `learning_curve.learning_curve`.
        groups: of `grouping.measure_inflation`.
        class_shares: of `balance.Balance`, where the answers make up for rare classes.
        data: of `description.describe`.
        recipe: of `console.describe_setup` and `console.describe_recipe`.
        race: its heats, and why it ended.
        refit: what the shipped weights have learned from, see `refit.Plan`.
        history: the Trainer's log.
        seeds: of the training and the splits.
        findings: of `audit.audit_images`.
        command, settings: the command line, and the digest of all settings.
        time_limit: minutes; None is no limit.
    """
    baselines = {"majority": majority} | ({"linear_probe": linear_probe} if linear_probe else {})
    return {
        **scores,
        "baselines": baselines,
        "learning_curve": learning_curve,
        "groups": groups,
        "class_shares": None if class_shares is None else list(map(float, class_shares)),
        "data": data,
        "recipe": recipe,
        "race": race,
        "refit": refit,
        "history": list(history),
        **({"seeds": seeds} if seeds else {}),
        "audit": {kind: None if findings[kind] is None else len(findings[kind]) for kind in KINDS},
        "versions": _versions(),
        "command": command,
        "settings": settings,
        "time_limit": time_limit,
    }


def write_run(
    output_dir: Path,
    experiment: Experiment,
    result: Result,
    plan: Plan,
    refitted: Refitted | None,
    metrics: dict,
    stopwatch: Stopwatch,
) -> None:
    """Save the model of a run, write its files, and say its score.

    Args:
        output_dir: of the run.
        experiment, result: of the run.
        plan: of the refit.
        refitted: what is shipped; None where that is the scored model.
        metrics: of `collect_run`.
        stopwatch: of the run.
    """
    splits = experiment.splits
    seen = digests = [*result.learned_from, *(splits["validation"]["digest"][:] if "validation" in splits else ())]
    if plan.pays:
        digests = [digest for split in plan.splits for digest in splits[split]["digest"][:]]
    custom_code = save_models(result, refitted, experiment.view.image_processor, output_dir, digests, seen)
    learned = set(result.learned_from)  # in cross-validation, by the weights of one fold
    unseen = [digest[:DIGEST] for digest in splits["test"]["digest"][:] if digest not in learned]
    images = {"options": metrics.pop("images"), "test": unseen}
    (output_dir / IMAGES).write_text(json.dumps(images, indent=1) + "\n", encoding="utf-8")
    write_results(output_dir, metrics, result.predictions(splits), experiment.findings, stopwatch)
    write_model_card(output_dir / "README.md", metrics, custom_code)
    say_results(output_dir, metrics, custom_code)


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


def save_models(
    result: Result,
    refitted: Refitted | None,
    image_processor: BaseImageProcessor,
    output_dir: Path,
    digests: Sequence[str],
    scored_digests: Sequence[str],
) -> bool:
    """Save the shipped model, and the scored one beside it where that is another.

    What an earlier part of the run has made of other weights is removed.

    Args:
        result: has the model that was scored.
        refitted: the model that is shipped; None where that is the scored one.
        image_processor: of both.
        output_dir: of the run; the scored model goes to `SCORED` in it.
        digests: of the images that the shipped model has learned from, or without folds was chosen by.
        scored_digests: the same of the scored model.

    Returns whether the model brings code of its own.
    """

    def save(model: PreTrainedModel, familiarity: Familiarity | None, folder: Path) -> bool:
        describe_in_config(model, familiarity)
        custom_code = save_model(model, image_processor, folder)
        save_bank(folder, familiarity)
        copy_permissions_to_weights(folder / "config.json")
        return custom_code

    def note(digests: Sequence[str], folder: Path) -> None:
        short = sorted({digest[:DIGEST] for digest in digests})
        (folder / LEARNED_FROM).write_text("\n".join(short) + "\n", encoding="utf-8")

    mark_unfinished(output_dir)
    if (output_dir / ONNX).is_dir():
        say("removed", f"{output_dir / ONNX}: exports of the earlier weights")
    for folder in (SCORED, ONNX):
        shutil.rmtree(output_dir / folder, ignore_errors=True)
    (output_dir / EXPORTS).unlink(missing_ok=True)
    note(digests, output_dir)
    scored = (result.model, result.answers.familiarity)
    if refitted is None:
        return save(*scored, output_dir)
    save(*scored, output_dir / SCORED)
    note(scored_digests, output_dir / SCORED)
    return save(*refitted, output_dir)


def note_export(folder: Path, file: str, parity: Mapping) -> None:
    """Note in `EXPORTS` and in the model card of a folder how an exported file compares with the model.

    A run that has not ended has no card, and gets none.
    """
    path = folder / EXPORTS
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}  # there is none, or it is damaged
    known = {name: row for name, row in known.items() if (folder / ONNX / name).is_file()} | {file: dict(parity)}
    with atomic_write(path) as whole:
        whole.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    if not has_ended(folder):
        return
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        write_model_card(folder / "README.md", metrics, (folder / "models.py").exists())
    except (OSError, ValueError, KeyError, TypeError, TemplateError):
        pass  # no run of this version: its card stays as it is


def warn_if_learned(model_name: str, splits: Mapping[str, Dataset]) -> int:
    """Say and return how many of the images that are to judge a model are known to it, as far as is known.

    These are the files that it has learned from, or that have chosen its weights.

    Args:
        model_name: where the model comes from; a folder may know.
        splits: all but train judge.
    """
    path = Path(model_name) / LEARNED_FROM
    known = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    judges = [digest for split, dataset in splits.items() if split != "train" for digest in dataset["digest"][:]]
    learned = sum(digest[:DIGEST] in known for digest in judges)
    if learned:
        images = f"{learned:,} of the {len(judges):,} images that judge it"
        say("careful", f"{model_name} has learned from, or was chosen by, {images}: its score means little")
    return learned


def write_metrics(path: Path, metrics: Mapping) -> None:
    """Write `metrics.json`; what is not a number, after a run that diverged, is null."""
    plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    # A list of numbers is one line, such as a row of the confusion matrix. No text in quotes holds such a line break.
    text = re.sub(r"\[\n([-+\s\d.,eE]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def write_audit(path: Path, findings: Mapping) -> None:
    """Write `audit.json`."""
    path.write_text(json.dumps(findings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_predictions(path: Path, labels: list[str], test: TestPredictions) -> None:
    """Write `predictions.csv`, a row for each test image: its name and digest, its class, the prediction.

    Where there are groups, a column has the number of the image's; where there are images of none of the classes, a
    column has 1 for them, and 0 for the others.
    """
    images, probabilities = test.splits["test"], test.probabilities
    more = {} if test.groups is None else {"group": test.groups}
    more |= {} if test.none is None else {"none": (test.references == test.none).astype(int)}
    numbers = np.array(list(more.values())).reshape(len(more), len(images)).T.tolist()
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        header = ["name", "digest", "label", "predicted", "confidence", "probability_of_label"]
        table.writerow([*header, *more])
        for name, digest, row, label, rest in zip(
            images["name"][:], images["digest"][:], probabilities, test.references, numbers, strict=True
        ):
            words = [escape_cell(word) for word in (name, digest, labels[label], labels[row.argmax()])]
            table.writerow([*words, f"{row.max():.6f}", f"{row[label]:.6f}", *rest])


def read_correct(path: Path) -> list[tuple[str, bool, str]]:
    """Return of each image of a `predictions.csv` its digest, whether it is correct, and its group, if any; sorted.

    Images of none of the classes are left out.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return sorted(
            (row["digest"], row["label"] == row["predicted"], row.get("group", ""))
            for row in csv.DictReader(file)
            if row.get("none") != "1"
        )


def _versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
