"""What a run says of itself, on the terminal and in `metrics.json`; apart from train.py, which is what it does."""

import importlib.metadata
import os
import platform
import shlex
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

import audit
from arguments import DataArguments, ModelArguments
from metrics import wilson_interval
from openmoji import ATTRIBUTION
from terminal import say
from views import EvaluationView

FOLDERS = ("data_dir", "output_dir", "resume_from_checkpoint")


def summarise(
    data_args: DataArguments, model_args: ModelArguments, trainer: Trainer, name: str | None, view: EvaluationView
) -> dict[str, str]:
    """Return what is trained, where and how, each in a line; `name` is the recipe's, None if nothing is trained."""
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
    model_name = f"{Path(model_args.model_name).name} at {height} x {width} px, {parameters:,} parameters"
    machine = f"{device}{threads}{processes}{workers}, {precision}"
    if name is None:
        return {"model": model_name, "device": machine, "recipe": "nothing trained"}
    recipe = "probe: the logistic regression is the head"
    if name != "probe":
        steps = f"{args.num_train_epochs:g} epochs, batch {batch}, {data_args.augmentation}, {args.optim.value}"
        recipe = f"{name}: {steps} {args.learning_rate:g}, {args.lr_scheduler_type.value}"
    return {"model": f"{model_name}, {share}", "device": machine, "recipe": recipe}


def attribution(data_args: DataArguments) -> str:
    """Return whom the pictures are by, where that must be said."""
    return ATTRIBUTION if data_args.dataset_name == "openmoji" else ""


def majority_baseline(learned: dict, tested: dict) -> dict:
    """Return what always answering the commonest class of what was learned from scores on what is tested."""
    label = max(learned["per_class"], key=learned["per_class"].get)
    hits, n = tested["per_class"][label], tested["n"]
    return {"label": label, "accuracy": hits / n, "accuracy_ci95": wilson_interval(hits, n), "n": n}


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def command(argv: list[str]) -> str:
    """Return the command line of this run; of paths, which tell of a machine or a person, the last part."""
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    shown, option = [], ""
    for word in argv:
        key, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = key.lstrip("-").replace("-", "_") if key else option
        path = option in FOLDERS or value.startswith(("/", "~", "..")) or ("/" in value and Path(value).exists())
        shown.append(f"{key}{sign}{'{...}' if value.startswith('{') else Path(value).name if path else value}")
        option = "" if value else option
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
