"""What a run can be told, by a config and by the command line; apart from train.py, which is read for what it does."""

import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from machine import suit_machine


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name: ClassVar[str] = "data"

    data_dir: str | None = field(
        default=None,
        metadata={"help": "Your pictures: a folder of class folders, or one that holds train, validation, test."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub dataset such as someone/their-set, or the built-in openmoji (the default)."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Which configuration of a Hub dataset that has several."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Its image column, where that is not clear."})
    label_column: str | None = field(default=None, metadata={"help": "Its label column, where that is not clear."})
    label_names: list[str] | None = field(
        default=None, metadata={"help": "New names for the classes, in the order of their sorted old names."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Share of each class cut for validation, where the data has no such split."}
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share of each class cut for test, where the data has no such split."}
    )
    split_seed: int = field(default=1, metadata={"help": "Decides those cuts; --seed never moves them."})
    fold: str | None = field(
        default=None,
        metadata={"help": "Such as 2/5: test is the second of five parts, in the place of --test_fraction."},
    )
    on_bad_image: Literal["drop", "error"] = field(
        default="drop",
        metadata={"help": "What to do with a picture that cannot be read: leave it out and say so, or stop."},
    )
    augmentation: Literal["none", "flip_crop", "trivial", "augmix"] = field(
        default="flip_crop",
        metadata={
            "help": "What happens to a training picture each time it is seen. none: the evaluation view; flip_crop: a "
            "random crop, mirrored half of the time; trivial: that and one random operation of TrivialAugmentWide; "
            "augmix: AugMix on the evaluation view."
        },
    )
    test_view: Literal["evaluation", "random_crop"] = field(
        default="evaluation",
        metadata={"help": "How test pictures are seen. random_crop shows what the mistake of testing so does."},
    )
    learning_curve: bool = field(
        default=False,
        metadata={"help": "Estimate what accuracy twice the pictures would buy."},
    )

    def for_pictures(self) -> dict:
        """Return what `data.load_pictures` takes."""
        return {key: getattr(self, key) for key in (*DATA_KEYS, "on_bad_image")}

    def for_loading(self) -> dict:
        """Return what `data.load_splits` takes."""
        cut = {key: getattr(self, key) for key in ("split_seed", "validation_fraction", "test_fraction")}
        fold = tuple(map(int, self.fold.split("/"))) if self.fold else None
        return self.for_pictures() | cut | {"fold": fold}

    @property
    def name(self) -> str:
        """What the data is called: as on the Hub; of a folder the last part, for the rest tells of a machine."""
        folder = self.data_dir or (self.dataset_name if Path(self.dataset_name).is_dir() else None)
        return Path(folder).resolve().name if folder else self.dataset_name


@dataclass
class ModelArguments:
    """What to train."""

    _argument_group_name: ClassVar[str] = "model"

    model_name: str = field(
        default="efficientnet_lite0",
        metadata={
            "help": "efficientnet_lite0, simple_cnn, a Hub model such as timm/resnet18.tv_in1k, or a folder with one."
        },
    )
    eval_only: bool = field(
        default=False,
        metadata={"help": "Score the finished model --model_name on the pictures, by name of class; train nothing."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the square the model sees, in pixels; the model's own where not given."},
    )
    recipe: Literal["probe", "head", "lp_ft", "full"] | None = field(
        default=None,
        metadata={
            "help": "How a pretrained model learns. probe: a logistic regression on its frozen features; head: a new "
            "head on the frozen backbone, with augmentation; lp_ft: the upper layers, from the probe on; full: all "
            "layers, with a new head. Chosen by the data's and the model's size where not given (docs/usage.md)."
        },
    )
    keep: Literal["best", "trained"] = field(
        default="best",
        metadata={
            "help": "Which weights to end with. best: of the trained ones, the probe's and for lp_ft their mean those "
            "that are best on validation; trained: the trained ones, to compare ways of training."
        },
    )


# Where Luthier differs from transformers.TrainingArguments; docs/experiments.md has the figures behind the recipe.
TRAINING_DEFAULTS = {
    "num_train_epochs": None,  # by recipe, as learning_rate
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": None,  # by machine
    "learning_rate": None,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,  # should the newest be damaged
    "metric_for_best_model": "loss",  # on a hundred pictures accuracy moves by whole points, the loss does not
    "remove_unused_columns": False,  # the transforms read columns that the model does not take
    "dataloader_num_workers": None,  # by machine
    "bf16": None,  # by machine
    "ddp_find_unused_parameters": False,  # there are none, and looking for them costs a pass a step
    "logging_nan_inf_filter": False,  # it would make a GPU wait at every step, and log a loss that is NaN as 0
    "report_to": "none",
    "output_dir": None,
}
# What a config says of its data, and what goes with it when the command line names other data.
DATA_KEYS = ("data_dir", "dataset_name", "dataset_config_name", "image_column", "label_column", "label_names")

# What would spoil the score without a word.
REFUSED = {
    "dataloader_drop_last": "would leave pictures out of every score",
    "bf16_full_eval": "would round the weights before they are trained",
    "fp16_full_eval": "would round the weights before they are trained",
    "prediction_loss_only": "leaves no answers to score",
    "batch_eval_metrics": "scores batches, where the report needs the whole",
    "hub_always_push": "pushes while training, where Luthier pushes the finished model",
    "hub_revision": "is not used: Luthier pushes to the main branch",
}

# What has no meaning where nothing is trained.
TRAINS = (
    "recipe", "image_size", "resume_from_checkpoint", "push_to_hub", "learning_curve", "keep", "augmentation",
    "test_view", "fold", "split_seed", "validation_fraction", "test_fraction", "num_train_epochs", "learning_rate",
)  # fmt: skip

# What the Trainer would take as it comes, and fail of, or train nothing, after the data has been prepared.
POSITIVE = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
)


def parse_arguments(argv: list[str]) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """Read `[CONFIG.yaml] [--key value ...]`; what the line says goes over what the file says.

    A line that names its data (`--data_dir`, `--dataset_name`) replaces all that the config says of data and columns.

    Raises:
        ValueError: an option, a key or a value is wrong, or the output directory is taken.
    """
    config, options = read_options(argv)
    data_args = DataArguments(**{option.name: options[option.name] for option in fields(DataArguments)})
    model_args = ModelArguments(**{option.name: options[option.name] for option in fields(ModelArguments)})
    if data_args.data_dir and data_args.dataset_name:
        raise ValueError("--data_dir and --dataset_name both name the data: give one of them")
    if not data_args.data_dir and not data_args.dataset_name:
        data_args.dataset_name = "openmoji"
    if data_args.dataset_name == "openmoji" and model_args.model_name == "efficientnet_lite0":
        model_args.image_size = model_args.image_size or 160  # as large as the drawings are rendered
    if options["hub_token"] is not None:
        raise ValueError(
            "--hub_token would be kept in the shell's history and in the run's files: log in once with "
            "`hf auth login`, or set the environment variable HF_TOKEN"
        )
    if data_args.fold and not re.fullmatch(r"[1-9]\d*/[1-9]\d*", data_args.fold):
        raise ValueError(f"--fold {data_args.fold} is no fold: give one such as 2/5, the second of five")
    if data_args.fold and not 2 <= (k := int(data_args.fold.split("/")[1])) >= int(data_args.fold.split("/")[0]):
        raise ValueError(f"--fold {data_args.fold} is none of {k}: give 1/{k} to {k}/{k}, of at least two folds")
    resume = options["resume_from_checkpoint"]
    for key, why in REFUSED.items():
        if options[key]:
            raise ValueError(f"--{key} {why}: leave it out")
    if not options["eval_do_concat_batches"]:
        raise ValueError("--eval_do_concat_batches False leaves no whole to score: leave it out")
    if model_args.eval_only:
        usual = build_parser().get_default
        if told := [key for key in TRAINS if options[key] != usual(key)]:
            raise ValueError(f"--eval_only trains nothing, and --{told[0]} is about training: leave one of them out")
        if "/" not in model_args.model_name and not Path(model_args.model_name).is_dir():
            raise ValueError(
                "--eval_only scores a finished model: give its folder or its name on the Hub as --model_name"
            )
    if model_args.recipe == "probe" and resume not in (None, "auto"):
        raise ValueError("--recipe probe trains nothing that could be resumed: leave --resume_from_checkpoint out")
    for key in POSITIVE:
        if options[key] is not None and not 0 < options[key] < math.inf:
            raise ValueError(f"--{key} is {options[key]}, but must be a number above 0")
    if resume not in (None, "auto") and not Path(resume, "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint {resume} is no checkpoint: give auto, or one such as outputs/x/checkpoint-50"
        )
    name = Path(config).stem if config else f"{Path(model_args.model_name).name}_{Path(data_args.name).name}"
    options["output_dir"] = str(free_output_dir(options["output_dir"], name, resume))
    suit_machine(options)
    options["label_names"] = None  # DataArguments has it; what the Trainer means by the word it finds by itself
    training_options = {option.name: options[option.name] for option in fields(TrainingArguments) if option.init}
    return data_args, model_args, TrainingArguments(**training_options)


class Parser(HfArgumentParser):
    """HfArgumentParser that raises ValueError for a wrong line, where argparse would print all of the usage."""

    def error(self, message: str) -> None:
        """Raise `message`."""
        raise ValueError(message)


def read_options(argv: list[str]) -> tuple[str | None, dict]:
    """Return the config's path and every option's value, of the config and of the line over it.

    Raises:
        ValueError: an option, a key or a value is wrong.
    """
    parser = build_parser()
    config, line = (argv[0], argv[1:]) if argv and argv[0].endswith((".yaml", ".yml")) else (None, argv)
    settings = read_config(config, parser) if config else {}
    _, unknown = parser.parse_known_args(line)
    if unknown:
        raise ValueError(explain_unknown(unknown[0], parser))
    given = {token.split("=")[0].lstrip("-").replace("-", "_") for token in line if token.startswith("--")}
    if {"data_dir", "dataset_name"} & given:
        settings = {key: value for key, value in settings.items() if key not in DATA_KEYS}
    options = vars(parser.parse_args(as_tokens(settings) + line))
    return config, options


def settings_digest(argv: list[str]) -> str:
    """Return a hash of all that a line and its config say, but for where the run is written and how it is shown."""
    options = read_options(argv)[1]
    told = {key: value for key, value in options.items() if key not in ("output_dir", "disable_tqdm")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def build_parser() -> Parser:
    """Return the parser of every option: Luthier's, and transformers' TrainingArguments as they are."""
    TrainingArguments._argument_group_name = "training (transformers.TrainingArguments, with Luthier's defaults)"
    parser = Parser(
        # Luthier's own come last: there a terminal still shows them after TrainingArguments' hundred. And there
        # DataArguments.label_names, the classes' names, takes the place of TrainingArguments', which the Trainer
        # fills by itself.
        (TrainingArguments, DataArguments, ModelArguments),
        conflict_handler="resolve",
        prog="train.py",
        usage="accelerate launch train.py [configs/NAME.yaml] [--option value ...]",
        description="Fine-tune an image classifier and score it once on held-out pictures. Without options: the "
        "built-in pictures and model.",
        allow_abbrev=False,
    )
    parser.set_defaults(**TRAINING_DEFAULTS)
    return parser


def option_names(parser: HfArgumentParser) -> list[str]:
    """Return the names of all options, as a config writes them."""
    return [option.name for group in parser.dataclass_types for option in fields(group) if option.init]


def read_config(path: str, parser: HfArgumentParser) -> dict:
    """Read a config's settings.

    Raises:
        ValueError: the file is missing or no flat mapping, or has an unknown key or a value of the wrong kind.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings, one `key: value` on a line")
    for key, value in settings.items():
        if key not in option_names(parser):
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), option_names(parser))}")
        try:
            _, unknown = parser.parse_known_args(as_tokens({key: value}))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if unknown:
            raise ValueError(f"{path}: {key} takes one value, not {len(value)}")
    return settings


def as_tokens(settings: dict) -> list[str]:
    """Write a config's settings as a command line, so that argparse reads and checks both alike (YAML's 1e-4 too)."""
    tokens = []
    for key, value in settings.items():
        if isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        elif value is not None:
            tokens.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return tokens


def nearest(word: str, known: list[str]) -> str:
    """Return a question after the known word that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain_unknown(token: str, parser: HfArgumentParser) -> str:
    """Say what is wrong with an argument that no option took."""
    if token.startswith("-"):
        option = token.lstrip("-").split("=")[0].replace("-", "_")
        return (
            f"unknown option {token}{nearest(option, option_names(parser))} All are listed by python train.py --help"
        )
    if token.endswith((".yaml", ".yml")):
        return f"the config {token} must be the first argument"
    return (
        f"cannot place the argument {token!r}: pictures are given as --data_dir {token}, a dataset as --dataset_name"
    )


def free_output_dir(given: str | None, name: str, resume_from_checkpoint: str | None) -> Path:
    """Return where the run writes: the directory asked for, or the next free one under `outputs/`.

    Raises:
        ValueError: the directory asked for holds something that the run does not continue.
    """
    if given is None:
        if resume_from_checkpoint == "auto":
            return Path("outputs", name)
        tries = (Path("outputs", name if number == 1 else f"{name}-{number}") for number in range(1, 10_000))
        return next(path for path in tries if not path.exists())
    path = Path(given)
    continued = resume_from_checkpoint == "auto" or (
        resume_from_checkpoint and path.resolve() in Path(resume_from_checkpoint).resolve().parents
    )
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not continued):
        raise ValueError(
            f"--output_dir {given} already holds something, which is neither mixed into nor deleted: give another, "
            "leave the option out to have the next free name under outputs/, or go on with a run that was cut short "
            "by --resume_from_checkpoint auto"
        )
    return path


def has_ended(output_dir: Path) -> bool:
    """Tell whether a run has written all that it leaves: its model card comes last."""
    return (output_dir / "README.md").exists()


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
