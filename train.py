"""Fine-tune an image classifier: arguments -> data -> model -> probe -> Trainer -> evaluate -> report."""

import sys
import time

from arguments import DataArguments, ModelArguments, parse_arguments, settings_digest, user_errors

START = time.perf_counter()
if __name__ == "__main__":
    with user_errors():
        parse_arguments(sys.argv[1:])  # --help and mistakes are answered before the imports below, which take seconds

import importlib.metadata
import os
import platform
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

import audit
from data import collate, describe, load_splits, prepare, with_views
from learning_curve import in_words, learning_curve
from machine import fit_machine, quiet_libraries
from metrics import build_compute_metrics, fit_temperature, logits_of, reliability, score, wilson_interval
from models import build_model, divide_logits, freeze, linear_head, parameter_groups
from openmoji import ATTRIBUTION
from probe import LinearProbe, build_probe, load_features
from recipe import FROM_SCRATCH, RECIPES, Recipe, blend, choose_recipe
from report import write_metrics, write_model_card, write_predictions, write_report
from terminal import EpochTable, ProgressBar, Stopwatch, percent_with_interval, say
from views import EvaluationView

KEPT = {0.0: "the probe", 0.5: "the mean of both", 1.0: "the trained weights"}  # by recipe.Recipe.kept


def main(argv: list[str] | None = None) -> None:
    """Run one experiment; see `python train.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    clock = Stopwatch(START)
    quiet_libraries()
    with user_errors():
        data_args, model_args, training_args = parse_arguments(argv)
        fit_machine(training_args)
        with training_args.main_process_first(desc="looking through the pictures"):
            pictures, bad = load_splits(**data_args.for_loading())
        labels = pictures["train"].features["label"].names
        set_seed(training_args.seed)  # decides the new head's first weights
        model, image_processor = build_model(model_args.model_name, dict(enumerate(labels)), model_args.image_size)
        name, recipe = settle_recipe(model_args, training_args, model, len(pictures["train"]))
        view = EvaluationView(image_processor)
        clock.stop("load")

        with training_args.main_process_first(desc="preparing the pictures"):
            splits = prepare(pictures, view)
        data = describe(splits)
        clock.stop("prepare")
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        views = with_views(splits, view, data_args.augmentation, data_args.test_view)
        trainer = build_trainer(model, recipe, training_args, views, labels)
    trainer.add_callback(clock)
    summary = summarise(data_args, model_args, trainer, name or "from scratch", view)
    say_data(training_args, data_args.name, data)
    for line in ("model", "device"):
        say(training_args, line, summary[line])

    found = audit.audit(pictures, bad)
    baselines = {"majority": majority_baseline(data["splits"])}
    start = curve = None
    if name and linear_head(model):
        start, probe, features = start_from_probe(trainer, splits, view, labels)
        if trainer.is_world_process_zero():
            scored = {s: score_probe(probe, features, splits, s, labels) for s in ("validation", "test")}
            baselines["linear_probe"] = scored | {"strength": probe.strength}
            found["suspect_labels"] = audit.suspect_labels(
                pictures, torch.cat(list(features.values())), probe.strength
            )
            if data_args.learning_curve:
                with user_errors():
                    curve = measure_learning_curve(pictures, features, probe, labels, training_args.device)
                say(training_args, "curve", in_words(curve))
        clock.stop("features")
    elif data_args.learning_curve:
        say(training_args, "curve", "not estimated: this model has no linear probe")
    say_audit(training_args, found)
    if name in ("probe", "lp_ft"):
        model.load_state_dict(start)
    say(training_args, "recipe", summary["recipe"])
    if name != "probe":
        set_seed(training_args.seed)  # whether the features came from the cache or not
        train(trainer)
    kept = keep_best(trainer, start, recipe.kept if model_args.keep == "best" else recipe.kept[-1:], labels)
    logits, references = predict(trainer, views["test"])
    clock.stop("evaluate")

    if trainer.is_world_process_zero():
        before = {"validation": kept.uncalibrated, "test": score(logits * kept.temperature, references, labels)}
        metrics = {
            "validation": kept.validation,
            "test": score(logits, references, labels),
            "calibration": {
                "temperature": kept.temperature,
                "before": {s: {key: scored[key] for key in ("log_loss", "ece")} for s, scored in before.items()},
                "reliability": reliability(logits, references),
            },
            "baselines": baselines,
            "learning_curve": curve,
            "audit": {kind: None if found[kind] is None else len(found[kind]) for kind in audit.KINDS},
            "seconds": clock.seconds,
            "data": {"name": data_args.name, "attribution": attribution(data_args), **data},
            "recipe": {**summary, "kept": kept.words},
            "history": trainer.state.log_history,
            "versions": versions(),
            "seeds": {"seed": training_args.seed, "split_seed": data_args.split_seed, "fold": data_args.fold},
            "command": command(argv),
            "settings": settings_digest(argv),
        }
        save(trainer, image_processor, metrics, Test(pictures, logits, references), found, clock)


def settle_recipe(
    model_args: ModelArguments, training_args: TrainingArguments, model: PreTrainedModel, images: int
) -> tuple[str | None, Recipe]:
    """Return the recipe's name, None from scratch, and what it fixes; freeze, and fill in what the user left open."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    probed = linear_head(model) is not None
    name = choose_recipe(model_args.recipe, model_args.model_name, probed, parameters, images)
    recipe = RECIPES[name] if name else FROM_SCRATCH
    freeze(model, recipe.frozen)
    if training_args.learning_rate is None:
        training_args.learning_rate = recipe.learning_rate
    if training_args.num_train_epochs is None:
        training_args.num_train_epochs = recipe.num_train_epochs
    return name, recipe


def build_trainer(
    model: PreTrainedModel, recipe: Recipe, training_args: TrainingArguments, splits: DatasetDict, labels: list[str]
) -> Trainer:
    """Return the plain Trainer; Luthier's are only the learning rates of the layers, and the printed table."""
    rate = training_args.learning_rate
    groups = parameter_groups(model, rate, rate * recipe.backbone, recipe.layer_decay, training_args.weight_decay)
    optimizer_class, optimizer_kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    try:
        trainer = Trainer(
            model=model,
            args=training_args,
            data_collator=collate,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=build_compute_metrics(labels),
            optimizer_cls_and_kwargs=(optimizer_class, {**optimizer_kwargs, "params": groups}),
        )
    except (ImportError, RuntimeError) as error:  # a tracker or an optimizer that is not installed
        raise ValueError(str(error)) from error
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(EpochTable)
    if not training_args.disable_tqdm:
        trainer.add_callback(ProgressBar)
    return trainer


def start_from_probe(
    trainer: Trainer, splits: DatasetDict, view: EvaluationView, labels: list[str]
) -> tuple[dict[str, torch.Tensor], LinearProbe, dict[str, torch.Tensor | None]]:
    """Fit the linear probe; return the model's state with the probe as its head, the probe, and all features."""
    model, head = trainer.model, linear_head(trainer.model)
    with user_errors():
        probe, features = build_probe(trainer, head, splits, view)
        if trainer.is_world_process_zero():
            found = score_probe(probe, features, splits, "validation", labels)
            line = f"validation {found['accuracy']:.1%}, loss {found['log_loss']:.3f}"
            say(trainer.args, "probe", f"{line}: a logistic regression on frozen features")
        features["test"] = load_features(trainer, head, splits["test"], view)  # for the audit, and the baseline
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start |= {name: tensor.to(model.device) for name, tensor in probe.as_head(head).items()}
    return start, probe, features


def score_probe(
    probe: LinearProbe, features: dict[str, torch.Tensor], splits: DatasetDict, split: str, labels: list[str]
) -> dict:
    """Return the probe's score on a split, calibrated on validation as every model is."""
    truth = {name: np.array(splits[name]["label"][:]) for name in ("validation", split)}
    temperature = fit_temperature(probe.logits(features["validation"]).numpy(), truth["validation"])
    return score(probe.logits(features[split]).numpy() / temperature, truth[split], labels)


def measure_learning_curve(
    pictures: DatasetDict,
    features: dict[str, torch.Tensor],
    probe: LinearProbe,
    labels: list[str],
    device: torch.device,
) -> dict:
    """Return the learning curve of the probe on train and validation; test is not looked at."""
    both = ("train", "validation")
    truth, groups = (np.concatenate([pictures[split][key][:] for split in both]) for key in ("label", "group"))
    pool = torch.cat([features[split] for split in both]).to(device)
    return learning_curve(pool, truth, labels, groups, probe.strength, len(pictures["train"]))


def train(trainer: Trainer) -> None:
    """Train, from a checkpoint on if one is given, and leave the model as it was after its best epoch."""
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint:
        load_weights(trainer.model, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.free_memory()  # its data workers too
    if trainer.state.best_model_checkpoint:  # chosen on validation
        load_weights(trainer.model, trainer.state.best_model_checkpoint)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Put the weights of a checkpoint into the model, all of them.

    The Trainer's own loading, at a resume as for the best epoch, does not check the names, which for ViT and others
    leaves most of the weights as they were; `from_pretrained` renames what has to be renamed.
    """
    saved = type(model).from_pretrained(checkpoint)
    model.load_state_dict(saved.state_dict(), strict=True)


class Kept(NamedTuple):
    """The weights that a run ends with: what they are in words, their temperature, and their score on validation."""

    words: str
    temperature: float
    validation: dict
    uncalibrated: dict


def keep_best(
    trainer: Trainer, start: dict[str, torch.Tensor] | None, shares: tuple[float, ...], labels: list[str]
) -> Kept:
    """Leave the model with the weights, from the probe's to the trained ones, that are best on validation.

    Each is calibrated first, so that what is compared is what it tells and not how sure of it it is; the temperature
    is then folded into the head, and whoever loads the model gets calibrated probabilities.

    Args:
        trainer: holds the trained model, and the validation split.
        start: the state with the probe's weights; None where there is no probe to compare with.
        shares: the candidates; see `recipe.Recipe`.
        labels: the classes' names.
    """
    model = trainer.model
    end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {}
    for share in shares if start else (1.0,):
        model.load_state_dict(blend(start or end, end, share))
        logits, references = predict(trainer, trainer.eval_dataset)
        # Of another head than a linear one the probabilities stay as they are.
        temperature = fit_temperature(logits, references) if linear_head(model) else 1.0
        scores = (score(logits / divisor, references, labels) for divisor in (temperature, 1.0))
        found[share] = Kept(KEPT[share], temperature, *scores)
    best = min(found, key=lambda share: found[share].validation["log_loss"])
    model.load_state_dict(blend(start or end, end, best))
    divide_logits(model, found[best].temperature)
    if len(found) > 1:
        losses = ", ".join(f"{kept.words} {kept.validation['log_loss']:.3f}" for kept in found.values())
        say(trainer.args, "kept", f"{found[best].words}; validation loss: {losses}")
    return found[best]


def predict(trainer: Trainer, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's logits [N, C] on a split, and the true classes [N]."""
    prediction = trainer.predict(dataset)
    return logits_of(prediction), prediction.label_ids


def summarise(
    data_args: DataArguments, model_args: ModelArguments, trainer: Trainer, name: str, view: EvaluationView
) -> dict[str, str]:
    """Return what is trained, where and how, each in a line."""
    args, model = trainer.args, trainer.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    precision = {"no": "float32"}.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    workers = f", {args.dataloader_num_workers} data workers" if args.dataloader_num_workers else ""
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    share = "all trained" if trained == parameters else f"{trained:,} trained"
    height, width = view.size
    steps = f"{args.num_train_epochs:g} epochs, batch {batch}, {data_args.augmentation}, {args.optim.value}"
    return {
        "model": f"{Path(model_args.model_name).name} at {height} x {width} px, {parameters:,} parameters, {share}",
        "device": f"{device}{threads}{processes}{workers}, {precision}",
        "recipe": f"{name}: {steps} {args.learning_rate:g}, {args.lr_scheduler_type.value}"
        if name != "probe"
        else "probe: the logistic regression is the head",
    }


def attribution(data_args: DataArguments) -> str:
    """Return whom the pictures are by, where that must be said."""
    return ATTRIBUTION if data_args.dataset_name == "openmoji" else ""


def majority_baseline(counts: dict) -> dict:
    """Return what always answering the commonest training class scores on test."""
    label = max(counts["train"]["per_class"], key=counts["train"]["per_class"].get)
    hits, n = counts["test"]["per_class"][label], counts["test"]["n"]
    return {"label": label, "accuracy": hits / n, "accuracy_ci95": wilson_interval(hits, n), "n": n}


class Test(NamedTuple):
    """What the test was: all pictures, and the logits [N, C] and true classes [N] of the split "test"."""

    pictures: DatasetDict
    logits: np.ndarray
    references: np.ndarray


def save(
    trainer: Trainer,
    image_processor: transformers.BaseImageProcessor,
    metrics: dict,
    test: Test,
    found: dict,
    clock: Stopwatch,
) -> None:
    """Write the model and everything about it into the output directory, and say so."""
    output_dir = Path(trainer.args.output_dir)
    trainer.model.save_pretrained(output_dir)
    # Not save_pretrained, which does nothing for a timm model and would leave the folder without this file.
    image_processor.to_json_file(output_dir / "preprocessor_config.json")
    custom_code = (output_dir / "models.py").exists()
    write_metrics(output_dir / "metrics.json", metrics)  # first of all that is about it: the rest can be made again
    write_predictions(output_dir / "predictions.csv", metrics["data"]["labels"], *test)
    audit.write_audit(output_dir / "audit.json", found)
    write_report(output_dir, metrics, found, *test)
    write_model_card(output_dir / "README.md", metrics, custom_code)
    clock.stop("save")
    metrics["seconds"]["total"] = round(sum(metrics["seconds"].values()), 3)
    write_metrics(output_dir / "metrics.json", metrics)

    trust = ", trust_remote_code=True" if custom_code else ""
    majority, probe = metrics["baselines"]["majority"], metrics["baselines"].get("linear_probe")
    beside = f"; its probe {probe['test']['accuracy']:.1%}" if probe else ""
    say(trainer.args, "test", f"accuracy {percent_with_interval(metrics['test'])}")
    always = f"always {majority['label']!r} {majority['accuracy']:.1%}"
    say(trainer.args, "", f"macro F1 {metrics['test']['macro_f1']:.3f}{beside}; {always}")
    before = metrics["calibration"]["before"]["test"]["ece"]
    say(trainer.args, "", f"calibration error {metrics['test']['ece']:.1%}, uncalibrated {before:.1%}")
    total = metrics["seconds"].pop("total")
    parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items())
    say(trainer.args, "time", f"{parts}: {total:.0f} s")
    say(trainer.args, "saved", f"{output_dir}, with report.html to look at")
    say(trainer.args, "next", f'pipeline("image-classification", "{output_dir}"{trust})')


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def command(argv: list[str]) -> str:
    """Return the command line of this run; of paths that tell of a machine or a person the last part."""
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    words = (word.partition("=") if word.startswith("--") else ("", "", word) for word in argv)
    shown = [
        f"{key}{sign}{Path(value).name if value.startswith(('/', '~', '..')) else value}" for key, sign, value in words
    ]
    return shlex.join([*launcher, "train.py", *shown])


def say_data(training_args: TrainingArguments, name: str, data: dict) -> None:
    """Print what is learned from."""
    counts = ", ".join(f"{split} {count['n']:,}" for split, count in data["splits"].items())
    say(training_args, "data", f"{name}: {len(data['labels'])} classes, {counts} pictures")


def say_audit(training_args: TrainingArguments, found: dict) -> None:
    """Print what the audit found, and by name what costs pictures or spoils the score."""
    say(training_args, "audit", audit.in_words(found))
    for kind, word in (("unreadable", "left out"), ("between_splits", "careful")):
        for entry in found[kind][:3]:
            say(training_args, word, audit.as_line(entry))
        if len(found[kind]) > 3:
            say(training_args, "", f"and {len(found[kind]) - 3} more: see report.html")


if __name__ == "__main__":
    main()
