"""What options cannot mean, by themselves or together; each error names the remedy."""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path

from luthier.errors import UserError, require
from luthier.files import expand_home
from luthier.options import BUILT_IN_DATASET, EXPORT_PACKAGES, OWN, check_fraction, parse_part

# Options of the library that would distort the score, do nothing, or harm a run.
REFUSED = {
    "dataloader_drop_last": "would leave images out of every score",
    "bf16_full_eval": "would round the weights before they are trained",
    "fp16_full_eval": "would round the weights before they are trained",
    "prediction_loss_only": "leaves no predictions to score",
    "batch_eval_metrics": "scores each batch alone, but the report needs all predictions",
    "hub_always_push": "pushes while training, where Luthier pushes the finished model",
    "save_only_model": "would keep checkpoints that nothing can be resumed from",
    "load_best_model_at_end": "has no effect, because Luthier keeps the best weights by itself",
    "auto_find_batch_size": "changes the batch that heats and learning rates are planned for, where "
    "--per_device_train_batch_size sets it",
    "hub_revision": "has no effect, because Luthier pushes to the main branch",
    "enable_jit_checkpoint": "would take SIGTERM from Luthier, which saves a checkpoint and stops by itself",
    "fsdp": "divides the model among GPUs, where Luthier needs it whole on each",
    "deepspeed": "divides the model among GPUs, where Luthier needs it whole on each",
    "neftune_noise_alpha": "is for models of text",
    "use_liger_kernel": "is for models of text",
    "remove_unused_columns": "would remove the images before they are read",
    "include_for_metrics": "has no effect but to keep all images in memory",
    "optim_target_modules": "has no effect, because recipes group the layers by themselves",
}

# What can choose the best epoch: all that `criterion.Judge.compute_metrics` returns.
JUDGED_BY = ("loss", "calibrated_loss", "accuracy", "balanced_accuracy", "macro_f1")
NEED_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # learning rate schedulers

# Options that take an object of JSON, and the key and value of an example.
OBJECTS = {
    "accelerator_config": ("split_batches", "false"),  # or a file
    "lr_scheduler_kwargs": ("num_cycles", "2"),
    "activation_checkpointing_kwargs": ("use_reentrant", "false"),
    "gradient_checkpointing_kwargs": ("use_reentrant", "false"),
}

# Must be above 0, or a run would fail or train nothing after the data has been prepared.
POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "time_limit",
    "milliseconds",
)

NAMES = ("output_dir", "resume_from_checkpoint", "hub_model_id")  # options of the library that name something
# Options that may be paths.
PATHS = ("data_dir", "dataset_name", "labels", "model_name", "output_dir", "resume_from_checkpoint")

# The least and the most that others can be.
RANGES = {
    "image_size": (8, 100_000),
    "seed": (0, 2**32 - 1),
    "split_seed": (0, 2**32 - 1),
    "folds": (2, 1000),
    "dataloader_num_workers": (0, 1000),
    "dataloader_prefetch_factor": (1, 1000),
    "weight_decay": (0, 1e6),
    "warmup_steps": (0, 1e12),
    "label_smoothing_factor": (0, 0.999),
    "max_grad_norm": (0, 1e30),
    "adam_beta1": (0, 0.999_999),
    "adam_beta2": (0, 0.999_999),
    "adam_epsilon": (0, 1),
    "eval_accumulation_steps": (1, 1e12),
}

# Of `--report_to`, each with a package of its name.
TRACKERS = ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")


def check_options(options: dict) -> None:
    """Refuse options that cannot mean what they say, or not together.

    Raises:
        UserError: there is such an option.
    """
    for key in sorted({*OWN, *NAMES} - {"none_class"}):  # whose empty value means that there is no such class
        if options[key] == "":  # as of a shell's variable that is not set
            raise UserError(f"--{key} is empty: give a value, or leave the option out")
    _check_quotes(options)
    if options["data_dir"] and options["dataset_name"]:
        raise UserError("--data_dir and --dataset_name both name the data: give one of them")
    if options["hub_token"] is not None:
        raise UserError(
            "--hub_token would be kept in the shell's history and in the run's files: log in once with "
            "`hf auth login`, or set the environment variable HF_TOKEN"
        )
    if options["export"]:
        require("--export", EXPORT_PACKAGES, "requirements-export.txt")
    fold, resume = options["fold"], options["resume_from_checkpoint"]
    names_checkpoint = resume not in (None, "auto")
    if fold:
        _check_fold(fold)
    if options["folds"] is not None and (fold or names_checkpoint):
        raise UserError(
            "--folds runs every fold: leave --fold out (compare.py --folds gives it: leave folds out of its configs), "
            "and resume with --resume_from_checkpoint auto"
        )
    if options["streaming"]:
        _check_streaming(options)
    for key, why in REFUSED.items():
        if options[key]:
            raise UserError(f"--{key} {why}: leave it out")
    _check_training(options)
    if options["recipe"] == "probe" and names_checkpoint:
        raise UserError("--recipe probe trains nothing that could be resumed: leave --resume_from_checkpoint out")
    if names_checkpoint and not Path(resume, "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {resume} is not a checkpoint: give auto, or one such as outputs/x/checkpoint-50"
        )
    if names_checkpoint and not options["recipe"] and options["model_name"] != "simple_cnn":
        raise UserError(
            "a race of recipes resumes with --resume_from_checkpoint auto, because a checkpoint is of one of them. To "
            "go on with that one alone, name it: --recipe NAME"
        )
    check_trackers(options["report_to"])
    _check_numbers(options)


def _check_quotes(options: dict) -> None:
    """Refuse a quotation mark in a path on Windows, where no path has one.

    PowerShell completes the name of a folder with a backslash at its end. Programs take a backslash and the closing
    quote for a quotation mark of the value, which goes on up to the next quote.

    Raises:
        UserError: there is one.
    """
    if sys.platform != "win32":
        return
    for key in PATHS:
        if '"' in (options[key] or ""):
            raise UserError(
                f"--{key} {options[key]} holds a quotation mark, as by a backslash before a closing quote: leave "
                "this backslash out"
            )


def _check_training(options: dict) -> None:
    """Refuse values of the library's options that would fail late, or harm a run.

    Raises:
        UserError: there is one.
    """
    for kind in ("FSDP", "DEEPSPEED"):  # by a config of accelerate
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate is configured for {kind}, which {REFUSED['fsdp']}: use accelerate launch --multi_gpu, or "
                "distributed_type MULTI_GPU in its config"
            )
    if not options.get("dataloader_in_order", True):
        raise UserError(
            "--dataloader_in_order False would give images the answers of others, because batches of an evaluation "
            "come in any order: leave it out"
        )
    if options["hub_strategy"] != "every_save":
        raise UserError("--hub_strategy has no effect, because Luthier pushes the finished model: leave it out")
    _check_objects(options)
    if options["max_steps"] != -1 and options["max_steps"] < 1:
        raise UserError(f"--max_steps is {options['max_steps']}, but must be above 0: or leave it out for no maximum")
    if options["save_strategy"] == "best":
        raise UserError(
            "--save_strategy best leaves no checkpoint to go on from where an evaluation is not the best one: leave "
            "it out, because Luthier keeps the best weights by itself"
        )
    if options["train_sampling_strategy"] in ("group_by_length", "batch_rebalance"):
        raise UserError(
            f"--train_sampling_strategy {options['train_sampling_strategy']} is for texts, which have a length: leave "
            "it out"
        )
    if options["lr_scheduler_type"] in NEED_EVALUATION:
        raise UserError(
            f"--lr_scheduler_type {options['lr_scheduler_type']} follows the evaluations, and a refit has none: use "
            "another, such as cosine or linear"
        )
    judge = str(options["metric_for_best_model"])
    if judge.removeprefix("eval_") not in JUDGED_BY:
        raise UserError(f"--metric_for_best_model {judge} is not measured: give one of {', '.join(JUDGED_BY)}")
    if options["greater_is_better"] not in (None, not judge.endswith("loss")):
        raise UserError(
            f"--greater_is_better {options['greater_is_better']} would keep the worst weights by {judge}: leave it out"
        )


def _check_objects(options: dict) -> None:
    """Refuse what is no object of JSON where the library takes one.

    Raises:
        UserError: it is none.
    """
    for key, (name, value) in OBJECTS.items():
        text = options.get(key)
        if text is None or (key == "accelerator_config" and not text.startswith("{") and Path(text).is_file()):
            continue
        try:
            is_object = text.startswith("{") and isinstance(json.loads(text), dict)  # the library parses no others
        except ValueError:
            is_object = False
        if not is_object:
            raise UserError(
                f'--{key} {text} is not an object of JSON such as {{"{name}": {value}}}, with double quotes, which a '
                f"shell may take away: write it into a config, as {key}: {{{name}: {value}}}"
            )


def _check_numbers(options: dict) -> None:
    for key in POSITIVE:
        if options[key] is not None and not 0 < options[key] < math.inf:
            raise UserError(f"--{key} is {options[key]}, but must be a number above 0")
    for split in ("validation", "test"):  # here too, because a cut comes after all images have been read
        if (share := options[f"{split}_fraction"]) is not None:
            check_fraction(split, share)
    for key, (least, most) in RANGES.items():
        if options[key] is not None and not least <= options[key] <= most:
            raise UserError(f"--{key} is {options[key]}, but must be a number from {least:,} to {most:,}")


def check_trackers(report_to: str | list[str] | None) -> None:
    """Check `--report_to` now: the Trainer would find a mistake only after all images have been prepared.

    Raises:
        UserError: there is no such tracker, or its package is not installed.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("all", "none", "tensorboard"):
            continue
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # with large libraries

        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"--report_to {name} is not supported: give one such as tensorboard, wandb or mlflow")
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} needs {name}: pip install {name}, or leave the option out")


def check_outside(output_dir: Path, data: str) -> None:
    """Check that a new output directory is not among the images, if these are a folder.

    Raises:
        UserError: it is.
    """
    images = expand_home(data)
    if images.is_dir() and images.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise UserError(
            f"the results would be in {output_dir}, among the images of {data}: give --output_dir with a folder "
            "elsewhere"
        )


def _check_fold(fold: str) -> None:
    """Refuse what is no fold such as `2/5`.

    Raises:
        UserError: it is none.
    """
    part = parse_part(fold)
    if part is None:
        raise UserError(f"--fold {fold} is not a fold: give one such as 2/5, the second of five")
    i, k = part
    if k == 1 or i > k:
        advice = f"give 1/{k} to {k}/{k}" if k > 1 else "there must be at least two folds"
        raise UserError(f"--fold {fold} is none of {k}: {advice}")


def _check_streaming(options: dict) -> None:
    """Refuse what needs all training images to be inspected or cut, where they are streamed.

    Raises:
        UserError: there is such an option.
    """
    needs = [key for key in ("fold", "folds", "labels", "split_column", "group_by") if options[key] is not None]
    if options["on_bad_image"] == "error":
        needs.append("on_bad_image error")
    if needs:
        raise UserError(
            f"--{needs[0]} needs all images before the training, which --streaming does not read: leave one of the "
            "two out"
        )
    if options["data_dir"] is None and options["dataset_name"] in (None, BUILT_IN_DATASET):
        raise UserError(
            "--streaming reads Parquet files and WebDataset archives: name them with --data_dir or --dataset_name"
        )
