"""A dataset by name: loaded with its own columns, and checked for what `datasets` does not check."""

import contextlib
import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tarfile import TarError
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub.utils import httpx  # or httpx2, by its version

from luthier.errors import UserError
from luthier.images.archives import check_whole
from luthier.images.columns import is_image_feature
from luthier.images.folder_checks import SPLIT_OF_FOLDER
from luthier.images.image_files import explain_no_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLAN = "shards.json"  # in a folder that prepare.py writes: what its files are made of
# What `datasets` looks for on the Hub; any other name that is not there is a wrong path.
HUB_NAME = re.compile(r"(hf://|buckets/).+|[\w.-]+(/[\w.-]+)?")


def load_named(dataset_name: str, dataset_config_name: str | None, to_train: bool) -> DatasetDict:
    """Load the splits train, validation and test of a dataset, as far as it has them, with its own columns.

    Args:
        dataset_name: what `datasets.load_dataset` takes: a Hub name or a local dataset folder.
        dataset_config_name: the configuration, where the dataset has several.
        to_train: see `named_splits`.

    Raises:
        UserError: it cannot be loaded, is not complete, names files that are not its own, or has no split to train on.
    """
    is_path = dataset_name.startswith(".") or not HUB_NAME.fullmatch(dataset_name)
    if is_path and not Path(dataset_name).exists():
        found = explain_no_folder(Path(dataset_name), "", may_be_name=True)
        raise UserError(f"{dataset_name} is no dataset on the Hub, and not a folder, {found}")
    check_complete(Path(dataset_name))
    with explain_loading(dataset_name):
        if (Path(dataset_name) / "state.json").exists():
            raise UserError(f"{dataset_name} was written by save_to_disk: write Parquet files, with to_parquet")
        builder = load_dataset_builder(resolved(dataset_name), dataset_config_name)
        urls = list(itertools.chain.from_iterable((builder.config.data_files or {}).values()))
        check_own_files(urls, dataset_name)
        builder.download_and_prepare()  # not `load_dataset`, which would look again which files there are
        loaded = builder.as_dataset()
        if Path(dataset_name).is_dir():
            for url in urls:
                _check_file(url, next(iter(loaded.values())).features)
    check_holds_images(loaded, dataset_name)
    return DatasetDict(named_splits(loaded, dataset_name, to_train))


def check_own_files(urls: Iterable[str], dataset_name: str) -> None:
    """Check that a dataset is made of its own files: its README may name any files, those of this machine too.

    Args:
        urls: of its files, as `datasets` has found them; `zip://a.png::URL` is a file of an archive.
        dataset_name: a folder, or a name on the Hub.

    Raises:
        UserError: a file is elsewhere on this machine, on its network, or in another repository, which may be one of
            the user's private ones.
    """
    folder = Path(dataset_name)
    folders = (folder.resolve(), Path(os.path.normpath(folder.absolute())))  # a link has two names
    name = dataset_name.removeprefix("hf://").removeprefix("datasets/")
    repository = f"hf://{name}/" if name.startswith("buckets/") else f"hf://datasets/{name}@"
    for url in urls:
        place = url.rpartition("::")[2]
        if folder.is_dir() and any(Path(os.path.normpath(place)).is_relative_to(own) for own in folders):
            continue
        if not place.startswith((repository, "https://")):
            raise UserError(
                f"the README of {dataset_name} names a file that is not its own ({place}): correct `data_files` "
                "there, or put the file into the folder"
            )


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
            if is_image_feature(feature):
                for images in dataset.data.column(column).chunks:
                    outside = pc.and_(pc.is_null(images.field("bytes")), pc.is_valid(images.field("path")))
                    if pc.any(outside).as_py():
                        path = images.field("path").filter(outside)[0].as_py()
                        raise UserError(
                            f"the split {split} of {dataset_name} names a file instead of an image ({path}): "
                            "write the images themselves into the dataset, or give a table of files with --labels"
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
        if isinstance(feature, ClassLabel) and isinstance(expected, Value) and "string" in expected.dtype:
            raise UserError(
                f"{url} has numbers in the column {column!r}, and names for them ({', '.join(feature.names)}), where "
                "other files have texts: its numbers would be read as texts. Write all files alike"
            )
        if isinstance(feature, ClassLabel) and isinstance(expected, ClassLabel) and feature.names != expected.names:
            raise UserError(
                f"{url} numbers the classes of the column {column!r} by the names {', '.join(feature.names)}, and the "
                f"dataset by {', '.join(expected.names)}. Write all files with the same names, in the same order"
            )


def resolved(dataset_name: str) -> str:
    """Return the whole path of a folder, because `datasets` cannot load `.`; another name as it is.

    Raises:
        UserError: `datasets` would take the path for a pattern.
    """
    if not Path(dataset_name).is_dir():
        return dataset_name
    path = str(Path(dataset_name).resolve())
    if glob.has_magic(path):
        raise UserError(f"{path} has one of * ? [ in it, which would be taken for a pattern: rename the folder")
    return path


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
            "name or the path, or connect this machine. train.py and score.py take a folder as --data_dir"
        ) from error
    except FileNotFoundError as error:  # as the library's DatasetNotFoundError is
        if Path(dataset_name).exists():
            raise UserError(f"cannot load {dataset_name}: {' '.join(str(error).split())}") from error
        raise UserError(
            f"there is no folder {dataset_name}, and no dataset {dataset_name!r} on the Hub, or it is private or "
            "gated. Check the name or the path, and log in with `hf auth login` if it needs rights. train.py and "
            "score.py take a folder as --data_dir"
        ) from error
    except (DatasetsError, TarError, ValueError, RuntimeError, OSError) as error:  # several configurations, damage
        cause = " ".join(str(error.__cause__ or error).split())  # of an error while files are read
        if cause.startswith("invalid literal for int"):
            cause += ". In archives .cls files hold numbers: write names into .txt files (--label_column txt)"
        raise UserError(f"cannot load {dataset_name}: {cause}") from error


def named_splits(loaded: Mapping[str, T], dataset_name: str, to_train: bool = True) -> dict[str, T]:
    """Return the splits of a dataset by the names train, validation and test; a single one is train.

    Args:
        loaded: the splits by their own names.
        dataset_name: for the error.
        to_train: False takes test (or validation) for train where there is none, because a model is scored only.

    Raises:
        UserError: there is no split to train on, or two have one meaning.
    """
    splits: dict[str, T] = {}
    for name, content in loaded.items():
        split = "train" if len(loaded) == 1 else SPLIT_OF_FOLDER.get(name.lower())
        if split in splits:
            raise UserError(f"{dataset_name} has two {split} splits: {', '.join(loaded)}. Rename one")
        if split is None:
            logger.warning(f"Not used: the split {name!r} of {dataset_name}")
        else:
            splits[split] = content
    if splits and "train" not in splits and not to_train:
        return {"train": splits["test" if "test" in splits else "validation"]}
    if "train" not in splits:
        raise UserError(f"{dataset_name} has the splits {', '.join(loaded)}, but none to train on: call one train")
    return splits
