"""Luthier's own options, besides those of `TrainingArguments`: the data, and the model."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from luthier.errors import UserError
from luthier.files import expand_home

Metric = Literal["log_loss", "accuracy", "balanced_accuracy", "macro_f1"]
BalanceOption = Literal["auto", "none", "logit_adjusted", "weighted"]

# How images, labels and groups are found in the data: for all commands that load labelled images.
OF_DATA = (
    "dataset_config_name", "labels", "image_column", "label_column", "split_column", "group_column", "group_by",
    "label_names",
)  # fmt: skip
# What a config says of its data, and what is replaced with it when the command line names other data.
DATA_KEYS = ("data_dir", "dataset_name", *OF_DATA, "none_class")

BUILT_IN_DATASET = "openmoji"
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def _option(default: Any, text: str) -> Any:
    """Return a field of an option with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """What to learn from."""

    _argument_group_name: ClassVar[str] = "data"

    data_dir: str | None = _option(
        None,
        "Your images: a folder of class folders, or one that holds train, validation and test, or one with a "
        "metadata.csv (docs/usage.md).",
    )
    dataset_name: str | None = _option(
        None, "A Hub dataset such as someone/their-set, or the built-in openmoji (used without --data_dir)."
    )
    dataset_config_name: str | None = _option(None, "The configuration of a Hub dataset that has several.")
    labels: str | None = _option(
        None,
        "A table of the images in the folder: CSV, TSV, JSON lines or Parquet, with a column of file names and one of "
        "labels.",
    )
    image_column: str | None = _option(None, "The column of images, where it is ambiguous.")
    label_column: str | None = _option(None, "The column of labels, where it is ambiguous.")
    split_column: str | None = _option(
        None, "The column of a table that says train, validation or test, if not split."
    )
    group_column: str | None = _option(
        None,
        "The column of a dataset or table that says what an image belongs to, such as a patient or a video: Luthier "
        "cuts splits that share no group.",
    )
    group_by: str | None = _option(
        None,
        "The same by paths: folder (in the class folder), or a regular expression for file names (docs/usage.md).",
    )
    streaming: bool = _option(False, "Train from Parquet or WebDataset files as they are (docs/scaling.md).")
    none_class: str | None = _option(None, "The class of images of no other class (default: none).")
    label_names: list[str] | None = _option(None, "New class names, in the order of the sorted old ones.")
    validation_fraction: float | None = _option(
        None,
        "Share of each class for the validation split, where the data has none; with folds, of the rest. If not "
        "given: a tenth, and up to a quarter of few images.",
    )
    test_fraction: float = _option(0.2, "Share of each class for the test split, where the data has none.")
    split_seed: int = _option(1, "Random seed of these splits; --seed does not change them.")
    fold: str | None = _option(None, "Such as 2/5: test is the second of five folds, instead of --test_fraction.")
    folds: int | None = _option(
        None, "Cross-validate: score every image once, by models of this many folds that have not seen it."
    )
    on_bad_image: Literal["drop", "error"] = _option(
        "drop", "Images that cannot be read: drop leaves them out and names them, error stops."
    )
    augmentation: Literal["auto", "none", "crop", "flip_crop", "trivial", "augmix"] = _option(
        "auto",
        "Transform of training images. none: the evaluation view; crop: a random crop; flip_crop: that, mirrored half "
        "of the time; auto: flip_crop, or crop where the mirror shows something else; trivial: flip_crop and an "
        "operation of TrivialAugmentWide; augmix: AugMix.",
    )
    test_view: Literal["evaluation", "random_crop"] = _option(
        "evaluation", "Test transform. random_crop shows how testing on random crops distorts the score."
    )
    learning_curve: bool = _option(False, "Estimate the accuracy with twice as many training images.")

    def for_images(self) -> dict:
        """Return what `data.load_images` takes."""
        return {key: getattr(self, key) for key in ("data_dir", "dataset_name", *OF_DATA, "on_bad_image")}

    def for_stream(self) -> dict:
        """Return what `streams.open_stream` takes."""
        columns = ("image_column", "label_column", "group_column", "split_seed", "validation_fraction")
        name = str(expand_home(self.data_dir)) if self.data_dir else self.dataset_name
        return {"name": name, "config": self.dataset_config_name} | {key: getattr(self, key) for key in columns}

    def for_cut(self) -> dict:
        """Return what `data.cut_splits` takes."""
        cut = {key: getattr(self, key) for key in ("split_seed", "validation_fraction", "test_fraction")}
        return {**cut, "fold": parse_part(self.fold) if self.fold else None}

    def for_later(self, folder: Path) -> dict:
        """Return what `data.load_images` takes, with paths relative to a folder: those of a machine tell of people.

        Of a stream there is what `streams.open_stream` takes besides the name.
        """

        def relative_to_folder(path: Path) -> str:
            try:
                return os.path.relpath(path, folder.resolve())
            except ValueError:  # on another drive of Windows
                return str(path)

        paths = ["data_dir", "labels", *([] if self.is_built_in else ["dataset_name"])]
        relative = {
            key: relative_to_folder(expand_home(value).resolve())
            for key in paths
            if (value := getattr(self, key)) and expand_home(value).exists()
        }
        stream = {key: value for key, value in self.for_stream().items() if key != "name"}
        return self.for_images() | relative | ({"stream": stream} if self.streaming else {})

    @property
    def name(self) -> str:
        """The name of the data: as on the Hub; of a folder the last part, because the rest tells of a machine."""
        name = self.data_dir or self.dataset_name or BUILT_IN_DATASET
        # A whole drive of Windows (D:\) has no last part, and the Hub takes no empty name.
        return (Path(name).resolve().name or "images") if self.data_dir or Path(name).is_dir() else name

    @property
    def is_built_in(self) -> bool:
        """Whether the data is OpenMoji."""
        return self.dataset_name == BUILT_IN_DATASET


@dataclass
class ModelArguments:
    """What to train."""

    _argument_group_name: ClassVar[str] = "model"

    model_name: str = _option(
        "efficientnet_lite0",
        "efficientnet_lite0, efficientnet_lite2, simple_cnn, a Hub model such as timm/resnet18.tv_in1k, a folder with "
        "one, or auto: the one of a few whose linear probe is best (docs/usage.md).",
    )
    image_size: int | None = _option(
        None,
        "Side in pixels of the square that the model sees; the model's own, or less where the images are small, if "
        "not given.",
    )
    recipe: Literal["probe", "head", "lp_ft", "full_from_probe", "full"] | None = _option(
        None,
        "How a pretrained model learns. probe: a logistic regression on its frozen features; head: a new head on the "
        "frozen backbone; lp_ft: the upper layers, starting from the probe; full_from_probe: all layers, starting "
        "from a probe; full: all layers, with a new head. The last three are raced if not given (docs/usage.md).",
    )
    metric: Metric = _option("log_loss", "The figure on validation that chooses the weights (docs/usage.md).")
    balance: BalanceOption = _option(
        "auto", "How answers make up for rare classes; auto: they do if --metric asks for it (docs/usage.md)."
    )
    keep: Literal["best", "trained"] = _option(
        "best",
        "The weights of the result. best: the best on validation; trained: the trained ones, to compare ways of "
        "training.",
    )
    milliseconds: float = _option(
        40.0, "With --model_name auto: the milliseconds that an image may take on this machine."
    )
    time_limit: float | None = _option(
        None, "Minutes that the run may take: no part of the training begins that would end later."
    )
    refit: Literal["auto", "none"] = _option(
        "auto", "auto: train again on all images but the data's own test split, if that is quick; none: do not."
    )
    export: bool = _option(False, "Export to ONNX too (docs/export.md).")


OWN = tuple(option.name for kind in (DataArguments, ModelArguments) for option in fields(kind))


def check_fraction(split: str, fraction: float) -> None:
    """Check the share of the images that is for a split.

    Raises:
        UserError: it leaves nothing, or takes everything.
    """
    if not 0 < fraction < 1:
        hint = f"; {fraction:g}% is {fraction / 100:g}" if 1 < fraction < 100 else ""
        raise UserError(f"--{split}_fraction is {fraction}, but must lie between 0 and 1{hint}")


def parse_part(text: str) -> tuple[int, int] | None:
    """Return (i, k) of a text such as `2/5`, both from 1 on; None where it is not written so."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    return (int(found[1]), int(found[2])) if found else None
