"""A dataset's own columns brought to two: `image`, not decoded, and `label`, a ClassLabel with sorted names."""

import copy
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from luthier.cache import values_of
from luthier.errors import UserError
from luthier.images.folder_checks import are_splits
from luthier.images.listed_images import GIVEN_GROUP, STAMP, letters_of, sort_names
from luthier.images.splits import MAX_NAMED, REMOVE
from luthier.terminal import plural, say, some_of

logger = logging.getLogger(__name__)

# The types in an image column that lost its own: polars and pyarrow write large ones, pandas a path that is never set.
BINARY, TEXT = (Value("binary"), Value("large_binary")), (Value("string"), Value("large_string"), Value("null"))
MAX_COLUMNS = 20  # that a message names
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "fine_label")


def is_image_feature(feature: object) -> bool:
    """Tell whether a column is one of images, as `datasets` stores them, even if it has lost its type."""
    return isinstance(feature, Image) or (
        isinstance(feature, dict)
        and feature.keys() == {"bytes", "path"}
        and feature["bytes"] in BINARY
        and feature["path"] in TEXT
    )


def fixed_width(dataset: Dataset, column: str) -> np.ndarray:
    """Return a column of texts or bytes of one length as uint8 [N, length]: Python's own would take twice the memory.

    Raises:
        ValueError: they are not of one length, or there are none.
    """
    parts = []
    for chunk in values_of(dataset, column).chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        data = np.frombuffer(chunk.buffers()[2], np.uint8)[ends[0] : ends[-1]]
        parts.append(data.reshape(len(chunk), -1))
        if (np.diff(ends) != parts[-1].shape[1]).any():
            raise ValueError(f"the column {column} has values of several lengths")
    return np.concatenate(parts)


def add_numbers(dataset: Dataset, column: str, values: np.ndarray) -> Dataset:
    """Return a dataset with a column of whole numbers, int64 [N].

    `Dataset.add_column` would write all rows anew, with their images, where some have been left out.
    """
    if dataset._indices is None:
        return dataset.add_column(column, values)
    rows, whole = dataset._indices.column(0).to_numpy().astype(np.int64), copy.copy(dataset)
    whole._indices = None
    of_all = np.zeros(len(whole), np.int64)
    of_all[rows] = values
    return whole.add_column(column, of_all).select(rows)


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
    image_column, label_column = find_columns(features, image_column, label_column, group_column)
    feature = features[label_column]
    values = labels_of_splits({split: dataset[label_column][:] for split, dataset in splits.items()}, label_column)
    name_of = _names_of_labels(feature, set().union(*values.values()), label_column)
    unused = sorted(set(feature.names) - {*name_of.values()}) if isinstance(feature, ClassLabel) else []
    if unused:
        classes = plural(len(unused), "class", "classes")
        logger.warning(f"Not used: {classes} of the column {label_column!r} without images, such as {unused[0]!r}")
    index_of = _indices(name_of.values())
    learned = {name_of[value] for value in values["train"]}
    missing = [name for name in index_of if name not in learned]
    if missing and to_train:
        alike = [name for name in sorted(learned) if letters_of(name) in map(letters_of, missing)]
        remedy = f"write it as in train, {alike[0]!r}" if alike else "add some, or remove it"
        where = [split for split, labels in values.items() if {name_of[label] for label in labels} - learned]
        raise UserError(
            f"no training image has the class {some_of([*map(repr, missing)], MAX_NAMED)}, which is in "
            f"{' and '.join(where)}: {remedy}"
        )
    label = ClassLabel(names=_rename_labels(list(index_of), label_names))
    groups = _groups_of_splits(splits, group_column, image_column) if group_column else {}
    kept = [image_column, *(column for column in (GIVEN_GROUP, STAMP) if column in features)]
    labelled = DatasetDict()
    for split, labels in values.items():
        dataset = splits[split].select_columns(kept)
        dataset = dataset.rename_columns({} if image_column == "image" else {image_column: "image"})
        dataset = dataset.cast_column("image", Image(decode=False))
        dataset = dataset.add_column("label", [index_of[name_of[value]] for value in labels], feature=label)
        if groups:
            dataset = dataset.add_column(GIVEN_GROUP, groups[split], feature=Value("string"))
        labelled[split] = dataset
    return labelled


def say_odd_classes(splits: DatasetDict, are_own: bool) -> None:
    """Say which classes have nearly the same name, and which ones a split lacks.

    Args:
        splits: of `label_and_image`.
        are_own: all splits are the user's own, and train learns; otherwise what they lack is not said.
    """
    names = splits["train"].features["label"].names
    alike = Counter(plain := [letters_of(name) for name in names])
    if same := [repr(name) for name, letters in zip(names, plain, strict=True) if alike[letters] > 1]:
        say("careful", f"classes whose names differ in capitals or spaces alone: {', '.join(same[:MAX_NAMED])}")
    for split, dataset in splits.items() if are_own else ():
        present = set(dataset["label"][:])
        if lacking := [repr(name) for index, name in enumerate(names) if index not in present]:
            named = some_of(lacking, MAX_NAMED)
            say("careful", f"{split}, which is a split of your own, has no image of {named}: add some, {REMOVE}")


def _groups_of_splits(splits: DatasetDict, group_column: str, image_column: str) -> dict[str, list[str]]:
    """Return what each image belongs to, as text; an empty one where there is nothing."""
    features = splits["train"].features
    _find_column("group", group_column, features, [])
    if group_column == image_column or not isinstance(features[group_column], (Value, ClassLabel)):
        raise UserError(
            f"the column {group_column!r} (--group_column) holds no names or numbers, but {features[group_column]}: "
            "name another"
        )
    missing = (None, -1) if isinstance(features[group_column], ClassLabel) else (None,)
    return {
        split: [
            # NaN is not equal to itself. White space and accents are as in labels.
            "" if value in missing or value != value else unicodedata.normalize("NFC", str(value).strip())
            for value in rows[group_column][:]
        ]
        for split, rows in splits.items()
    }


def find_columns(
    features: Features, image_column: str | None, label_column: str | None, group_column: str | None
) -> tuple[str, str]:
    """Return the image column and the label column: those that are given, or as types and names tell them.

    The group column is taken for the labels only where `label_column` names it.

    Raises:
        UserError: a column is missing, ambiguous or of the wrong type.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    # Without their type, as pandas writes them: `bytes` and `path`, or bytes alone.
    images = images or [name for name, feature in features.items() if is_image_feature(feature) or feature in BINARY]
    image_column = _find_column("image", image_column, features, images)
    if features[image_column] not in BINARY and not is_image_feature(features[image_column]):
        remedy = "name another with --image_column"
        if features[image_column] in TEXT:
            remedy += ". If it names image files, give a table with --labels, and their folder with --data_dir"
        raise UserError(f"the column {image_column!r} holds no images, but {features[image_column]}: {remedy}")
    others = {name: feature for name, feature in features.items() if name != group_column}
    typed = [
        name for name, feature in others.items() if isinstance(feature, ClassLabel) and not are_splits(feature.names)
    ]
    likely = typed or [name for name in LABEL_COLUMNS if name in others]
    label_column = _find_column("label", label_column, features, likely)
    if not isinstance(features[label_column], (ClassLabel, Value)):
        raise _no_labels(label_column, features[label_column])
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
            remedy = ": add labels, or remove the rows"
            if -1 in values:
                remedy = ", because -1 stands for none: if it is a class, write names for numbers"
            raise UserError(
                f"{plural(unlabelled, 'row')} of the {split} split {have} no label in the column {label_column!r}"
                f"{remedy}"
            )
        else:
            labels[split] = values
    return labels


def index_of_labels(feature: object, values: set, label_column: str) -> dict:
    """Return the index of the class of each label value, as `label_and_image` numbers them.

    Raises:
        UserError: the column holds no labels, or one that is none of its classes.
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
            raise UserError(
                f"the column {label_column!r} has the label {unknown[0]!r}, which is none of its classes: correct "
                "it, or name the class in the dataset's features"
            )
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
    raise _no_labels(label_column, feature)


def _no_labels(column: str, feature: object) -> UserError:
    return UserError(
        f"the column {column!r} holds no class names or numbers, but {feature}: name another with --label_column"
    )


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
        raise UserError(
            f"label_names has {twice[0]!r} twice: every class needs a name of its own. To make several classes one, "
            "put their folders into one, or give them one label in the table"
        )
    if set(label_names) == set(names) and label_names != names:
        raise UserError(
            f"label_names has the names that the classes have already, which would swap them: {', '.join(names)}. "
            "Leave it out, or give them in this order"
        )
    return label_names


def _find_column(kind: str, given: str | None, features: Features, candidates: list[str]) -> str:
    if given is not None and given not in features:
        columns = some_of(list(features), MAX_COLUMNS)
        raise UserError(f"there is no column {given!r} (--{kind}_column); the columns are {columns}")
    if given is None and len(candidates) != 1:
        which = f"{' or '.join(candidates[:3])} could be" if candidates else "none of the columns is clearly"
        points = ""
        if "__key__" in features and any("." in name for name in features):
            points = ". In an archive, what follows the first point in the name of a file is the name of a column"
        raise UserError(
            f"{which} the {kind} column: name it with --{kind}_column (a folder of class folders goes to --data_dir, "
            f"a table of image files to --labels). The columns are {some_of(list(features), MAX_COLUMNS)}{points}"
        )
    return given or candidates[0]
