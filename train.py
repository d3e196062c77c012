"""Fine-tune an image classifier: arguments -> data -> model -> Trainer -> evaluate -> report."""

import importlib.metadata
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from datasets import DatasetDict
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from arguments import DataArguments, ModelArguments, parse_arguments
from data import collate, describe, load_splits, prepare, with_views
from metrics import build_compute_metrics, predicted_classes, score, wilson_interval
from models import build_model, parameter_groups
from openmoji import ATTRIBUTION
from report import (
    EpochTable,
    ProgressBar,
    percent_with_interval,
    plot_confusion_matrix,
    plot_curves,
    write_metrics,
    write_model_card,
)

BACKBONE_LR_FACTOR = 0.1  # a pretrained backbone learns at a tenth of the rate of its new head


def main(argv: list[str] | None = None) -> None:
    """Run one experiment; see `python train.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    seconds = Stopwatch()
    quiet_libraries()
    with user_errors():
        data_args, model_args, training_args = parse_arguments(argv)
        fit_machine(training_args)
        with training_args.main_process_first(desc="preparing the pictures"):
            splits = prepare(load_data(data_args))
        data = describe(splits)
        labels = data["labels"]
        say(training_args, "data", f"{data_args.name}: {len(labels)} classes, {in_words(data['splits'])}")
        for split, leaked in data["also_in_train"].items():
            if leaked:
                say(training_args, "careful", f"{split} pictures that are in train too, byte for byte: {leaked}")
        seconds.stop("data")

        set_seed(training_args.seed)  # decides the new head's first weights
        model, image_processor = build_model(
            model_args.model_name, dict(enumerate(labels)), model_args.image_size, model_args.freeze_backbone
        )
        splits = with_views(splits, image_processor, data_args.augmentation)
        Path(training_args.output_dir).mkdir(parents=True, exist_ok=True)
        trainer = build_trainer(model, model_args, training_args, splits, labels)
    recipe = describe_recipe(data_args, model_args, trainer, splits)
    for line in ("model", "device", "recipe"):
        say(training_args, line, recipe[line])
    seconds.stop("model")

    if training_args.resume_from_checkpoint:
        load_weights(model, training_args.resume_from_checkpoint)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.state.best_model_checkpoint:  # chosen on validation
        load_weights(model, trainer.state.best_model_checkpoint)
    seconds.stop("train")

    scores = {}
    for split in ("validation", "test"):
        prediction = trainer.predict(splits[split], metric_key_prefix=split)
        scores[split] = score(predicted_classes(prediction.predictions), prediction.label_ids, labels)
    seconds.stop("evaluate")

    if trainer.is_world_process_zero():
        attribution = ATTRIBUTION if data_args.dataset_name == "openmoji" else ""
        metrics = {
            **scores,
            "baselines": {"majority": majority_baseline(data["splits"])},
            "seconds": seconds.total,
            "data": {"name": data_args.name, "attribution": attribution, **data},
            "recipe": recipe,
            "history": trainer.state.log_history,
            "versions": versions(),
            "seeds": {"seed": training_args.seed, "split_seed": data_args.split_seed},
            "command": command(argv),
        }
        save(trainer, image_processor, metrics, seconds)


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


def build_trainer(
    model: PreTrainedModel,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    splits: DatasetDict,
    labels: list[str],
) -> Trainer:
    """Return the plain Trainer; Luthier's are only the learning rates of head and backbone, and the printed table."""
    factor = 1 if model_args.model_name == "simple_cnn" else BACKBONE_LR_FACTOR
    rate = training_args.learning_rate
    groups = parameter_groups(model, rate, rate * factor, training_args.weight_decay)
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


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Put the weights of a checkpoint into the model, all of them.

    The Trainer's own loading, at a resume as for the best epoch, does not check the names, which for ViT and others
    leaves most of the weights as they were; `from_pretrained` renames what has to be renamed.
    """
    saved = type(model).from_pretrained(checkpoint)
    model.load_state_dict(saved.state_dict(), strict=True)


def describe_recipe(
    data_args: DataArguments, model_args: ModelArguments, trainer: Trainer, splits: DatasetDict
) -> dict[str, str]:
    """Return what is trained, where and how, each in a line."""
    args, model = trainer.args, trainer.model
    height, width = splits["validation"][0]["pixel_values"].shape[-2:]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    precision = {"no": "float32"}.get(trainer.accelerator.mixed_precision, trainer.accelerator.mixed_precision)
    threads = f", {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    processes = f", {args.world_size} processes" if args.world_size > 1 else ""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    share = "all trained" if trained == parameters else f"{trained:,} trained"
    return {
        "model": f"{Path(model_args.model_name).name} at {height} x {width} px, {parameters:,} parameters, {share}",
        "device": f"{device}{threads}{processes}, {precision}",
        "recipe": f"{args.num_train_epochs:g} epochs, batch {batch}, {data_args.augmentation}, "
        f"{args.optim.value} {args.learning_rate:g}, {args.lr_scheduler_type.value}",
    }


def majority_baseline(counts: dict) -> dict:
    """Return what always answering the commonest training class scores on test."""
    label = max(counts["train"]["per_class"], key=counts["train"]["per_class"].get)
    hits, n = counts["test"]["per_class"][label], counts["test"]["n"]
    return {"label": label, "accuracy": hits / n, "accuracy_ci95": wilson_interval(hits, n), "n": n}


def save(
    trainer: Trainer, image_processor: transformers.BaseImageProcessor, metrics: dict, seconds: "Stopwatch"
) -> None:
    """Write the model and everything about it into the output directory, and say so."""
    output_dir = Path(trainer.args.output_dir)
    trainer.model.save_pretrained(output_dir)
    # Not save_pretrained, which does nothing for a timm model and would leave the folder without this file.
    image_processor.to_json_file(output_dir / "preprocessor_config.json")
    plot_confusion_matrix(metrics["test"], metrics["data"]["labels"], output_dir / "confusion_matrix.png")
    plot_curves(metrics["history"], output_dir / "curves.png")
    custom_code = (output_dir / "models.py").exists()
    write_model_card(output_dir / "README.md", metrics, custom_code)
    seconds.stop("save")
    metrics["seconds"]["total"] = sum(metrics["seconds"].values())
    write_metrics(output_dir / "metrics.json", metrics)

    majority = metrics["baselines"]["majority"]
    trust = ", trust_remote_code=True" if custom_code else ""
    say(trainer.args, "test", f"accuracy {percent_with_interval(metrics['test'])}")
    always = f"always {majority['label']!r}: {majority['accuracy']:.1%}"
    say(trainer.args, "", f"macro F1 {metrics['test']['macro_f1']:.3f}; {always}")
    say(trainer.args, "saved", f"{output_dir} after {metrics['seconds']['total']:.0f} s, with a README.md")
    say(trainer.args, "next", f'pipeline("image-classification", "{output_dir}"{trust})')


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("torch", "torchvision", "transformers", "timm", "datasets", "evaluate", "accelerate")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def command(argv: list[str]) -> str:
    """Return the command line of this run."""
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    return shlex.join([*launcher, "train.py", *argv])


def in_words(counts: dict) -> str:
    """Return the pictures of each split: `train 732, validation 104, test 209 pictures`."""
    return ", ".join(f"{split} {count['n']:,}" for split, count in counts.items()) + " pictures"


class Stopwatch:
    """Seconds by stage, each from the end of the one before."""

    def __init__(self):
        self.total = {}
        self.last = time.perf_counter()

    def stop(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.total[stage] = round(now - self.last, 2)
        self.last = now


@contextmanager
def user_errors() -> Iterator[None]:
    """End with one message and exit code 2 where the user can mend it; `python -X dev` shows the traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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
    """Use what this machine has, where the libraries' defaults do not."""
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # serves copies to a GPU
        # `accelerate launch` sets OMP_NUM_THREADS=1 where nobody told it that this is a CPU machine.
        if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // training_args.world_size))


if __name__ == "__main__":
    main()
