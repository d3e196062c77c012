"""Settings from a YAML file and a command line by one parser: strict keys, and errors that name the nearest one."""

import argparse
import difflib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from luthier.command_line import CommandParser, explain_typing, nearest, option_in
from luthier.errors import UserError
from luthier.options import DATA_KEYS
from luthier.processes import is_launched
from luthier.terminal import quote, say

MAX_CHOICES = 5  # that the help lists
PATH_OPTIONS = ("data_dir", "labels", "output_dir", "resume_from_checkpoint")

# What other tools call an option, where spelling leads nowhere, or to another one.
MEANT = {
    "num_train_epochs": ("epoch", "epochs", "num_epochs", "max_epochs"),
    "learning_rate": ("lr", "lr0", "base_lr"),
    "per_device_train_batch_size": ("batch", "batch_size", "bs", "train_batch_size"),
    "data_dir": (
        "data", "dataset", "data_path", "dataset_dir", "dir", "folder", "image_dir", "image_folder", "images",
        "img_dir", "input", "input_dir", "path", "root", "source", "train", "train_dir",
    ),
    "balance": ("balanced", "class_weight", "class_weights", "weighted"),
    "resume_from_checkpoint": ("checkpoint", "ckpt", "load"),
    "model_name": ("arch", "backbone", "model", "model_name_or_path"),
    "image_size": ("imgsz", "img_size", "input_size", "resize", "resolution", "size"),
    "output_dir": ("name", "out", "out_dir", "output", "save_dir"),
    "weight_decay": ("wd",),
    "validation_fraction": ("val_fraction", "val_size", "val_split", "validation_split"),
    "test_fraction": ("test_size", "test_split"),
    "folds": ("cross_validation", "cv", "k", "k_folds", "kfold"),
    "augmentation": ("aug", "augment"),
    "time_limit": ("max_time", "minutes", "time", "timeout"),
    "use_cpu": ("no_cuda",),
}  # fmt: skip
MEANT_BY = {word: option for option, words in MEANT.items() for word in words}
INSTEAD = {  # what Luthier does, and the options that other tools have for that
    "a GPU is used where there is one; --use_cpu trains without it": ("cuda", "device", "gpu", "gpus"),
    "the weights are pretrained ones; --model_name chooses which": ("pretrained", "weights"),
    "--bf16 is on where the GPU supports it": ("amp", "half"),
    "training ends by itself when more of it no longer helps": ("early_stopping", "patience"),
    "--recipe head or --recipe probe trains the head alone": ("freeze", "freeze_backbone"),
    "name folders in --data_dir test and validation, or Luthier splits them off": (
        "test", "test_dir", "val", "val_dir", "valid_dir", "validation_dir",
    ),
    "train is what --test_fraction and --validation_fraction leave": ("train_fraction", "train_size", "train_split"),
    "the classes are those of the folders or of the table (--labels)": ("classes", "nc", "num_classes"),
    "a split is a folder in --data_dir, or a value of --split_column; score.py scores the one called test": ("split",),
    "predict.py predicts: python predict.py outputs/my_run IMAGE": ("image", "predict"),
    "the loss is the cross-entropy; --metric says what chooses the weights": ("criterion", "loss"),
    "each image has one class": ("multi_label", "multilabel"),
    "nothing is overwritten; give another --output_dir, or leave it out for a free name": ("overwrite_output_dir",),
}  # fmt: skip
NOT_NEEDED = {word: remedy for remedy, words in INSTEAD.items() for word in words}


class Parser(CommandParser, HfArgumentParser):
    """The parser of the options of train.py, from their dataclasses."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`, with the words for true and false explained."""
        if found := re.search(r"Truthy value expected: got (.*) but expected", message):
            message = f"{message[: found.start()]}{found[1]} is neither true nor false: write one of these"
            message += ". A repository is given as --hub_model_id" if "--push_to_hub" in message else ""
        super().error(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows each option once, with its default if it has one.

    It overrides private methods, as argparse's own formatters do; read in Python 3.11.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = (
            action.option_strings and action.nargs != 0 and action.default not in (None, [], argparse.SUPPRESS)
        )
        return f"{action.help or ''}{' (default: %(default)s)' if has_default else ''}"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {value_of(action)}"


def value_of(action: argparse.Action) -> str:
    """Return what an option takes, as the help shows it."""
    if action.metavar:
        return str(action.metavar)
    choices = [str(choice) for choice in action.choices or ()]
    if 0 < len(choices) <= MAX_CHOICES:
        return "{" + ",".join(choices) + "}"
    return "[BOOL]" if action.nargs == "?" else "VALUE ..." if action.nargs in ("+", "*") else "VALUE"


def read_options(
    parser: HfArgumentParser, argv: list[str], own: Collection[str] = ()
) -> tuple[str | None, dict, frozenset[str]]:
    """Read `[CONFIG.yaml] [--key value ...]`; the command line overrides the file.

    Where the line sets `data_dir` or `dataset_name`, the file's `DATA_KEYS` are ignored.

    Args:
        parser: of all options.
        argv: the command line.
        own: names of options that the command has besides these: an unknown one may be one of them, misspelt.

    Returns the config's path, every option's value, and the names of those that config or command line set.

    Raises:
        UserError: an option, a key or a value is wrong.
    """
    is_config = bool(argv) and argv[0].endswith((".yaml", ".yml")) and not argv[0].startswith("-")
    config, line = (argv[0], argv[1:]) if is_config else (None, argv)
    settings = read_config(config, parser) if config else {}
    _, unknown = parser.parse_known_args(line)
    if unknown:
        raise UserError(explain_unknown(unknown[0], list(own), parser))
    given = option_names_in(line)
    for key in ("data_dir", "dataset_name", "labels"):
        if sum(option_names_in([token]) == {key} for token in line) > 1:
            remedy = ", such as a folder that holds all classes" if key == "data_dir" else ""
            raise UserError(f"--{key} is given twice: give one{remedy}")
    if {"data_dir", "dataset_name"} & given:
        left = [key for key in settings if key in DATA_KEYS and key not in given | {"data_dir", "dataset_name"}]
        if left:
            verb = "is" if len(left) == 1 else "are"
            say("careful", f"the command line names other data than {config}: its {', '.join(left)} {verb} left out")
        settings = {key: value for key, value in settings.items() if key not in DATA_KEYS}
    options = vars(parser.parse_args(as_tokens(settings) + line))
    return config, options, frozenset(given | {key for key, value in settings.items() if value is not None})


def option_names_in(line: Sequence[str]) -> set[str]:
    """Return the names of the options on a command line, as a config writes them."""
    return {token.split("=")[0].lstrip("-").replace("-", "_") for token in line if token.startswith("--")}


def option_names(parser: HfArgumentParser) -> list[str]:
    """Return the names of all options, as a config writes them."""
    return [option.name for group in parser.dataclass_types for option in fields(group) if option.init]


def read_config(path: str, parser: HfArgumentParser) -> dict:
    """Read a config's settings.

    Raises:
        UserError: the file is missing or not a flat mapping, or has an unknown key or a value of the wrong kind.
    """
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        tree = loader.get_single_node()
        if not isinstance(tree, yaml.MappingNode):
            raise UserError(f"{path} must hold settings, one `key: value` on a line")
        keys = [key.value for key, _ in tree.value]
        settings = _read_values(loader, tree)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid YAML: a list contains itself") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"{path} gives {twice[0]} twice: leave one out")
    for key, value in settings.items():
        if key not in option_names(parser):
            hint = f": {NOT_NEEDED[key]}" if key in NOT_NEEDED else nearest_option(str(key), option_names(parser))
            raise UserError(f"{path}: unknown key {key!r}{hint}")
        try:
            _, unknown = parser.parse_known_args(as_tokens({key: value}))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except TypeError as error:  # of JSON, whose keys are words: a date is none
            raise UserError(f"{path}: {key} has a key that is no word: {error}") from error
        if unknown:
            raise UserError(f"{path}: {key} takes one value, not {len(value)}")
    return settings


def _read_values(loader: yaml.SafeLoader, tree: yaml.MappingNode) -> dict:
    """Return the settings of a config, words as they are written: argparse reads them.

    To YAML `no` is false, `01` is 1 and `2024_01` is 202401. Here they may be names of classes and folders.
    """
    loader.flatten_mapping(tree)  # adds to the tree what is merged by `<<`
    return {str(_read_value(loader, key)): _read_value(loader, value) for key, value in tree.value}


def _read_value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return a word or a list of words as they are written, None for null, or what else YAML reads."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [word.value if isinstance(word, yaml.ScalarNode) else _read_value(loader, word) for word in node.value]
    return loader.construct_object(node, deep=True)


def as_tokens(settings: dict) -> list[str]:
    """Write a config's settings as a command line, so that argparse reads and checks both alike (YAML's 1e-4 too)."""
    tokens = []
    for key, value in settings.items():
        if isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        elif value is not None:
            tokens.append(f"--{key}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return tokens


def nearest_option(word: str, known: Sequence[str]) -> str:
    """Return a question after the option that other tools call `word`, or that is most like it, or nothing."""
    return f"; did you mean {MEANT_BY[word]!r}?" if MEANT_BY.get(word) in known else nearest(word, known)


def explain_unknown(token: str, own: Sequence[str], parser: HfArgumentParser) -> str:
    """Return what is wrong with an argument that is neither an option of the command's own nor one of its parser."""
    if typed := explain_typing(token):
        return typed
    if token.startswith("-"):
        option = option_in(token)
        if option in ("config", "c"):
            return f"unknown option {token}: a config is the first argument, without an option before it"
        # An own option that is nearly the same word (`--side` for `--size`) comes before what other tools mean by it.
        meant = difflib.get_close_matches(option, own, n=1, cutoff=0.75)
        if option in NOT_NEEDED and not meant:
            return f"unknown option {token}: {NOT_NEEDED[option]}"
        known, where = option_names(parser), "All options: python train.py --help-all"
        if parser.prog != "train.py":  # its help shows what matters to it, and it refuses much of the rest
            known = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
            where = f"Options: python {parser.prog} --help"
        hint = nearest(option, meant) or nearest_option(option, [*own, *known]) or "."
        return f"unknown option {token}{hint} {where}"
    if token.endswith((".yaml", ".yml")):
        return f"the config {token} must be the first argument"
    if token.endswith(".json"):
        return f"a config is a YAML file, which {token} is not: write `key: value` on a line each"
    return (
        f"cannot place the argument {token!r}: train.py, score.py and compare.py take images as --data_dir FOLDER, a "
        'dataset as --dataset_name NAME; a path with spaces needs quotes, "my photos"'
    )


def describe_command(script: str, argv: list[str]) -> str:
    """Return the command line of a run; of paths, which tell of a machine or a person, the last part only."""
    launcher = ["accelerate", "launch"] if is_launched() else ["python"]
    shown, option = [], ""
    for word in argv:
        key, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        option = key.lstrip("-").replace("-", "_") or option
        if value.startswith("{"):
            value = "{...}"
        elif _is_path(option, value):
            value = (PureWindowsPath if "\\" in value else Path)(value).name or value[:1]
        shown.append(f"{key}{sign}{value}")
    return quote(*launcher, script, *shown)


def _is_path(option: str, value: str) -> bool:
    """Tell whether a value is a path: by its option, by how it begins, or because there is such a file."""
    if option in ("group_by", "label_names"):  # a pattern or the name of a class may look like a path
        return False
    if option in PATH_OPTIONS or re.match(r"/|~|\.\.|[A-Za-z]:[\\/]", value):
        return True
    # os.path, because a value that is too long is not a file there, but an error in pathlib.
    return (os.sep in value or "/" in value) and os.path.exists(value)  # noqa: PTH110
