"""The options of a run: dataclasses, a YAML file underneath, the command line on top; errors that name the remedy."""

import argparse
import hashlib
import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from transformers import TrainingArguments

from luthier.errors import UserError
from luthier.machine import OneGPUTrainingArguments, fill_in_machine_defaults
from luthier.output_dir import free_output_dir
from luthier.parsing import HelpFormatter, Parser, describe_command, read_options


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name: ClassVar[str] = "data"

    data_dir: str | None = field(
        default=None,
        metadata={"help": "Your images: a folder of class folders, or one that holds train, validation and test."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub dataset such as someone/their-set, or the built-in openmoji (used without --data_dir)."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a Hub dataset that has several."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "The image column of a dataset, where it is ambiguous."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The label column of a dataset, where it is ambiguous."}
    )
    label_names: list[str] | None = field(
        default=None, metadata={"help": "New names for the classes, in the order of their sorted old names."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each class for the validation split, where the data has none; a tenth, and up to a "
            "quarter of few images, if not given."
        },
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share of each class for the test split, where the data has none."}
    )
    split_seed: int = field(default=1, metadata={"help": "Random seed of these splits; --seed does not change them."})
    fold: str | None = field(
        default=None, metadata={"help": "Such as 2/5: test is the second of five folds, instead of --test_fraction."}
    )
    on_bad_image: Literal["drop", "error"] = field(
        default="drop",
        metadata={"help": "Images that cannot be read: drop leaves them out and names them, error stops."},
    )
    augmentation: Literal["none", "flip_crop", "trivial", "augmix"] = field(
        default="flip_crop",
        metadata={
            "help": "Transform of training images. none: the evaluation view; flip_crop: a random crop, flipped half "
            "of the time; trivial: flip_crop and one random operation of TrivialAugmentWide; augmix: AugMix on the "
            "evaluation view."
        },
    )
    test_view: Literal["evaluation", "random_crop"] = field(
        default="evaluation",
        metadata={"help": "Test transform. random_crop shows how testing on random crops distorts the score."},
    )
    learning_curve: bool = field(
        default=False, metadata={"help": "Estimate the accuracy with twice as many training images."}
    )

    def for_images(self) -> dict:
        """Return what `data.load_images` takes."""
        return {key: getattr(self, key) for key in (*DATA_KEYS, "on_bad_image")}

    def for_cut(self) -> dict:
        """Return what `splits.cut_missing_splits` takes."""
        fold = tuple(map(int, self.fold.split("/"))) if self.fold else None
        cut = {key: getattr(self, key) for key in ("split_seed", "validation_fraction", "test_fraction")}
        return {**cut, "fold": fold}

    def for_splits(self) -> dict:
        """Return what `data.load_splits` takes."""
        return self.for_images() | self.for_cut()

    @property
    def name(self) -> str:
        """The name of the data: as on the Hub; of a folder the last part, because the rest tells of a machine."""
        name = self.data_dir or self.dataset_name or "openmoji"
        return Path(name).resolve().name if self.data_dir or Path(name).is_dir() else name

    @property
    def is_built_in(self) -> bool:
        """Whether the data is OpenMoji."""
        return self.dataset_name == "openmoji"


@dataclass
class ModelArguments:
    """What to train."""

    _argument_group_name: ClassVar[str] = "model"

    model_name: str = field(
        default="efficientnet_lite0",
        metadata={
            "help": "efficientnet_lite0, efficientnet_lite2, simple_cnn, a Hub model such as timm/resnet18.tv_in1k, a "
            "folder with one, or auto: the one of a few whose linear probe is best (docs/usage.md)."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the square that the model sees; the model's own, or less where the images are "
            "small, if not given."
        },
    )
    recipe: Literal["probe", "head", "lp_ft", "full_from_probe", "full"] | None = field(
        default=None,
        metadata={
            "help": "How a pretrained model learns. probe: a logistic regression on its frozen features; head: a new "
            "head on the frozen backbone; lp_ft: the upper layers, starting from the probe; full_from_probe: all "
            "layers, starting from a probe; full: all layers, with a new head. The last three are raced if not given "
            "(docs/usage.md)."
        },
    )
    keep: Literal["best", "trained"] = field(
        default="best",
        metadata={
            "help": "The weights of the result. best: the trained weights, the probe's, or (recipes that start from "
            "a probe) a mean, whichever is best on validation; trained: the trained weights, to compare ways of "
            "training."
        },
    )
    milliseconds: float = field(
        default=40.0,
        metadata={"help": "With --model_name auto: the milliseconds that an image may take on this machine."},
    )
    time_limit: float | None = field(
        default=None,
        metadata={"help": "Minutes that the run may take; no heat and no refit begins that would end later."},
    )
    refit: Literal["auto", "none"] = field(
        default="auto",
        metadata={
            "help": "auto: when the score has been taken, train the shipped model again on all images but a test "
            "split of the data's own, if that takes at most as long again as the run has taken; none: ship the "
            "weights that were scored."
        },
    )


class RunArguments(NamedTuple):
    """What else a command needs to know of the options.

    Attributes:
        command: the command line, without the paths that tell of a machine or a person.
        settings: SHA-256 of all options except those that say where a run goes and how it is shown.
        given: names of all options that the config or the command line sets.
        seeds: the random seeds of training and splits, and the fold.
        learning_rate, num_train_epochs: the user's; None leaves the recipe's.
        push_to_hub: publish the finished run.
    """

    command: str
    settings: str
    given: frozenset[str]
    seeds: dict
    learning_rate: float | None
    num_train_epochs: float | None
    push_to_hub: bool


class Arguments(NamedTuple):
    """All options of a run."""

    data_args: DataArguments
    model_args: ModelArguments
    training_args: TrainingArguments
    run_args: RunArguments


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
    "metric_for_best_model": "loss",  # on a hundred images accuracy moves by whole points, the loss does not
    "remove_unused_columns": False,  # the transforms read columns that the model does not take
    "dataloader_num_workers": None,  # by machine
    "dataloader_persistent_workers": None,  # by machine
    "dataloader_pin_memory": None,  # by machine
    "bf16": None,  # by machine
    "ddp_find_unused_parameters": False,  # there are none, and the search costs a pass a step
    "logging_nan_inf_filter": False,  # it would make a GPU wait at every step, and log a loss that is NaN as 0
    "report_to": "none",
    "output_dir": None,
}
# What a config says of its data, and what is replaced with it when the command line names other data.
DATA_KEYS = ("data_dir", "dataset_name", "dataset_config_name", "image_column", "label_column", "label_names")

# The options of TrainingArguments that people use, which --help shows; --help-all shows all of them.
COMMON = {
    "output_dir": "Where the run is written; the next free name under outputs/ if not given.",
    "resume_from_checkpoint": "auto continues an interrupted run; or a checkpoint to continue from.",
    "seed": "Random seed of the training; it does not change the splits.",
    "num_train_epochs": "Most epochs; as many as pay if not given (docs/usage.md).",
    "learning_rate": "Learning rate of the head; the recipe's if not given.",
    "lr_scheduler_type": "How the learning rate changes.",
    "per_device_train_batch_size": "Images in a batch, on each device.",
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

# What would distort the score silently.
REFUSED = {
    "dataloader_drop_last": "would leave images out of every score",
    "bf16_full_eval": "would round the weights before they are trained",
    "fp16_full_eval": "would round the weights before they are trained",
    "prediction_loss_only": "leaves no predictions to score",
    "batch_eval_metrics": "scores each batch alone, but the report needs all predictions",
    "hub_always_push": "pushes while training, where Luthier pushes the finished model",
    "hub_revision": "has no effect, because Luthier pushes to the main branch",
}

# What the Trainer would accept, and fail with, or train nothing, after the data has been prepared.
POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "image_size",
    "time_limit",
    "milliseconds",
)

# Where a run goes, and how it is shown: not part of what it computes.
NOT_SETTINGS = ("output_dir", "disable_tqdm", "resume_from_checkpoint")


def parse_arguments(argv: list[str], command: str | None = None) -> Arguments:
    """Read `[CONFIG.yaml] [--key value ...]`; the command line overrides the file.

    A line that names its data (`--data_dir`, `--dataset_name`) replaces all that the config says of data and columns.
    The learning rate and the epochs of the training arguments are the library's until the recipe is known, see
    `RunArguments`.

    Args:
        argv: the command line.
        command: what to call it in the results; the command line of train.py if not given.

    Raises:
        UserError: an option, a key or a value is wrong, or the output directory is not free.
    """
    config, options, given = read_options(build_parser(), argv, DATA_KEYS)
    settings = digest_settings(options)
    data_args = DataArguments(**{option.name: options[option.name] for option in fields(DataArguments)})
    model_args = ModelArguments(**{option.name: options[option.name] for option in fields(ModelArguments)})
    _check_options(options)
    if not data_args.data_dir and not data_args.dataset_name:
        data_args.dataset_name = "openmoji"
    run_args = RunArguments(
        command=command or describe_command("train.py", argv),
        settings=settings,
        given=given,
        seeds={key: options[key] for key in ("seed", "split_seed", "fold")},
        learning_rate=options["learning_rate"],
        num_train_epochs=options["num_train_epochs"],
        push_to_hub=bool(options["push_to_hub"]),
    )
    name = Path(config).stem if config else f"{Path(model_args.model_name).name}_{Path(data_args.name).name}"
    output_dir = free_output_dir(options["output_dir"], name, options["resume_from_checkpoint"])
    return Arguments(data_args, model_args, _build_training_args(options, output_dir), run_args)


def _check_options(options: dict) -> None:
    """Refuse options that cannot mean what they say, or not together.

    Raises:
        UserError: there is such an option.
    """
    if options["data_dir"] and options["dataset_name"]:
        raise UserError("--data_dir and --dataset_name both name the data: give one of them")
    if options["hub_token"] is not None:
        raise UserError(
            "--hub_token would be kept in the shell's history and in the run's files: log in once with "
            "`hf auth login`, or set the environment variable HF_TOKEN"
        )
    fold, resume = options["fold"], options["resume_from_checkpoint"]
    if fold and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", fold):
        raise UserError(f"--fold {fold} is not a fold: give one such as 2/5, the second of five")
    if fold and not 2 <= (k := int(fold.split("/")[1])) >= int(fold.split("/")[0]):
        advice = f"give 1/{k} to {k}/{k}" if k > 1 else "there must be at least two folds"
        raise UserError(f"--fold {fold} is none of {k}: {advice}")
    for key, why in REFUSED.items():
        if options[key]:
            raise UserError(f"--{key} {why}: leave it out")
    if options["recipe"] == "probe" and resume not in (None, "auto"):
        raise UserError("--recipe probe trains nothing that could be resumed: leave --resume_from_checkpoint out")
    for key in POSITIVE:
        if options[key] is not None and not 0 < options[key] < math.inf:
            raise UserError(f"--{key} is {options[key]}, but must be a number above 0")
    if resume not in (None, "auto") and not Path(resume, "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {resume} is not a checkpoint: give auto, or one such as outputs/x/checkpoint-50"
        )


def _build_training_args(options: dict, output_dir: Path) -> TrainingArguments:
    """Return the library's arguments of a run.

    Raises:
        UserError: the library does not accept them.
    """
    options = {**options, "output_dir": str(output_dir)}
    fill_in_machine_defaults(options)
    options["label_names"] = None  # DataArguments has it; what the Trainer means by this name it finds by itself
    options["push_to_hub"] = False  # the Trainer's own uploads the whole folder while it trains; see RunArguments
    names = [option.name for option in fields(TrainingArguments) if option.init]
    left_to_recipe = [name for name in ("learning_rate", "num_train_epochs") if options[name] is None]
    try:
        return OneGPUTrainingArguments(**{name: options[name] for name in names if name not in left_to_recipe})
    except (ValueError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error


def digest_settings(options: dict) -> str:
    """Return a hash of all options but those of where a run goes and how it is shown."""
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
        allow_abbrev=False,
    )
    parser.add_argument("--help-all", nargs=0, action=ShowAllHelp, help="show every option of TrainingArguments too")
    parser.set_defaults(**TRAINING_DEFAULTS)
    own = [option.name for group in (DataArguments, ModelArguments) for option in fields(group)]
    shown = (*own, *COMMON, "help_all") if shown is None else shown
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
