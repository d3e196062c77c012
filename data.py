"""The way of an image: loaded, split, prepared once, transformed lazily."""

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from torch.utils.data import get_worker_info
from transformers import BaseImageProcessor

from luthier.cache import cache_key, library_versions, list_of, make_rows
from luthier.cores import count_cores
from luthier.errors import ImagesChanged, UserError
from luthier.files import expand_home
from luthier.images.column_roles import say_unused_columns
from luthier.images.columns import find_columns, label_and_image, say_odd_classes
from luthier.images.decode import decode_rgb, read_bytes, reason
from luthier.images.groups import add_groups
from luthier.images.inspection import MAX_UNREADABLE, UnreadableImage, inspect, leave_out_unreadable, listing
from luthier.images.listed_images import letters_of
from luthier.images.loading import load_named
from luthier.images.metadata import Columns, has_shards, load_directory
from luthier.images.openmoji import load_openmoji
from luthier.images.shards import StreamedRows
from luthier.images.splits import cut_splits
from luthier.images.streams import Stream
from luthier.images.views import EvaluationView, ImageRows, random_crop_transform, training_transform
from luthier.machine import pool_of_single_threads
from luthier.options import BUILT_IN_DATASET
from luthier.processes import available_cores
from luthier.terminal import plural, say, some_of

PREPARATION = 12  # part of the cache's key: raise it when what is stored changes
STORED_SIDE = 2  # shorter side of a stored training image, in sides of the view
MAX_JPEG = 65_500  # pixels of a side
SMALL = 4  # a file is stored, not its view, if it has at most 1/4 of the view's bytes and 4 times the view's pixels
VIEW_THREADS = 4  # that read stored views: each takes a millisecond or so, and more threads were slower


# --- load


def load_splits(
    *,
    split_seed: int = 1,
    validation_fraction: float | None = None,
    test_fraction: float = 0.2,
    fold: tuple[int, int] | None = None,
    **options,
) -> tuple[DatasetDict, list[UnreadableImage]]:
    """Load a labelled dataset as train, validation and test: `load_images`, then `cut_splits`, and their errors."""
    splits, unreadable = load_images(**options)
    return cut_splits(splits, split_seed, validation_fraction, test_fraction, fold), unreadable


def load_images(
    *, on_bad_image: str = "drop", max_unreadable: float = MAX_UNREADABLE, **source
) -> tuple[DatasetDict, list[UnreadableImage]]:
    """Load a labelled dataset in the splits that it has, at least train, and look at every image.

    Args:
        on_bad_image: `drop` leaves out images that cannot be read, `error` refuses them.
        max_unreadable: share of the images that may be left out.
        source: of `list_images`.

    Returns the splits, and the images that were left out. The splits' columns are those of `list_images`, what
    `inspection.inspect` adds, and those of `groups.add_groups`.

    Raises:
        UserError: nothing usable is there; the message says what, where and what to do.
    """
    splits, root = list_images(**source)
    splits = DatasetDict({split: inspect(dataset, split, root) for split, dataset in splits.items()})
    splits, unreadable = leave_out_unreadable(splits, 0.0 if on_bad_image == "error" else max_unreadable)
    return add_groups(splits), unreadable


def list_images(
    data_dir: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    group_by: str | None = None,
    label_names: list[str] | None = None,
    to_train: bool = True,
    stream: Stream | None = None,
) -> tuple[DatasetDict, Path | None]:
    """Return the images of a dataset with their labels, before any is opened.

    Args:
        data_dir: a folder of class folders, or one that holds the splits, see `folders.SPLIT_OF_FOLDER`, or one
            with a metadata file, see `metadata.find_tables`; or one of Parquet files or WebDataset archives.
        dataset_name: `openmoji` or what `datasets.load_dataset` takes: a Hub name or a local dataset folder.
        dataset_config_name: the configuration of a Hub dataset that has several.
        labels: a table of the images below `data_dir`, instead of class folders.
        image_column, label_column: columns of a dataset or a table, where types, names or values do not tell them.
        split_column: of a table; `split` if there is one.
        group_column: of what images belong to, such as a patient: a cut keeps them on one side.
        group_by: the same by the files' names, see `groups.build_grouping`.
        label_names: new class names, in the order of the old ones when sorted.
        to_train: False where a model is only scored: one class is enough, and test may be all there is.
        stream: of the same data: train is then a sample, and the other splits are complete.

    Returns the splits, with the columns `image` (bytes or path, not decoded) and `label` (a `ClassLabel` whose names
    are sorted and the same in all of them), `STAMP` of files and `GIVEN_GROUP` where groups were told, see
    `listed_images`; and the folder of the images, if they are files in one.

    Raises:
        UserError: nothing usable is there.
    """
    root = expand_home(data_dir) if data_dir else None
    columns = Columns(image_column, label_column, split_column, group_column)
    if stream:
        splits, root = stream.splits, None
    elif dataset_config_name and dataset_name in (None, BUILT_IN_DATASET) and not (root and has_shards(root)):
        raise UserError("--dataset_config_name is for a dataset on the Hub: give --dataset_name too, or leave it out")
    elif root and (labels or not has_shards(root)):
        splits = load_directory(root, labels, columns, group_by, to_train)
        columns = Columns()
    elif labels or split_column or group_by:
        where = f"{root} holds Parquet or tar files" if root else "give --data_dir"
        raise UserError(f"--labels, --split_column and --group_by are for image files in a folder: {where}")
    else:
        splits, root = _load_dataset(root, dataset_name, dataset_config_name, columns, to_train), None
    splits = label_and_image(splits, columns.image, columns.label, columns.group, label_names, to_train)
    names = splits["train"].features["label"].names
    if to_train and len(names) < 2:
        raise UserError(f"all images have the one class {names[0]!r}: a classifier needs at least two")
    say_odd_classes(splits, are_own=to_train and not stream)  # a stream sets validation apart, and needs a test split
    return splits, root


def _load_dataset(
    root: Path | None, name: str | None, config: str | None, columns: Columns, to_train: bool
) -> DatasetDict:
    """Return the splits of a folder of shards or of a dataset with their own columns; see `list_images`."""
    if root is None and name in (None, BUILT_IN_DATASET):
        return DatasetDict(train=load_openmoji())
    splits = load_named(source := str(root or name), config, to_train)
    if to_train:
        used = find_columns(splits["train"].features, columns.image, columns.label, columns.group)
        say_unused_columns(splits["train"], source, used, columns.group)
    return splits


def load_labelled(names: list[str], **options) -> tuple[DatasetDict, list[UnreadableImage]]:
    """Load images to score a finished model on: the split `test` where the data has one, or else all of them.

    Args:
        names: the model's classes, in its order; the images' classes must all be among them.
        options: of `load_images`.

    Returns the images as the one split `test`, and those of them that were left out.

    Raises:
        UserError: see `load_images`; or the model does not know all classes, or has several of one name.
    """
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(
            f"the model has several classes with the name {repeated[0]!r}, and classes are matched by name: rename "
            "them in its config.json, in `label_names`, or in `id2label` where it has none"
        )
    splits, unreadable = load_images(**options, to_train=False)
    used = ["test"] if "test" in splits else list(splits)
    dataset = concatenate_datasets([splits[split] for split in used])
    own = dataset.features["label"].names
    labels = [own[label] for label in list_of(dataset, "label")]
    unknown = sorted(set(labels) - set(names))
    if unknown:
        known, remedy = {letters_of(name): name for name in names}, "Score images of the model's classes only"
        alike = next((name for name in unknown if letters_of(name) in known), None)
        if alike:
            remedy = f"The model writes {alike!r} as {known[letters_of(alike)]!r}: rename it, or give --label_names"
        raise UserError(
            f"the model does not know {plural(len(unknown), 'class', 'classes')} of the images, such as "
            f"{alike or unknown[0]!r}. The model's: {some_of(names, 20)}. The images': "
            f"{some_of(own, 20)}. {remedy}"
        )
    label = ClassLabel(names=names)
    dataset = dataset.remove_columns("label").add_column("label", label.str2int(labels), feature=label)
    return DatasetDict(test=dataset), [image._replace(split="test") for image in unreadable if image.split in used]


# --- prepare


def prepare(splits: DatasetDict, view: EvaluationView, quiet: bool = False) -> DatasetDict:
    """Decode every image once, on all cores, and store what the run needs of it; see `luthier.cache`.

    A training image is stored upright, in RGB, with its shorter side at most twice the view's: a random crop of it
    still has a pixel for each that the model sees. An image that is small enough and plain RGB already keeps its
    bytes. One that had to be changed but not shrunk is stored as PNG, a shrunken one as JPEG of quality 90 without
    chroma subsampling. Of validation and test images the evaluation view itself is stored, or the file where that is
    much smaller: it is decoded again whenever it is looked at. Both are exact.

    Args:
        splits: as loaded.
        view: that evaluation uses.
        quiet: do not say how many images were prepared before.

    Returns the splits with the columns `image` (train) or `view` (bytes, see `EvaluationView.unpack`), `label` and
    `digest`.

    Raises:
        ImagesChanged: images cannot be read any more, or are others than those that were inspected.
    """
    key = _view_key(view)
    shorter_side = STORED_SIDE * max(view.size)
    prepared, errors, reused = DatasetDict(), [], 0
    for split, dataset in splits.items():
        if split == "train":
            column, feature = "image", Image(decode=False)
            store: Callable = functools.partial(store_training_image, shorter_side=shorter_side)
        else:
            column, feature, store = "view", Value("binary"), view_packer(view)
        result, of_earlier_runs = make_rows(
            dataset.select_columns(["image", "label", "digest", "name"]),
            list_of(dataset, "digest"),
            "prepared",
            cache_key(column, key),
            functools.partial(prepare_batch, store=store, column=column),
            Features({column: feature} | dict.fromkeys(("digest", "error"), Value("string"))),
            lasts=lambda made: [not error for error in made["error"]],
            topic="prepare",
            unit=f"images of {split}",
            beside=["label"],
        )
        reused += of_earlier_runs
        errors += [f"{split}: {error}" for error in list_of(result, "error") if error]
        prepared[split] = result.remove_columns("error")
    if errors:
        raise ImagesChanged(
            f"images that were read before are not there now, or are other ones: {len(errors)}{listing(errors)}"
        )
    if reused and not quiet:
        say("reuse", f"{reused:,} of {sum(map(len, splits.values())):,} images as they were stored before")
    if "train" in prepared:
        prepared["train"] = prepared["train"].cast_column("image", Image())
    return prepared


def prepare_batch(batch: dict, indices: list[int], store: Callable, column: str) -> dict:
    """Prepare a batch for `make_rows`; see `prepare`. An image that cannot be read leaves its reason in `error`."""

    # Threads are enough, because Pillow releases the interpreter while it decodes, resizes and encodes.
    def prepare_one(source: dict, name: str, digest: str) -> tuple:
        try:
            content = read_bytes(source)
            if hashlib.sha256(content).hexdigest() != digest:  # it would be kept under the name of another image
                return None, f"{name}: it has changed since it was read. If starting again does not help, `touch` it"
            return store(content), None
        except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
            return None, f"{name}: {reason(error)}"

    with pool_of_single_threads(count_cores()) as pool:  # other processes wait for this one
        stored, errors = zip(*pool.map(prepare_one, batch["image"], batch["name"], batch["digest"]), strict=True)
    return {column: list(stored), "digest": batch["digest"], "error": list(errors)}


def store_training_image(data: bytes, shorter_side: int) -> dict:
    """Return what is stored of a training image, as `datasets.Image` has it; see `prepare`."""
    image, changed, _, size_in_file = decode_rgb(data, shorter_side)
    stored = io.BytesIO()
    if min(size_in_file) > shorter_side:  # even if it was decoded at a reduced scale, at just this size
        scale = min(shorter_side / min(image.size), MAX_JPEG / max(image.size))
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image.resize(size, PILImage.Resampling.BICUBIC, reducing_gap=3).save(stored, "JPEG", quality=90, subsampling=0)
    elif changed:
        image.save(stored, "PNG", compress_level=1)
    return {"bytes": stored.getvalue() or data, "path": None}


def view_packer(view: EvaluationView) -> Callable[[bytes], bytes]:
    """Return the function from an image file to its packed evaluation view, or to the file; see `prepare`."""
    height, width = view.measure().size

    def pack(data: bytes) -> bytes:
        image = decode_rgb(data).image
        small = SMALL * len(data) <= 3 * height * width and image.width * image.height <= SMALL * height * width
        return data if small else view.pack(view(image))

    return pack


# --- transform


def with_transforms(
    splits: DatasetDict,
    view: EvaluationView,
    augmentation: str,
    test_view: str,
    size: tuple[int, int] | None = None,
    stream: Stream | None = None,
) -> dict[str, Dataset | StreamedRows]:
    """Return prepared splits whose rows are `pixel_values` and `labels`, made when they are accessed.

    Args:
        splits: of `prepare`.
        view: that validation and test are seen in.
        augmentation: of train, see `views.training_transform`.
        test_view: `evaluation`, or `random_crop` to see test in random crops of the evaluation view.
        size: (height, width) of the random crops of train, in pixels, if not the view's own.
        stream: what train is read from; the split "train" is a sample of it.
    """
    if stream:
        augment, shorter_side = training_transform(view, augmentation, size), STORED_SIDE * max(view.size)
        train = stream.rows(lambda data: augment(decode_rgb(data, shorter_side).image))
    else:
        train = training_rows(splits["train"], view, augmentation, size)
    held_out = {split: evaluation_rows(splits[split], view, ["label"]) for split in ("validation", "test")}
    if test_view == "random_crop":
        crop = random_crop_transform(view)
        transform = batch_transform("view", lambda packed: crop(view.unpack(packed)))
        held_out["test"] = held_out["test"].with_transform(transform)
    return {"train": train, **held_out}


def training_rows(
    dataset: Dataset, view: EvaluationView, augmentation: str, size: tuple[int, int] | None = None
) -> Dataset:
    """Return the prepared split "train" with rows of `pixel_values`, see `training_transform`, and `labels`."""
    return dataset.with_transform(batch_transform("image", training_transform(view, augmentation, size)))


def join_for_training(
    splits: Sequence[Dataset], view: EvaluationView, augmentation: str, size: tuple[int, int]
) -> Dataset:
    """Return the `training_rows` of several loaded splits together.

    Raises:
        ImagesChanged: see `prepare`.
    """
    joined = prepare(DatasetDict(train=concatenate_datasets(list(splits))), view, quiet=True)
    return training_rows(joined["train"], view, augmentation, size)


def sample_rows(dataset: Dataset, image_processor: BaseImageProcessor) -> Dataset:
    """Return a loaded split whose rows are the `pixel_values` of an image processor, of the files as they are."""
    view = EvaluationView(image_processor)
    transform = batch_transform("image", lambda source: view(decode_rgb(read_bytes(source)).image), available_cores())
    return dataset.select_columns(["image"]).with_transform(transform)


def evaluation_rows(dataset: Dataset, view: EvaluationView, columns: Sequence[str] = ()) -> Dataset:
    """Return a prepared split, train too, whose rows are the `pixel_values` of evaluation, and `labels` if asked."""
    column, transform = ("view", view.measure().unpack) if "view" in dataset.column_names else ("image", view)
    # Nothing in it is random, so that threads may share it.
    return dataset.select_columns([column, *columns]).with_transform(batch_transform(column, transform, VIEW_THREADS))


def feature_rows(splits: DatasetDict, view: EvaluationView) -> dict[str, ImageRows]:
    """Return the `evaluation_rows` of each prepared split, and what they depend on: images, view, how it is stored."""
    return {
        split: ImageRows(
            evaluation_rows(dataset, view),
            cache_key(_view_key(view), "view" in dataset.column_names),
            list_of(dataset, "digest"),
        )
        for split, dataset in splits.items()
    }


def batch_transform(column: str, transform: Callable[..., torch.Tensor], threads: int = 1) -> Callable[[dict], dict]:
    """Return the `with_transform` function that makes `pixel_values` of a column, row by row, and keeps the label.

    Args:
        column: of the images.
        transform: makes the pixel values of one.
        threads: how many make them at a time, at most; a data worker makes one at a time, because there are many.
    """

    def transform_batch(batch: dict) -> dict:
        if threads > 1 and len(batch[column]) > 1 and get_worker_info() is None:
            with pool_of_single_threads(min(threads, available_cores())) as pool:
                rows = {"pixel_values": list(pool.map(transform, batch[column]))}
        else:
            rows = {"pixel_values": [transform(entry) for entry in batch[column]]}
        return rows | ({"labels": batch["label"]} if "label" in batch else {})

    return transform_batch


def _view_key(view: EvaluationView) -> str:
    """Return what stored images depend on besides the images themselves."""
    libraries = library_versions("pillow", "pi-heif", "timm", "torchvision", "transformers")
    return cache_key(PREPARATION, view.image_processor.to_json_string(), libraries)
