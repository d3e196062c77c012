"""Where images come from, how they are split, prepared once, augmented lazily, and how they form a batch."""

import functools
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage
from torch.utils.data import default_collate

from folders import SPLIT_OF_FOLDER, load_folder
from images import decode_rgb, read, reason
from inspection import MOST_BAD, BadImage, forget, group, inspect, leave_out, versions
from openmoji import load_openmoji
from splits import cut_missing_splits
from views import EvaluationView, random_crop, training_view

logger = logging.getLogger(__name__)

PREPARATION = 3  # part of the cache's key: raise it when what is stored changes
TRAINING_PICTURE = 2  # shorter side of a stored training picture, in sides of the view
ENCODED_IMAGE = {"bytes": Value("binary"), "path": Value("string")}  # an image column that lost its type
CUT = ("split_seed", "validation_fraction", "test_fraction", "fold")  # what `load_splits` adds to `load_pictures`
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label")


def load_splits(
    *,
    split_seed: int = 1,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    fold: tuple[int, int] | None = None,
    **options,
) -> tuple[DatasetDict, list[BadImage]]:
    """Load a labelled image set as train, validation and test.

    Args:
        split_seed: decides the cut of splits that the data lacks; the training seed does not move it.
        validation_fraction, test_fraction: how much of the images to cut for a split that is missing, class by class.
        fold: (i, k): test is the i-th of k parts, in the place of `test_fraction`.
        options: of `load_pictures`, which returns the same but for the cut, and raises the same errors.
    """
    splits, bad = load_pictures(**options)
    groups = np.array(splits["train"]["group"][:])
    return cut_missing_splits(splits, groups, split_seed, validation_fraction, test_fraction, fold), bad


def load_pictures(
    data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: list[str] | None = None,
    on_bad_image: str = "drop",
    most_bad: float = MOST_BAD,
    fewest_classes: int = 2,
) -> tuple[DatasetDict, list[BadImage]]:
    """Load a labelled image set in the splits that it has, at least train.

    Args:
        data_dir: a folder of class folders, or one that holds train / validation|val|valid|dev / test.
        dataset_name: `openmoji` or what `datasets.load_dataset` takes: a Hub name or a local dataset folder.
        dataset_config_name: the configuration of a Hub dataset that has several.
        image_column, label_column: columns of a dataset, where their types or names do not tell them.
        label_names: new class names, in the order of the old ones when sorted.
        on_bad_image: `drop` leaves pictures out that cannot be read, `error` does not.
        most_bad: share of the pictures that may be left out.
        fewest_classes: how many classes the pictures must have.

    Returns the splits, and the pictures that were left out. The splits' columns are `image` (bytes or path, not
    decoded), `label` (a `ClassLabel` whose names are sorted and the same in all of them), what `inspection.inspect`
    adds, and `group` (int64, the same for pictures that are equal or nearly so, which a cut never parts).

    Raises:
        ValueError: nothing usable is there; the message says what, where and what to do.
    """
    root = Path(data_dir).expanduser() if data_dir else None
    if root:
        splits = load_folder(root)
    elif dataset_name == "openmoji":
        splits = DatasetDict(train=load_openmoji())
    else:
        splits = _load_named(dataset_name, dataset_config_name)
    splits = _label_and_image(splits, image_column, label_column, label_names)
    names = splits["train"].features["label"].names
    if len(names) < fewest_classes:
        raise ValueError(f"all pictures have the one class {names[0]!r}: a classifier needs at least two")
    splits = DatasetDict({split: inspect(dataset, split, root) for split, dataset in splits.items()})
    splits, bad = leave_out(splits, 0.0 if on_bad_image == "error" else most_bad)
    groups = group(splits)
    return DatasetDict({split: dataset.add_column("group", groups[split]) for split, dataset in splits.items()}), bad


def load_labelled(names: list[str], **options) -> tuple[DatasetDict, list[BadImage]]:
    """Load pictures to score a finished model on: the split `test` where the data has one, or else all of them.

    Args:
        names: the model's classes, in its order; of the pictures' classes all must be among them.
        options: of `load_pictures`, which returns the same but for the splits, and raises the same errors.

    Raises:
        ValueError: the model does not know all classes.
    """
    splits, bad = load_pictures(**options, fewest_classes=1)
    used = ["test"] if "test" in splits else list(splits)
    dataset = concatenate_datasets([splits[split] for split in used])
    own = dataset.features["label"].names
    labels = [own[label] for label in dataset["label"][:]]
    strangers = sorted(set(labels) - set(names))
    if strangers:
        raise ValueError(
            f"the model does not know {len(strangers)} of the pictures' classes, such as {strangers[0]!r}. "
            f"The model's: {', '.join(names)}. The pictures': {', '.join(own)}. Take pictures of its classes alone"
        )
    label = ClassLabel(names=names)
    dataset = dataset.remove_columns("label").add_column("label", label.str2int(labels), feature=label)
    return DatasetDict(test=dataset), [b._replace(split="test") for b in bad if b.split in used]


# --- datasets --------------------------------------------------------------------------------------------------------


def _load_named(dataset_name: str, dataset_config_name: str | None) -> DatasetDict:
    try:
        found = load_dataset(dataset_name, dataset_config_name)
    except ConnectionError as error:
        raise ValueError(
            f"cannot reach the Hub for the dataset {dataset_name}, and it is not in the local cache. Connect this "
            "machine, or use pictures on disk with --data_dir, or the built-in --dataset_name openmoji"
        ) from error
    except (DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"there is no dataset {dataset_name!r} on the Hub, or it is private or gated. Check the name, and log in "
            "with `hf auth login` if it needs rights; for a folder of pictures use --data_dir"
        ) from error
    except ValueError as error:  # several configurations, or none of this name
        raise ValueError(f"cannot load {dataset_name}: {' '.join(str(error).split())}") from error
    splits = DatasetDict()
    for name, dataset in found.items():
        split = "train" if len(found) == 1 else SPLIT_OF_FOLDER.get(name.lower())
        if split in splits:
            raise ValueError(f"{dataset_name} has two {split} splits: {', '.join(found)}")
        if split is None:
            logger.warning(f"Not used: the split {name!r} of {dataset_name}")
        else:
            splits[split] = dataset
    if "train" not in splits:
        raise ValueError(f"{dataset_name} has the splits {', '.join(found)}, but none to train on")
    return splits


def _label_and_image(
    splits: DatasetDict, image_column: str | None, label_column: str | None, label_names: list[str] | None
) -> DatasetDict:
    """Return the splits with the columns `image` (not decoded) and `label` (one ClassLabel, sorted, then renamed)."""
    features = splits["train"].features
    image_column = _find_column(
        "image", image_column, features, [name for name, feature in features.items() if isinstance(feature, Image)]
    )
    encoded = features[image_column] == Value("binary") or features[image_column] == ENCODED_IMAGE
    if not encoded and not isinstance(features[image_column], Image):
        raise ValueError(f"the column {image_column!r} holds no images but {features[image_column]}")
    typed = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    label_column = _find_column(
        "label", label_column, features, typed or [name for name in LABEL_COLUMNS if name in features]
    )
    feature = features[label_column]
    values = {split: dataset[label_column][:] for split, dataset in splits.items()}
    for split in list(values):
        unlabelled = sum(value in (None, -1, "") for value in values[split])
        if unlabelled == len(values[split]) and split != "train":
            logger.warning(f"Not used: the {split} split, which has no labels")
            del values[split], splits[split]
        elif unlabelled:
            raise ValueError(f"{unlabelled} rows of the {split} split have no label in the column {label_column!r}")
    present = set().union(*values.values())
    if isinstance(feature, ClassLabel):
        name_of = dict(enumerate(feature.names))
        names = sorted(feature.names)
    elif all(isinstance(value, (str, int)) for value in present):
        name_of = {value: str(value) for value in present}
        names = [name_of[value] for value in sorted(present)]
    else:
        raise ValueError(f"the column {label_column!r} holds {feature} where class names or numbers were expected")
    index_of = {name: index for index, name in enumerate(names)}
    missing = [name for name in names if name not in {name_of[value] for value in values["train"]}]
    if missing:
        raise ValueError(f"no training picture has the class {', '.join(map(repr, missing))}: add some, or remove it")
    label = ClassLabel(names=_rename_labels(names, label_names))
    return DatasetDict(
        {
            split: dataset.select_columns([image_column])
            .rename_columns({} if image_column == "image" else {image_column: "image"})
            .cast_column("image", Image(decode=False))
            .add_column("label", [index_of[name_of[value]] for value in values[split]], feature=label)
            for split, dataset in splits.items()
        }
    )


def _rename_labels(names: list[str], label_names: list[str] | None) -> list[str]:
    if label_names is None:
        return names
    if len(label_names) != len(names):
        raise ValueError(
            f"label_names has {len(label_names)} names, but the data has {len(names)} classes: {', '.join(names)}. "
            "Give one new name for each, in this order"
        )
    twice = [name for name, count in Counter(label_names).items() if count > 1]
    if twice:
        raise ValueError(f"label_names has {twice[0]!r} twice: every class needs a name of its own")
    return label_names


def _find_column(kind: str, given: str | None, features: Features, candidates: list[str]) -> str:
    if given is not None and given not in features:
        raise ValueError(f"there is no column {given!r} (--{kind}_column); the columns are {', '.join(features)}")
    if given is None and len(candidates) != 1:
        which = f"{' or '.join(candidates)} could be" if candidates else "none of the columns is clearly"
        raise ValueError(
            f"{which} the {kind} column: name it with --{kind}_column (a folder of class folders goes to --data_dir). "
            f"The columns are {', '.join(features)}"
        )
    return given or candidates[0]


# --- preparation -----------------------------------------------------------------------------------------------------


def prepare(splits: DatasetDict, view: EvaluationView) -> DatasetDict:
    """Decode every picture once, on all cores, and store what the run needs of it; `datasets` caches the result.

    A training picture is stored upright, in RGB, with its shorter side at most twice the view's: of such a picture a
    random crop still has a pixel for each that the model sees. One that was small enough and plain RGB already keeps
    its bytes; one that had to be changed but not shrunk is a PNG, a shrunken one a JPEG of quality 95 without chroma
    subsampling. Of validation and test pictures the evaluation view itself is stored, which is exact.

    Returns the splits with the columns `image` (train) or `view` (bytes, see `EvaluationView.pack`), `label` and
    `digest`.

    Raises:
        ValueError: pictures cannot be read any more.
    """
    key = preparation_key(view)
    shortest = TRAINING_PICTURE * max(view.size)
    prepared, broken = DatasetDict(), []
    for split, dataset in splits.items():
        column, feature = ("image", Image(decode=False)) if split == "train" else ("view", Value("binary"))
        store = functools.partial(store_training_picture, shortest=shortest) if split == "train" else view_store(view)
        dataset = dataset.select_columns(["image", "label", "digest", "name"])
        result = dataset.map(
            functools.partial(prepare_batch, store=store, column=column),
            batched=True,
            # A few photographs at a time in memory, however many there are.
            batch_size=32,
            writer_batch_size=32,
            remove_columns=["image", "name"],
            features=Features(
                {column: feature, "label": dataset.features["label"]}
                | {"digest": Value("string"), "error": Value("string")}
            ),
            new_fingerprint=hashlib.sha256(f"{dataset._fingerprint} {split} {key}".encode()).hexdigest()[:40],
            desc=f"Preparing {split}",
        )
        errors = [f"{split}: {error}" for error in result["error"][:] if error]
        if errors:
            broken += errors
            forget(result)
        prepared[split] = result.remove_columns("error")
    if "train" in prepared:
        prepared["train"] = prepared["train"].cast_column("image", Image())
    if broken:
        more = f"\n  ... and {len(broken) - 10} more" if len(broken) > 10 else ""
        listing = "\n  ".join(broken[:10])
        raise ValueError(f"pictures that could be read before cannot be read now: {len(broken)}\n  {listing}{more}")
    return prepared


def preparation_key(view: EvaluationView) -> str:
    """Return what stored pictures depend on, but for the pictures themselves."""
    libraries = versions("pillow", "torchvision", "transformers")
    return json.dumps([PREPARATION, view.image_processor.to_dict(), libraries], sort_keys=True, default=str)


def prepare_batch(batch: dict, store: Callable, column: str) -> dict:
    """Prepare a batch for `Dataset.map`; see `prepare`. A picture that cannot be read leaves its reason in `error`."""

    # Threads suffice, because Pillow lets go of the interpreter while it decodes, resizes and encodes.
    def prepare_one(source: dict, name: str) -> tuple:
        try:
            return store(read(source)), None
        except Exception as error:  # Pillow's plugins raise whatever they like on damaged data
            return None, f"{name}: {reason(error)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stored, errors = zip(*pool.map(prepare_one, batch["image"], batch["name"]), strict=True)
    return {column: list(stored), "label": batch["label"], "digest": batch["digest"], "error": list(errors)}


def store_training_picture(data: bytes, shortest: int) -> dict:
    """Return what is stored of a training picture, as `datasets.Image` has it; see `prepare`."""
    image, changed, *_ = decode_rgb(data, shortest)
    stored = io.BytesIO()
    if min(image.size) > shortest:
        scale = shortest / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image.resize(size, PILImage.Resampling.BICUBIC, reducing_gap=3).save(stored, "JPEG", quality=95, subsampling=0)
    elif changed:
        image.save(stored, "PNG", compress_level=1)
    return {"bytes": stored.getvalue() or data, "path": None}


def view_store(view: EvaluationView) -> Callable[[bytes], bytes]:
    """Return the function that makes of a picture file its packed evaluation view."""
    return lambda data: view.pack(view(decode_rgb(data).image))


def describe(splits: DatasetDict) -> dict:
    """Return what `metrics.json` says of prepared splits: images per split and class, and one hash of all of it.

    The hash covers every file's bytes, class and split; neither names nor order of the files change it.
    """
    names = next(iter(splits.values())).features["label"].names
    counts, lines = {}, []
    for split, dataset in splits.items():
        labels = dataset["label"][:]
        count = Counter(labels)
        counts[split] = {"n": len(labels), "per_class": {name: count[index] for index, name in enumerate(names)}}
        lines += [
            f"{split}\t{names[label]}\t{digest}" for label, digest in zip(labels, dataset["digest"][:], strict=True)
        ]
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    return {"splits": counts, "labels": names, "fingerprint": digest}


# --- views -----------------------------------------------------------------------------------------------------------


def with_views(splits: DatasetDict, view: EvaluationView, augmentation: str, test_view: str) -> DatasetDict:
    """Return prepared splits whose rows are `pixel_values` and `labels`, made when they are asked for.

    Train is seen through `augmentation`, validation and test as the image processor has it, test on demand in random
    crops of that (`random_crop`).
    """
    train = splits["train"].with_transform(lazily("image", training_view(view, augmentation)))
    held_out = {split: evaluation_rows(splits[split], view, ["label"]) for split in ("validation", "test")}
    if test_view == "random_crop":
        see = random_crop(view)
        held_out["test"] = held_out["test"].with_transform(lazily("view", lambda packed: see(view.unpack(packed))))
    return DatasetDict(train=train, **held_out)


def evaluation_rows(dataset: Dataset, view: EvaluationView, columns: Sequence[str] = ()) -> Dataset:
    """Return a prepared split, train too, whose rows are the `pixel_values` of evaluation, and `labels` if asked."""
    column, see = ("view", view.unpack) if "view" in dataset.column_names else ("image", view)
    # Nothing in it is random, so that threads may share it.
    return dataset.select_columns([column, *columns]).with_transform(lazily(column, see, os.cpu_count()))


def lazily(column: str, see: Callable[..., torch.Tensor], threads: int = 1) -> Callable[[dict], dict]:
    """Return the `with_transform` function that makes `pixel_values` of a column, row by row, and keeps the label."""

    def transform(batch: dict) -> dict:
        if threads > 1 and len(batch[column]) > 1:
            with ThreadPoolExecutor(threads) as pool:
                seen = {"pixel_values": list(pool.map(see, batch[column]))}
        else:
            seen = {"pixel_values": [see(entry) for entry in batch[column]]}
        return seen | ({"labels": batch["label"]} if "label" in batch else {})

    return transform


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack rows of a transformed split: `pixel_values` float32 [N, 3, H, W], and `labels` int64 [N] if they have."""
    return default_collate(rows)
