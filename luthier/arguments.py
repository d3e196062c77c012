"""The options of a run: dataclasses, a YAML file underneath, the command line on top; errors that name the remedy."""

import argparse
import hashlib
import json
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from luthier.checks import check_options, check_outside
from luthier.errors import UserError
from luthier.files import expand_home
from luthier.machine import OneGPUTrainingArguments, fill_in_machine_defaults
from luthier.options import BUILT_IN_DATASET, OWN, DataArguments, ModelArguments
from luthier.output_dir import check_folds, describe_if_ended, free_output_dir
from luthier.parsing import HelpFormatter, Parser, describe_command, read_options
from luthier.processes import check_environment, from_main_process


class RunArguments(NamedTuple):
    """What else a command needs to know of the options.

    Attributes:
        command: the command line, without the paths that tell of a machine or a person.
        settings: SHA-256 of all options but `NOT_SETTINGS`.
        of_training: the options that losses and weights depend on: a run is resumed with the same.
        given: names of all options that the config or the command line sets.
        seeds: the random seeds of training and splits, and the fold.
        pace: the user's learning rate, epochs and batch of a device, None where the recipe's, as
            `recipe.choose_recipes` takes them.
        push_to_hub: publish the finished run.
    """

    command: str
    settings: str
    of_training: dict
    given: frozenset[str]
    seeds: dict
    pace: dict[str, Any]
    push_to_hub: bool


class Arguments(NamedTuple):
    """All options of a run."""

    data_args: DataArguments
    model_args: ModelArguments
    training_args: TrainingArguments
    run_args: RunArguments

    @property
    def run_dir(self) -> Path:
        """The directory of the whole run, of which a fold has a part."""
        own = Path(str(self.training_args.output_dir))
        return own.parent if self.data_args.folds and self.data_args.fold else own

    def for_record(self) -> dict:
        """Return what `metrics.json` records of the options of a run."""
        of_run = {key: getattr(self.run_args, key) for key in ("command", "settings", "seeds")}
        return {**of_run, "time_limit": self.model_args.time_limit}

    def describe_if_ended(self) -> str:
        """Return a sentence if the run to go on with has ended, or else ""; the same on every process.

        Raises:
            UserError: see `output_dir.read_metrics`.
        """
        if self.training_args.resume_from_checkpoint != "auto":
            return ""
        ended = ""
        if self.training_args.process_index == 0:
            ended = describe_if_ended(self.run_dir, self.run_args.settings, self.model_args.time_limit)
        return from_main_process(ended)

    def folds(self) -> list["Arguments"]:
        """Return the arguments of each fold, or these where there are no folds.

        Each fold has a directory and a share of the time limit of its own.
        """
        data_args, model_args, training_args, run_args = self
        k = data_args.folds
        if k is None:
            return [self]
        return [
            Arguments(
                replace(data_args, fold=f"{i}/{k}"),
                # The refit has the last share.
                replace(model_args, time_limit=model_args.time_limit and model_args.time_limit * i / (k + 1)),
                replace(training_args, output_dir=str(Path(str(training_args.output_dir)) / f"fold-{i}")),
                run_args,
            )
            for i in range(1, k + 1)
        ]


# DataArguments.label_names, the names of the classes, replaces that of TrainingArguments, which the Trainer fills by
# itself: so DataArguments comes later.
ARGUMENTS = (TrainingArguments, DataArguments, ModelArguments)
TITLE = "training (transformers.TrainingArguments, with Luthier's defaults)"
DESCRIPTION = """Fine-tune an image classifier and score it once on held-out images. Without
options: the built-in images and model."""

# Where Luthier differs from transformers.TrainingArguments; docs/experiments.md has the figures behind the recipe.
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": None,  # by recipe, as learning_rate
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": None,  # by machine
    "learning_rate": None,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "eval_do_concat_batches": False,  # the Trainer would copy all batches before with every batch
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,  # in case the newest is damaged
    # On a hundred images accuracy moves by whole points, the loss does not.
    "metric_for_best_model": "calibrated_loss",
    "remove_unused_columns": False,  # the transforms read columns that the model does not take
    "dataloader_num_workers": None,  # by machine
    "dataloader_persistent_workers": None,  # by machine
    "dataloader_pin_memory": None,  # by machine
    "bf16": None,  # by machine
    "ddp_find_unused_parameters": False,  # they are frozen, and the search would cost a pass a step
    "ddp_timeout": 6 * 3600,  # seconds that processes wait for the one that prepares the images; half an hour is short
    "logging_nan_inf_filter": False,  # it would make a GPU wait at every step, and log a loss that is NaN as 0
    "report_to": "none",
    "output_dir": None,
}

BATCH_OPTION = "per_device_train_batch_size"

# The options of TrainingArguments that people use, which --help shows; --help-all shows all of them.
COMMON = {
    "output_dir": "Where the run is written; the next free name under outputs/ if not given.",
    "resume_from_checkpoint": "auto continues an interrupted run; or a checkpoint to continue from.",
    "seed": "Random seed of the training; it does not change the splits.",
    "num_train_epochs": "Epochs at most; if not given, the recipe's maximum (docs/usage.md).",
    "learning_rate": "Learning rate of the head; the recipe's if not given.",
    "lr_scheduler_type": "How the learning rate changes.",
    "per_device_train_batch_size": "Images on a device; fewer on small data.",
    "gradient_accumulation_steps": "Batches in an optimizer step.",
    "weight_decay": "Weight decay of the optimizer.",
    "optim": "The optimizer, such as adamw_torch_fused or sgd.",
    "bf16": "Compute in bfloat16; by default where a GPU supports it.",
    "dataloader_num_workers": "Processes that load images; by default up to 8 on a GPU, 0 on a CPU.",
    "report_to": "Trackers, such as tensorboard.",
    "push_to_hub": "Publish the finished run on the Hub.",
    "hub_model_id": "The repository, such as me/instruments; the name of the output directory if not given.",
    "disable_tqdm": "Print no progress of training and evaluation.",
}

TECHNICAL = ("bf16", "dataloader_num_workers", "disable_tqdm")  # how a command computes, whatever it does

# Where a run goes, how it is shown, what it exports and publishes, and how much time it has: more of it lets a run go
# on.
NOT_SETTINGS = (
    "output_dir", "disable_tqdm", "resume_from_checkpoint", "export", "time_limit", "ddp_timeout", "push_to_hub",
    "hub_model_id", "hub_private_repo",
)  # fmt: skip

# What losses and weights depend on, besides what a checkpoint knows itself: data, batch, learning rate, size.
OF_TRAINING = (
    "metric", "metric_for_best_model", "greater_is_better", "balance", "none_class", "keep", "augmentation", "seed",
    "weight_decay", "optim", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "label_smoothing_factor",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
)  # fmt: skip


def parse_arguments(
    argv: list[str],
    command: str | None = None,
    replaced: Collection[str] = (),
    own: Collection[str] = (),
    parser: Parser | None = None,
) -> Arguments:
    """Read `[CONFIG.yaml] [--key value ...]`; the command line overrides the file.

    A line that names its data (`--data_dir`, `--dataset_name`) replaces all that the config says of data and columns.
    The learning rate and the epochs of the training arguments are the library's until the recipe is known, see
    `RunArguments`.

    Args:
        argv: the command line.
        command: what to call it in the results; the command line of train.py if not given.
        replaced: names of files that the output directory may already hold, because the command writes them again.
        own: see `parsing.read_options`.
        parser: of another command, by `build_parser`; that of train.py if not given.

    Raises:
        UserError: an option, a key or a value is wrong, or the output directory is not free.
    """
    config, options, given = read_options(parser or build_parser(), argv, own)
    settings = digest_settings(options)
    data_args = DataArguments(**{option.name: options[option.name] for option in fields(DataArguments)})
    model_args = ModelArguments(**{option.name: options[option.name] for option in fields(ModelArguments)})
    check_options(options)
    if not data_args.data_dir and not data_args.dataset_name:
        data_args.dataset_name = BUILT_IN_DATASET
    run_args = RunArguments(
        command=command or describe_command("train.py", argv),
        settings=settings,
        of_training=json.loads(json.dumps({key: options[key] for key in OF_TRAINING})),
        given=given,
        seeds={key: options[key] for key in ("seed", "split_seed", "fold")},
        pace={
            "learning_rate": options["learning_rate"],
            "num_train_epochs": options["num_train_epochs"],
            "batch": options[BATCH_OPTION] if BATCH_OPTION in given else None,
        },
        push_to_hub=bool(options["push_to_hub"]),
    )
    name = Path(config).stem if config else f"{Path(model_args.model_name).name}_{Path(data_args.name).name}"
    output_dir = free_output_dir(options["output_dir"], name, options["resume_from_checkpoint"], replaced)
    check_folds(output_dir, options["folds"])
    trains = options["eval_strategy"] != "no"  # other commands may not write there
    if (trains or options["output_dir"]) and not (options["labels"] or output_dir.exists()):
        check_outside(output_dir, data_args.data_dir or str(data_args.dataset_name))
    return Arguments(data_args, model_args, _build_training_args(options, output_dir), run_args)


def _build_training_args(options: dict, output_dir: Path) -> TrainingArguments:
    """Return the library's arguments of a run.

    Raises:
        UserError: the library does not accept them, or the machine or its environment does not suit them.
    """
    check_environment()
    options = {**options, "output_dir": str(output_dir)}
    fill_in_machine_defaults(options)
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        if options.get(name) and not options["dataloader_num_workers"]:  # older versions lack the second
            raise UserError(f"--{name} needs data workers: give --dataloader_num_workers too, or leave it out")
    options["label_names"] = None  # DataArguments has it; what the Trainer means by this name it finds by itself
    options["push_to_hub"] = False  # the Trainer's own uploads the whole folder while it trains; see RunArguments
    names = [option.name for option in fields(TrainingArguments) if option.init]
    left_to_recipe = [name for name in ("learning_rate", "num_train_epochs") if options[name] is None]
    try:
        return OneGPUTrainingArguments(**{name: options[name] for name in names if name not in left_to_recipe})
    except (ValueError, ImportError, TypeError) as error:  # the last of an unknown key of --accelerator_config
        raise UserError(" ".join(str(error).split())) from error


def refuse_others(command: str, given: Collection[str], taken: Collection[str]) -> None:
    """Refuse options of train.py that another command does not take.

    Args:
        command: its name.
        given: names of options, as the user gives them.
        taken: those that mean something to it. So do, to all commands, those that are neither Luthier's nor `COMMON`,
            and those of `TECHNICAL`.

    Raises:
        UserError: there is such an option.
    """
    wrong = sorted({*OWN, *COMMON}.intersection(given) - {*taken, *TECHNICAL})
    if wrong:
        raise UserError(f"{command} does not take --{wrong[0]}, which is for train.py: leave it out")


def option_of_data(name: str) -> list[str]:
    """Return the option that names the data: a folder if there is one of this name, or else a dataset."""
    return ["--data_dir" if expand_home(name).exists() else "--dataset_name", name]


def digest_settings(options: dict) -> str:
    """Return a hash of all options but `NOT_SETTINGS`."""
    settings = {key: value for key, value in options.items() if key not in NOT_SETTINGS}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def build_parser(
    prog: str = "train.py",
    usage: str = "accelerate launch train.py [configs/NAME.yaml] [--option value ...]",
    description: str = DESCRIPTION,
    shown: Collection[str] | None = None,
) -> Parser:
    """Return the parser of every option: Luthier's, and transformers' TrainingArguments as they are.

    Args:
        prog, usage, description: of the command.
        shown: names of the options that the help shows, if not all of Luthier's and those of `COMMON`.
    """
    groups: Any = ARGUMENTS
    TrainingArguments._argument_group_name = TITLE  # type: ignore[attr-defined]  # for HfArgumentParser
    parser = Parser(
        groups,
        conflict_handler="resolve",
        formatter_class=HelpFormatter,
        prog=prog,
        usage=usage,
        description=description,
    )
    parser.add_argument("--help-all", nargs=0, action=ShowAllHelp, help="show every option of TrainingArguments too")
    parser.set_defaults(**TRAINING_DEFAULTS)
    shown = (*OWN, *COMMON, "help_all") if shown is None else shown
    for action in parser._actions:
        action.help = COMMON.get(action.dest, action.help)
        if action.dest not in shown and action.dest != "help":
            action.help = argparse.SUPPRESS
    parser._action_groups.sort(key=lambda group: group.title == TITLE)  # a library's options come after our own
    return parser


class ShowAllHelp(argparse.Action):
    """`--help-all`: prints every option of TrainingArguments too, and exits."""

    def __call__(self, *_) -> None:
        """Print the help."""
        build_parser(shown={option.name for group in ARGUMENTS for option in fields(group)}).print_help()
        raise SystemExit
