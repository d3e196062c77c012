"""A dataset by name, brought to two columns: `image`, not decoded, and `label`, a ClassLabel with sorted names."""

import contextlib
import itertools
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tarfile import TarError
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.utils import httpx  # or httpx2, by its version

from luthier.errors import UserError
from luthier.images.archives import check_whole
from luthier.images.folders import GIVEN_GROUP, SPLIT_OF_FOLDER, STAMP, sort_names
from luthier.terminal import plural

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLAN = "shards.json"  # in a folder that prepare.py writes: what its files are made of
# The types in an image column that lost its own: polars and pyarrow write large ones, pandas a path that is never set.
BINARY, TEXT = (Value("binary"), Value("large_binary")), (Value("string"), Value("large_string"), Value("null"))
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "fine_label")


def load_named(dataset_name: str, dataset_config_name: str | None) -> DatasetDict:
    """Load the splits train, validation and test of a dataset, as far as it has them, with its own columns.

    Args:
        dataset_name: what `datasets.load_dataset` takes: a Hub name or a local dataset folder.
        dataset_config_name: the configuration, where the dataset has several.

    Raises:
        UserError: it cannot be loaded, or has no split to train on.
    """
    if dataset_name.startswith((".", "/", "~")) and not Path(dataset_name).exists():
        raise UserError(f"{dataset_name} is not a folder, and no name of a dataset on the Hub: check the path")
    check_complete(Path(dataset_name))
    with explain_loading(dataset_name):
        loaded = load_dataset(resolved(dataset_name), dataset_config_name)
        if Path(dataset_name).is_dir():
            files = load_dataset_builder(resolved(dataset_name), dataset_config_name).config.data_files or {}
            for url in itertools.chain.from_iterable(files.values()):
                _check_file(url, next(iter(loaded.values())).features)
    check_holds_images(loaded, dataset_name)
    return DatasetDict(named_splits(loaded, dataset_name))


def check_holds_images(splits: Mapping[str, Dataset], dataset_name: str) -> None:
    """Check that the rows of a dataset hold their images, and do not name other files of this machine.

    What is read would be trained on and may be published, and it is the dataset's author who chose the name.

    Raises:
        UserError: a row names a file.
    """
    for split, dataset in splits.items():
        if dataset.info.builder_name == "imagefolder":  # its rows name its own files
            continue
        for column, feature in dataset.features.items():
            if isinstance(feature, Image) or is_encoded_image(feature):
                for images in dataset.data.column(column).chunks:
                    outside = pc.and_(pc.is_null(images.field("bytes")), pc.is_valid(images.field("path")))
                    if pc.any(outside).as_py():
                        path = images.field("path").filter(outside)[0].as_py()
                        raise UserError(
                            f"the split {split} of {dataset_name} names a file instead of an image ({path}): "
                            "write the images themselves into the dataset, or give a table of files with --labels"
                        )


def is_encoded_image(feature: object) -> bool:
    """Tell whether a column is one of images, as `datasets` stores them, that has lost its type."""
    return (
        isinstance(feature, dict)
        and feature.keys() == {"bytes", "path"}
        and feature["bytes"] in BINARY
        and feature["path"] in TEXT
    )


def check_complete(folder: Path) -> None:
    """Check that a dataset is no file, and that prepare.py has written all files of a folder, if it has begun that.

    Raises:
        UserError: it is a file, or some files are missing, or copies of some are among them.
    """
    if folder.is_file():
        raise UserError(
            f"{folder} is a file, and not a dataset: give the folder that its Parquet or tar files are in. A table of "
            "image files goes to --labels, with the folder of the images as --data_dir"
        )
    try:
        splits = dict(json.loads((folder / PLAN).read_text(encoding="utf-8"))["splits"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return  # there is none, or it is another program's
    for split in splits:
        names = sorted(path.name for path in folder.glob(f"{split}-*-of-*.parquet"))
        counts = [re.fullmatch(r"-\d+-of-(\d+)\.parquet", name.removeprefix(split)) for name in names]
        if odd := [name for name, count in zip(names, counts, strict=True) if count is None]:
            raise UserError(
                f"{folder} holds {odd[0]}, which looks like a copy of a file of prepare.py: move it elsewhere, or its "
                "images would count twice"
            )
        if not names or len(names) < max(int(count[1]) for count in counts if count):
            raise UserError(
                f"{folder} lacks files of the split {split}: prepare.py was interrupted, or other machines have not "
                "written their share. Run it again with the same options, and it writes what is missing"
            )


def _check_file(url: str, features: Features) -> None:
    """Check what `datasets` does not: that an archive is read to its end, and the classes of a Parquet file.

    Raises:
        UserError: a file would be read wrongly.
    """
    if url.endswith(".parquet"):
        check_class_names(url, pq.read_schema(url), features)
    elif url.endswith(".tar"):
        try:
            with Path(url).open("rb") as file:
                check_whole(file)
        except TarError as error:
            raise UserError(f"{url} cannot be read: {error}") from error


def check_class_names(url: str, schema: pa.Schema, features: Features) -> None:
    """Check that a Parquet file numbers its classes as the dataset does; `datasets` would read the numbers as its own.

    Raises:
        UserError: it does not.
    """
    for column, feature in Features.from_arrow_schema(schema).items():
        expected = features.get(column)
        if isinstance(feature, ClassLabel) and isinstance(expected, ClassLabel) and feature.names != expected.names:
            raise UserError(
                f"{url} numbers the classes of the column {column!r} by the names {', '.join(feature.names)}, and the "
                f"dataset by {', '.join(expected.names)}. Write all files with the same names, in the same order"
            )


def resolved(dataset_name: str) -> str:
    """Return the whole path of a folder, because `datasets` cannot load `.`; another name as it is."""
    return str(Path(dataset_name).resolve()) if Path(dataset_name).is_dir() else dataset_name


@contextlib.contextmanager
def explain_loading(dataset_name: str) -> Iterator[None]:
    """Turn the errors of `datasets`, where a dataset cannot be loaded, into advice.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        yield
    except (ConnectionError, httpx.TransportError) as error:
        raise UserError(
            f"there is no folder {dataset_name}, and the Hub cannot be reached for a dataset of this name. Check the "
            "name, connect this machine, or use images on disk with --data_dir, or --dataset_name openmoji"
        ) from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        if Path(dataset_name).exists():
            raise UserError(f"cannot load {dataset_name}: {' '.join(str(error).split())}") from error
        raise UserError(
            f"there is no dataset {dataset_name!r} on the Hub, or it is private or gated. Check the name, and log in "
            "with `hf auth login` if it needs rights; for a folder of images use --data_dir"
        ) from error
    except (DatasetsError, TarError, ValueError, RuntimeError, OSError) as error:  # several configurations, damage
        cause = error.__cause__ or error  # of an error while files are read
        raise UserError(f"cannot load {dataset_name}: {' '.join(str(cause).split())}") from error


def named_splits(loaded: Mapping[str, T], dataset_name: str) -> dict[str, T]:
    """Return the splits of a dataset by the names train, validation and test; a single one is train.

    Raises:
        UserError: there is no split to train on, or two have one meaning.
    """
    splits: dict[str, T] = {}
    for name, content in loaded.items():
        split = "train" if len(loaded) == 1 else SPLIT_OF_FOLDER.get(name.lower())
        if split in splits:
            raise UserError(f"{dataset_name} has two {split} splits: {', '.join(loaded)}")
        if split is None:
            logger.warning(f"Not used: the split {name!r} of {dataset_name}")
        else:
            splits[split] = content
    if "train" not in splits:
        raise UserError(f"{dataset_name} has the splits {', '.join(loaded)}, but none to train on")
    return splits


def fixed_width(dataset: Dataset, column: str) -> np.ndarray:
    """Return a column of texts or bytes of one length as uint8 [N, length]: Python's own would take twice the memory.

    Raises:
        ValueError: they are not of one length, or there are none.
    """
    chunks = dataset.select_columns(column).with_format("arrow")[:].column(column).chunks
    parts = []
    for chunk in chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        data = np.frombuffer(chunk.buffers()[2], np.uint8)[ends[0] : ends[-1]]
        parts.append(data.reshape(len(chunk), -1))
        if (np.diff(ends) != parts[-1].shape[1]).any():
            raise ValueError(f"the column {column} has values of several lengths")
    return np.concatenate(parts)


def label_and_image(
    splits: DatasetDict,
    image_column: str | None,
    label_column: str | None,
    group_column: str | None,
    label_names: list[str] | None,
    to_train: bool,
) -> DatasetDict:
    """Return the splits with the columns `image` (not decoded) and `label` (one ClassLabel, sorted, then renamed).

    With a group column they have `GIVEN_GROUP` too, a text.

    A split other than train whose rows have no labels is left out.

    Args:
        splits: train and others, with any columns.
        image_column, label_column: where types and names do not tell them.
        group_column: of what images belong to, such as a patient.
        label_names: new class names, in the order of the old ones when sorted.
        to_train: train must have images of each class that another split has.

    Raises:
        UserError: a column is missing, ambiguous or of the wrong type, or labels are missing.
    """
    if not len(splits["train"]):
        raise UserError("the train split has no rows: check how its files were written")
    features = splits["train"].features
    image_column, label_column = find_columns(features, image_column, label_column)
    values = labels_of_splits({split: dataset[label_column][:] for split, dataset in splits.items()}, label_column)
    name_of = _names_of_labels(features[label_column], set().union(*values.values()), label_column)
    feature = features[label_column]
    unused = sorted(set(feature.names) - {*name_of.values()}) if isinstance(feature, ClassLabel) else []
    if unused:
        classes = plural(len(unused), "class", "classes")
        logger.warning(f"Not used: {classes} of the column {label_column!r} without images, such as {unused[0]!r}")
    index_of = _indices(name_of.values())
    learned = {name_of[value] for value in values["train"]}
    missing = [name for name in index_of if name not in learned]
    if missing and to_train:
        raise UserError(f"no training image has the class {', '.join(map(repr, missing))}: add some, or remove it")
    label = ClassLabel(names=_rename_labels(list(index_of), label_names))
    groups = _groups_of_splits(splits, group_column, image_column) if group_column else {}
    kept = [image_column, *(column for column in (GIVEN_GROUP, STAMP) if column in features)]
    labelled = {
        split: splits[split]
        .select_columns(kept)
        .rename_columns({} if image_column == "image" else {image_column: "image"})
        .cast_column("image", Image(decode=False))
        .add_column("label", [index_of[name_of[value]] for value in labels], feature=label)
        for split, labels in values.items()
    }
    text = Value("string")
    return DatasetDict(
        {
            split: dataset.add_column(GIVEN_GROUP, groups[split], feature=text) if groups else dataset
            for split, dataset in labelled.items()
        }
    )


def _groups_of_splits(splits: DatasetDict, group_column: str, image_column: str) -> dict[str, list[str]]:
    """Return what each image belongs to, as text; an empty one where there is nothing."""
    features = splits["train"].features
    _find_column("group", group_column, features, [])
    if group_column == image_column or not isinstance(features[group_column], (Value, ClassLabel)):
        raise UserError(f"the column {group_column!r} (--group_column) holds {features[group_column]} and no names")
    return {
        split: ["" if value is None else str(value) for value in rows[group_column][:]]
        for split, rows in splits.items()
    }


def find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Return the image column and the label column: those that are given, or as types and names tell them.

    Raises:
        UserError: a column is missing, ambiguous or of the wrong type.
    """
    image_column = _find_column(
        "image", image_column, features, [name for name, feature in features.items() if isinstance(feature, Image)]
    )
    encoded = features[image_column] in BINARY or is_encoded_image(features[image_column])
    if not encoded and not isinstance(features[image_column], Image):
        raise UserError(f"the column {image_column!r} holds no images but {features[image_column]}")
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    likely = typed or [name for name in LABEL_COLUMNS if name in features]
    label_column = _find_column("label", label_column, features, likely)
    if not isinstance(features[label_column], (ClassLabel, Value)):
        raise UserError(f"the column {label_column!r} holds {features[label_column]} and no class names or numbers")
    return image_column, label_column


def labels_of_splits(splits: Mapping[str, list], label_column: str) -> dict[str, list]:
    """Return the labels of each split that has them.

    Raises:
        UserError: some rows of a split have none, or all of train.
    """
    labels = {}
    for split, values in splits.items():
        # NaN is not equal to itself.
        unlabelled = sum(
            value in (None, -1) or value != value or (isinstance(value, str) and not value.strip()) for value in values
        )
        if unlabelled == len(values) and split != "train":
            logger.warning(f"Not used: the {split} split, which has no labels")
        elif unlabelled:
            have = "has" if unlabelled == 1 else "have"
            raise UserError(
                f"{plural(unlabelled, 'row')} of the {split} split {have} no label in the column {label_column!r}"
                + (", because -1 stands for none: if it is a class, write names for numbers" if -1 in values else "")
            )
        else:
            labels[split] = values
    return labels


def index_of_labels(feature: object, values: set, label_column: str) -> dict:
    """Return the index of the class of each label value, as `label_and_image` numbers them.

    Raises:
        UserError: the column has no labels.
    """
    names = _names_of_labels(feature, values, label_column)
    index_of = _indices(names.values())
    return {value: index_of[name] for value, name in names.items()}


def _indices(names: Iterable[str]) -> dict[str, int]:
    """Return the index of each class, in the order of its name; several labels may have one name."""
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def _names_of_labels(feature: object, values: set, label_column: str) -> dict:
    """Return the class name of each label value, in the order of the classes."""
    if isinstance(feature, ClassLabel):
        known = {feature.str2int(name): name for name in sort_names(feature.names)}
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UserError(f"the column {label_column!r} has the label {unknown[0]!r}, which is none of its classes")
        return {value: name for value, name in known.items() if value in values}
    kinds = {type(value) for value in values}
    if kinds == {str}:
        # As in tables and class folders: texts may end with a line break, and accented letters come in two forms.
        name_of = {value: unicodedata.normalize("NFC", value.strip()) for value in values}
        order = {name: index for index, name in enumerate(sort_names({*name_of.values()}))}
        return dict(sorted(name_of.items(), key=lambda item: order[item[1]]))
    if kinds in ({int}, {bool}):
        return {value: str(value) for value in sorted(values)}
    if kinds == {float} and all(value.is_integer() for value in values):  # pandas makes whole numbers so
        return {value: str(int(value)) for value in sorted(values)}
    raise UserError(f"the column {label_column!r} holds {feature} where class names or numbers were expected")


def _rename_labels(names: list[str], label_names: list[str] | None) -> list[str]:
    if label_names is None:
        return names
    if len(label_names) != len(names):
        raise UserError(
            f"label_names has {plural(len(label_names), 'name')}, but the data has "
            f"{plural(len(names), 'class', 'classes')}: {', '.join(names)}. Give one new name for each, in this order"
        )
    twice = [name for name, count in Counter(label_names).items() if count > 1]
    if twice:
        raise UserError(f"label_names has {twice[0]!r} twice: every class needs a name of its own")
    if set(label_names) == set(names) and label_names != names:
        raise UserError(
            f"label_names has the names that the classes have already, which would swap them: {', '.join(names)}. "
            "Leave it out, or give them in this order"
        )
    return label_names


def _find_column(kind: str, given: str | None, features: Features, candidates: list[str]) -> str:
    if given is not None and given not in features:
        raise UserError(f"there is no column {given!r} (--{kind}_column); the columns are {', '.join(features)}")
    if given is None and len(candidates) != 1:
        which = f"{' or '.join(candidates)} could be" if candidates else "none of the columns is clearly"
        raise UserError(
            f"{which} the {kind} column: name it with --{kind}_column (a folder of class folders goes to --data_dir). "
            f"The columns are {', '.join(features)}"
        )
    return given or candidates[0]
