"""What several commands share: parser, checkout, commands and their caches, images and features for a probe."""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.files import expand_home

if TYPE_CHECKING:  # slow imports are inside the function, because some commands change the environment first
    import torch
    from datasets import DatasetDict
    from transformers import Trainer

    from luthier.images.views import ImageRows


PROJECT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]  # `accelerate launch` of this environment


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with a module's docstring, as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def directory(text: str) -> Path:
    """Return the path of a folder, as a type of `argparse`.

    Raises:
        ArgumentTypeError: there is none.
    """
    path = expand_home(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text}")
    return path


def run_command(line: list[str], folder: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """Run a command and return what it prints; exit with the end of its output where it fails.

    Args:
        line: the command.
        folder: where it runs; None is here.
        environment: what it has besides this process's.
    """
    done = subprocess.run(line, cwd=folder, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(line)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def own_caches(folder: Path) -> dict[str, str]:
    """Return the environment of a process whose caches are below a folder, wherever the user has others."""
    return {"HF_HOME": str(folder), "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}


def load_for_probe(
    data: Path, output_dir: str, group_by: str | None = None
) -> "tuple[Trainer, DatasetDict, dict[str, ImageRows]]":
    """Return what `measure_probe` takes: a Trainer of `efficientnet_lite0`, the splits of a folder, and their rows."""
    from data import feature_rows, load_splits, prepare
    from luthier.arguments import parse_arguments
    from luthier.images.views import EvaluationView
    from luthier.machine import set_up_process
    from luthier.training.trainer import build_predictor
    from models import build_model

    line = ["--output_dir", output_dir, "--disable_tqdm", "1", "--eval_strategy", "no"]
    training_args = parse_arguments(line).training_args
    set_up_process(training_args)
    splits, _ = load_splits(data_dir=str(data), group_by=group_by)
    names = splits["train"].features["label"].names
    model, image_processor = build_model("efficientnet_lite0", dict(enumerate(names)))
    view = EvaluationView(image_processor)
    return build_predictor(model, training_args), splits, feature_rows(prepare(splits, view), view)


def load_probe_features(data: Path, used: Collection[str]) -> "tuple[DatasetDict, dict[str, torch.Tensor]]":
    """Return the splits of a folder, and of some of them the features that a probe learns from, float32 [N, D]."""
    from luthier.training.features import load_features
    from luthier.training.trainer import model_of
    from models import linear_head

    with tempfile.TemporaryDirectory() as output_dir:
        trainer, splits, rows = load_for_probe(data, output_dir)
        head = linear_head(model_of(trainer))
        return splits, {split: load_features(trainer, head, rows[split]) for split in used}
