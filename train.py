"""Fine-tune an image classifier: arguments -> data -> model -> probe -> Trainer -> evaluate -> report."""

import sys
import time

from arguments import DataArguments, ModelArguments, cores_of_process, parse_arguments, user_errors

START = time.perf_counter()
if __name__ == "__main__":
    with user_errors():
        parse_arguments(sys.argv[1:])  # --help and mistakes are answered before the imports below, which take seconds

import ctypes
import importlib.metadata
import logging
import os
import platform
import shlex
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from data import collate, describe, load_splits, prepare, with_views
from metrics import build_compute_metrics, logits_of, score, wilson_interval
from models import build_model, freeze, linear_head, parameter_groups
from openmoji import ATTRIBUTION
from probe import build_probe
from recipe import FROM_SCRATCH, RECIPES, Recipe, blend, choose_recipe
from report import (
    EpochTable,
    ProgressBar,
    percent_with_interval,
    plot_confusion_matrix,
    plot_curves,
    write_metrics,
    write_model_card,
)
from views import EvaluationView

KEPT = {0.0: "the probe", 0.5: "the mean of both", 1.0: "the trained weights"}  # by recipe.Recipe.kept


def main(argv: list[str] | None = None) -> None:
    """Run one experiment; see `python train.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    clock = Stopwatch()
    quiet_libraries()
    with user_errors():
        data_args, model_args, training_args = parse_arguments(argv)
        fit_machine(training_args)
        splits = load_data(data_args)
        labels = splits["train"].features["label"].names
        set_seed(training_args.seed)  # decides the new head's first weights
        model, image_processor = build_model(model_args.model_name, dict(enumerate(labels)), model_args.image_size)
        name, recipe = settle_recipe(model_args, training_args, model, len(splits["train"]))
        view = EvaluationView(image_processor)
        clock.stop("load")

        with training_args.main_process_first(desc="preparing the pictures"):
            splits = prepare(splits, view)
        data = describe(splits)
        clock.stop("prepare")
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        views = with_views(splits, view, data_args.augmentation)
        trainer = build_trainer(model, recipe, training_args, views, labels)
    trainer.add_callback(clock)
    summary = summarise(data_args, model_args, trainer, name or "from scratch", view)
    say_data(training_args, data_args.name, data)
    for line in ("model", "device"):
        say(training_args, line, summary[line])

    baselines = {"majority": majority_baseline(data["splits"])}
    start = None
    if name and linear_head(model):
        start, baselines["linear_probe"] = start_from_probe(trainer, splits, view, labels)
        clock.stop("features")
    if name in ("probe", "lp_ft"):
        model.load_state_dict(start)
    say(training_args, "recipe", summary["recipe"])
    if name != "probe":
        set_seed(training_args.seed)  # whether the features came from the cache or not
        train(trainer)
    best, kept, validation = keep_best(trainer, start, recipe.kept, labels)
    if start and best is not start:
        baselines["linear_probe"]["test"] = evaluate(trainer, start, views["test"], labels)
    test = evaluate(trainer, best, views["test"], labels)
    if best is start:
        baselines["linear_probe"]["test"] = test
    clock.stop("evaluate")

    if trainer.is_world_process_zero():
        attribution = ATTRIBUTION if data_args.dataset_name == "openmoji" else ""
        metrics = {
            "validation": validation,
            "test": test,
            "baselines": baselines,
            "seconds": clock.seconds,
            "data": {"name": data_args.name, "attribution": attribution, **data},
            "recipe": {**summary, "kept": kept},
            "history": trainer.state.log_history,
            "versions": versions(),
            "seeds": {"seed": training_args.seed, "split_seed": data_args.split_seed},
            "command": command(argv),
        }
        save(trainer, image_processor, metrics, clock)


def load_data(data_args: DataArguments) -> DatasetDict:
    """Return the splits that the arguments ask for."""
    return load_splits(
        data_args.data_dir,
        data_args.dataset_name,
        data_args.dataset_config_name,
        data_args.image_column,
        data_args.label_column,
        data_args.label_names,
        data_args.split_seed,
        data_args.validation_fraction,
        data_args.test_fraction,
    )


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
) -> tuple[dict[str, torch.Tensor], dict]:
    """Fit the linear probe; return the model's state with the probe as its head, and its score on validation."""
    model, head = trainer.model, linear_head(trainer.model)
    with user_errors():
        probe, logits = build_probe(trainer, head, splits, view)
    found = score(logits.numpy(), np.array(splits["validation"]["label"][:]), labels)
    line = f"validation {found['accuracy']:.1%}, loss {found['log_loss']:.3f}"
    say(trainer.args, "probe", f"{line}: a logistic regression on frozen features")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start |= {name: tensor.to(model.device) for name, tensor in probe.as_head(head).items()}
    return start, {"validation": found, "strength": probe.strength}


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


def keep_best(
    trainer: Trainer, start: dict[str, torch.Tensor] | None, shares: tuple[float, ...], labels: list[str]
) -> tuple[dict[str, torch.Tensor], str, dict]:
    """Return the weights, from the probe's to the trained ones, that lose least on validation.

    Args:
        trainer: holds the trained model, and the validation split.
        start: the state with the probe's weights; None where there is no probe to compare with.
        shares: the candidates; see `recipe.Recipe`.
        labels: the classes' names.

    Returns their state (`start` itself where it is the best), what they are in words, and their score on validation.
    """
    end = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    states = {share: blend(start or end, end, share) for share in (shares if start else (1.0,))}
    found = {share: evaluate(trainer, state, trainer.eval_dataset, labels) for share, state in states.items()}
    best = min(found, key=lambda share: found[share]["log_loss"])
    if len(found) > 1:
        losses = ", ".join(f"{KEPT[share]} {found[share]['log_loss']:.3f}" for share in found)
        say(trainer.args, "kept", f"{KEPT[best]}; validation loss: {losses}")
    return states[best], KEPT[best], found[best]


def evaluate(trainer: Trainer, state: dict[str, torch.Tensor], dataset: Dataset, labels: list[str]) -> dict:
    """Put these weights into the model and score them on a split."""
    trainer.model.load_state_dict(state)
    prediction = trainer.predict(dataset)
    return score(logits_of(prediction), prediction.label_ids, labels)


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


def majority_baseline(counts: dict) -> dict:
    """Return what always answering the commonest training class scores on test."""
    label = max(counts["train"]["per_class"], key=counts["train"]["per_class"].get)
    hits, n = counts["test"]["per_class"][label], counts["test"]["n"]
    return {"label": label, "accuracy": hits / n, "accuracy_ci95": wilson_interval(hits, n), "n": n}


def save(
    trainer: Trainer, image_processor: transformers.BaseImageProcessor, metrics: dict, clock: "Stopwatch"
) -> None:
    """Write the model and everything about it into the output directory, and say so."""
    output_dir = Path(trainer.args.output_dir)
    trainer.model.save_pretrained(output_dir)
    # Not save_pretrained, which does nothing for a timm model and would leave the folder without this file.
    image_processor.to_json_file(output_dir / "preprocessor_config.json")
    plot_confusion_matrix(metrics["test"], metrics["data"]["labels"], output_dir / "confusion_matrix.png")
    if any("eval_loss" in entry for entry in metrics["history"]):
        plot_curves(metrics["history"], output_dir / "curves.png")
    custom_code = (output_dir / "models.py").exists()
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
    total = metrics["seconds"].pop("total")
    parts = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in metrics["seconds"].items())
    say(trainer.args, "time", f"{parts}: {total:.0f} s")
    say(trainer.args, "saved", f"{output_dir}, with a README.md")
    say(trainer.args, "next", f'pipeline("image-classification", "{output_dir}"{trust})')


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def command(argv: list[str]) -> str:
    """Return the command line of this run."""
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    return shlex.join([*launcher, "train.py", *argv])


def say_data(training_args: TrainingArguments, name: str, data: dict) -> None:
    """Print what is learned from, and what would spoil the score."""
    counts = ", ".join(f"{split} {count['n']:,}" for split, count in data["splits"].items())
    say(training_args, "data", f"{name}: {len(data['labels'])} classes, {counts} pictures")
    for split, leaked in data["also_in_train"].items():
        if leaked:
            say(training_args, "careful", f"{split} pictures that are in train too, byte for byte: {leaked}")


class Stopwatch(TrainerCallback):
    """Seconds by stage, each counted from the end of the one before; as a callback it splits the training loop.

    On a GPU the host runs ahead of the device: "data" is what the device waited for at most, and "train" holds the
    rest of the loop.
    """

    def __init__(self):
        self.seconds = {}
        self.last = START
        self.stop("start")

    def stop(self, stage: str) -> None:
        """End a stage, or one more part of it."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self.last, 3)
        self.last = now

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop("train")

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop("data")

    def on_step_end(self, args, state, control, **kwargs):
        self.stop("train")

    def on_evaluate(self, args, state, control, **kwargs):
        self.stop("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self.stop("save")


def say(training_args: TrainingArguments, what: str, line: str) -> None:
    """Print one of the run's few lines, once, whatever the number of processes."""
    if training_args.process_index == 0:
        print(f"{what:<9}{line}", flush=True)


def quiet_libraries() -> None:
    """Let the libraries report what a user can act on, and nothing of their own housekeeping."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()  # of loading and writing single files
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry of a connection; the last one is told
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # checkpoints less than a second apart


def fit_machine(training_args: TrainingArguments) -> None:
    """Use all cores of a machine without a GPU, and let it keep its memory."""
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # serves copies to a GPU
        # `accelerate launch` sets OMP_NUM_THREADS=1 where nobody told it that this is a CPU machine.
        if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(cores_of_process())
        if platform.libc_ver()[0] == "glibc":
            # glibc gives every large tensor back to the system when it is freed, and gets the next one page by page:
            # with these two settings (as mallopt(3) numbers them) it keeps them, and inference is up to twice as fast.
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc = ctypes.CDLL(None)
            if libc.mallopt(m_mmap_threshold, 2**30) or libc.mallopt(m_mmap_threshold, 2**25):  # before 2.35 no more
                libc.mallopt(m_trim_threshold, 2**31 - 1)


if __name__ == "__main__":
    main()
