"""What a run writes: its models, and the files that programs read (`metrics.json`, `predictions.csv`, ...)."""

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
from transformers import PreTrainedModel

from luthier.cache import list_of
from luthier.escape import escape_cell
from luthier.familiarity import Familiarity, describe_in_config, save_bank
from luthier.files import copy_permissions_to_weights, sync
from luthier.images.description import describe
from luthier.options import DataArguments
from luthier.output_dir import is_of_run, mark_unfinished
from luthier.reporting.card import FIGURES, ROWS, write_model_card
from luthier.reporting.console import describe_recipe, describe_test_view, loss_in_words, say_results
from luthier.run_files import (
    AUDIT,
    CONFIG,
    DIGEST,
    EXPORTS,
    IMAGES,
    LEARNED_FROM,
    METRICS,
    ONNX,
    PREDICTIONS,
    SCORED,
)
from luthier.scoring.audit import KINDS
from luthier.scoring.baselines import majority_baseline
from luthier.scoring.experiment import Experiment, Result
from luthier.scoring.metrics import TestPredictions
from luthier.scoring.refit import Plan, Refitted
from luthier.scoring.selection import score_run
from luthier.terminal import Stopwatch, plural, say
from models import save_model

# Of a model that was scored alone; see `collect_run`.
NOT_TRAINED: Mapping[str, Any] = {
    "learning_curve": None, "groups": None, "race": None, "refit": None, "history": [], "augmentation": None,
    "time_limit": None, "base_model": None,
}  # fmt: skip
PACKAGES = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")


def collect_run(
    experiment: Experiment, result: Result, plan: Plan, data_args: DataArguments, record: Mapping[str, Any]
) -> dict:
    """Return what `metrics.json` holds of a run, without the seconds.

    Args:
        experiment, result: of the run.
        plan: of the refit.
        data_args: of the run.
        record: of `Arguments.for_record`.
    """
    outcome, probe = result.outcome, result.outcome.probe
    data = describe(experiment.prepared, data_args.name, data_args.is_built_in, experiment.stream)
    data["own_splits"] = sorted(experiment.own_splits)  # the others were cut
    test = result.predictions(experiment.splits)
    scores = score_run(result.kept, test, result.threshold)
    recipe = describe_recipe(result) | describe_test_view(data_args.test_view)
    of_training: dict[str, Any] = {
        "learning_curve": result.probe.learning_curve,
        "groups": result.probe.inflation,
        "race": {
            "probe": probe and {"loss": probe.loss, "accuracy": probe.validation["accuracy"]},
            "heats": [heat._asdict() for heat in outcome.heats],
            "loss": loss_in_words(result.course.judge),
            "ended": outcome.ended,
        },
        "refit": {**plan._asdict(), "done": plan.done, "of_fold": "train" not in experiment.splits},
        "history": outcome.winner.state.log_history if outcome.winner else [],
        "augmentation": result.augmentation if outcome.winner else None,
        "base_model": _name_on_hub(experiment.model),
    }
    return collect_metrics(
        test, scores, data, experiment.setup | recipe, experiment.findings, {**of_training, **record},
        result.probe.scores,
    )  # fmt: skip


def collect_metrics(
    test: TestPredictions,
    scores: Mapping,
    data: Mapping,
    recipe: Mapping[str, str],
    findings: Mapping,
    record: Mapping,
    probe: Mapping | None = None,
) -> dict:
    """Return what `metrics.json` holds, without the seconds.

    Args:
        test: what the model predicts.
        scores: of that, by `selection.score_run` or `selection.score_test`.
        data: of `description.describe`.
        recipe: of `console.describe_setup` and `console.describe_recipe`.
        findings: of `audit.audit_images`.
        record: `command`, the command line, and `settings`, the digest of the options; of training also what replaces
            `NOT_TRAINED`, and the random seeds.
        probe: the scores of the linear probe, which is compared with; None where the model has none.
    """
    shares = test.class_shares
    return {
        **scores,
        "baselines": {"majority": majority_baseline(data, test)} | ({"linear_probe": probe} if probe else {}),
        "class_shares": None if shares is None else list(map(float, shares)),
        "data": data,
        "recipe": recipe,
        **NOT_TRAINED,
        "audit": {kind: None if findings[kind] is None else len(findings[kind]) for kind in KINDS},
        "leaks": findings["leaks"] | {"learned_from": findings["learned_from"]},
        "versions": _versions(),
        **record,
    }


def write_run(
    output_dir: Path,
    experiment: Experiment,
    result: Result,
    refitted: Refitted | None,
    metrics: dict,
    data_args: DataArguments,
    stopwatch: Stopwatch,
) -> None:
    """Save the model of a run, write its files, and say its score.

    Args:
        output_dir: of the run.
        experiment, result: of the run.
        refitted: what is shipped; None where that is the scored model.
        metrics: of `collect_run`.
        data_args: of the run.
        stopwatch: of the run.
    """
    splits = experiment.splits
    save_models(output_dir, experiment, result, refitted)
    learned = set(result.learned_from)  # in cross-validation, by the weights of one fold
    unseen = [digest[:DIGEST] for digest in list_of(splits["test"], "digest") if digest not in learned]
    text = json.dumps({"options": data_args.for_later(output_dir), "test": unseen}, indent=1)
    (output_dir / IMAGES).write_text(f"{text}\n", encoding="utf-8")
    write_results(output_dir, metrics, result.predictions(splits), experiment.findings, stopwatch)
    # The card says that the run has ended: after a power cut it must not be there without the rest.
    for path in (*output_dir.iterdir(), *output_dir.glob(f"{SCORED}/*")):
        if path.is_file() and is_of_run(path):
            sync(path)
    write_model_card(output_dir, metrics)
    say_results(output_dir, metrics)


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
    write_metrics(output_dir / METRICS, metrics)  # first: the rest can be made again
    write_predictions(output_dir / PREDICTIONS, metrics["data"]["labels"], test)
    write_audit(output_dir / AUDIT, findings)
    write_report(output_dir, metrics, findings, test)
    stopwatch.end("save")
    metrics["seconds"] = {**stopwatch.seconds, "total": round(sum(stopwatch.seconds.values()), 3)}
    write_metrics(output_dir / METRICS, metrics)


def save_models(output_dir: Path, experiment: Experiment, result: Result, refitted: Refitted | None) -> None:
    """Save the shipped model, and the scored one beside it where that is another.

    Beside each is `LEARNED_FROM`, which names the images that it has learned from. For the scored model it also names
    those of validation, in cross-validation those of its fold. What an earlier part of the run has made of other
    weights is removed.

    Args:
        output_dir: of the run; the scored model goes to `SCORED` in it.
        experiment: of the run.
        result: has the model that was scored.
        refitted: the model that is shipped; None where that is the scored one.
    """
    splits = experiment.splits

    def save(model: PreTrainedModel, familiarity: Familiarity | None, digests: Sequence[str], folder: Path) -> None:
        short = sorted({digest[:DIGEST] for digest in digests})
        folder.mkdir(exist_ok=True)
        (folder / LEARNED_FROM).write_text("\n".join(short) + "\n", encoding="utf-8")  # before there are weights
        describe_in_config(model, familiarity)
        save_model(model, experiment.view.image_processor, folder)
        save_bank(folder, familiarity)
        copy_permissions_to_weights(folder / CONFIG)

    mark_unfinished(output_dir)
    if (output_dir / ONNX).is_dir():
        say("removed", f"{output_dir / ONNX}: exports of the earlier weights")
    for name in (SCORED, ONNX):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (EXPORTS, ROWS, *FIGURES):
        (output_dir / name).unlink(missing_ok=True)
    scored = (result.model, result.answers.familiarity, [*result.learned_from, *result.chosen_by])
    save(*scored, output_dir / SCORED if refitted else output_dir)
    if refitted:
        model, familiarity, learned_from = refitted
        digests = [digest for split in learned_from for digest in list_of(splits[split], "digest")]
        save(model, familiarity, digests, output_dir)


def warn_if_learned(model_name: str, splits: Mapping[str, Dataset]) -> dict[str, int]:
    """Say and return how many of the images that are to judge a model are known to it, as far as is known.

    These are the files that it has learned from, or that have chosen its weights.

    Args:
        model_name: where the model comes from; a folder may know.
        splits: all but train judge.

    Returns `learned_from`, how many these are, and `learned_in_test`, how many of them are in test.
    """
    path = Path(model_name) / LEARNED_FROM
    known = set(path.read_text(encoding="utf-8").split()) if path.is_file() else set()
    judges = {split: list_of(dataset, "digest") for split, dataset in splits.items() if split != "train"}
    counts = {split: sum(digest[:DIGEST] in known for digest in digests) for split, digests in judges.items()}
    learned = sum(counts.values())
    if learned:
        images = f"{learned:,} of {plural(sum(map(len, judges.values())), 'test or validation image')}"
        say("careful", f"{model_name} has learned from, or was chosen by, {images}: its score means little")
    return {"learned_from": learned, "learned_in_test": counts["test"]}


def write_metrics(path: Path, metrics: Mapping) -> None:
    """Write `metrics.json`; what is not a number, after a run that diverged, is null."""
    plain = json.loads(json.dumps(metrics), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    # A list of numbers is one line, such as a row of the confusion matrix. No text in quotes holds such a line break.
    text = re.sub(r"\[\n([-+\s\d.,eE]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def write_audit(path: Path, findings: Mapping) -> None:
    """Write `audit.json`."""
    with path.open("w", encoding="utf-8") as file:  # in pieces: there may be a finding for each of many images
        json.dump(findings, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_predictions(path: Path, labels: list[str], test: TestPredictions) -> None:
    """Write `predictions.csv`, a row for each test image: its name and digest, its class, the prediction.

    Where there are groups, a column has the number of the image's; where there are images of none of the classes, a
    column has 1 for them, and 0 for the others.
    """
    extra: dict[str, np.ndarray] = {}  # columns
    if test.groups is not None:
        extra["group"] = test.groups
    if test.none is not None:
        extra["none"] = (test.references == test.none).astype(int)
    images = test.splits["test"]
    rows = zip(list_of(images, "name"), list_of(images, "digest"), test.references, *test.likeliest(), strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        header = ["name", "digest", "label", "predicted", "confidence", "probability_of_label"]
        table.writerow([*header, *extra])
        for number, (name, digest, label, predicted, confidence, of_label) in enumerate(rows):
            words = [escape_cell(word) for word in (name, digest, labels[label], labels[predicted])]
            rest = [column[number] for column in extra.values()]
            table.writerow([*words, f"{confidence:.6f}", f"{of_label:.6f}", *rest])


def _name_on_hub(model: PreTrainedModel) -> str | None:
    """Return the name on the Hub of the model that training began with; None of a built-in one or of a folder."""
    name = str(model.config.name_or_path or "")
    return name if name.count("/") == 1 and not Path(name).exists() else None


def _versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
