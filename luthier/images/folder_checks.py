"""Whether folders are classes or splits, or what else they may be."""

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from luthier.errors import UserError
from luthier.images.decode import is_hidden, is_image
from luthier.images.image_files import ARCHIVES, refuse_folder
from luthier.terminal import plural, say

SPLIT_OF_FOLDER = {
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "dev": "validation", "validate": "validation", "test": "test", "testing": "test",
}  # fmt: skip
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # which `tables.read_table` reads
# As `datasets` names them, TSV, and as Roboflow does.
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet", "_classes.csv")
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
PART = re.compile(r"((?:.*[^a-z])?(?:part|batch|chunk|images?)[^a-z\d]*)\d+")  # as archives of a large set are called
ELSEWHERE = ". If the labels are elsewhere, as in the file names, give a table (docs/usage.md)"
MOST_SPLITS = 5  # folders that splits may be; more are classes


def check_names(root: Path, folders: list[Path]) -> None:
    """Check that folders are classes, and not splits of which some have names that are not known.

    Raises:
        UserError: some are called like splits, and have folders of the same names in them, as class folders are.
    """
    for folder in folders:
        if folder.name.lower() in SPLIT_OF_FOLDER:
            shared = sorted({each.name for each in subfolders(unpacked(folder))} & {each.name for each in folders})
            if len(shared) > 1:  # one name is chance
                is_train = SPLIT_OF_FOLDER[folder.name.lower()] == "train"  # which may hold the same images
                remedy = f"Give --data_dir {folder}" if is_train else f"Put the other classes into {root / 'train'}"
                raise UserError(
                    f"{root} holds {folder.name}, which looks like a split: it has folders of the same names as those "
                    f"beside it, such as {shared[0]}. {remedy}. If {folder.name} is a class, give it another name"
                )
    divider = r"(?:(?:data)?sets?|data|images)?(?:[^a-z]+|$)"  # `trainset` and `TestData` are called like splits, too
    words = {folder: {*re.split(divider, folder.name.lower())} & SPLIT_OF_FOLDER.keys() for folder in folders}
    split_of = {folder: SPLIT_OF_FOLDER[min(each)] for folder, each in words.items() if len(each) == 1}
    if not split_of or len(folders) > MOST_SPLITS:
        return
    below = {folder: {each.name for each in subfolders(unpacked(folder))} for folder in folders}
    differ = len(set(split_of.values())) == len(split_of) > 1  # each is called like another split
    unlabelled = differ and len(split_of) == len(folders) and not any(below.values())
    if unlabelled and (hint := hint_at_table(root)):  # without a table, they may be classes
        raise UserError(
            f"{root} holds {', '.join(folder.name for folder in folders)}, which look like splits, but no class "
            f"folders in them{hint}. If these are classes, give them other names"
        )
    candidates = [[folder] for folder in split_of if folder.name.lower() in SPLIT_OF_FOLDER]
    if differ:
        candidates.insert(0, list(split_of))
    for like_splits in candidates:
        others = [folder for folder in folders if folder not in like_splits]
        if _hold_same_classes(like_splits, others, below):
            names = ", ".join(folder.name for folder in like_splits)
            look, it = ("look like splits", "them") if len(like_splits) > 1 else ("looks like a split", "it")
            beside = f", and beside {it} {', '.join(folder.name for folder in others)}" if others else ""
            raise UserError(
                f"{root} holds {names}, which {look}{beside}: call the splits train, validation and test, and move "
                "what is none elsewhere. If these are classes, give them other names"
            )


def _hold_same_classes(like_splits: list[Path], others: list[Path], below: dict[Path, set[str]]) -> bool:
    """Tell whether the folders in some folders are the classes of a dataset that is divided into splits.

    Args:
        like_splits: folders that are called like splits.
        others: the folders beside them.
        below: the names of the folders in each.
    """
    if len(like_splits) > 1 and len(others) > 1:
        return False  # words in a few of the names are chance
    shared = set.intersection(*(below[folder] for folder in like_splits))
    least = 1 if len(like_splits) > 1 and not others else 2  # one name that only some folders share is chance
    if len(shared) < least:
        return False
    # One folder without class folders may be of images without labels. Several are classes.
    unlabelled = len(others) == 1 and not below[others[0]]
    return unlabelled or all(below[other] & shared for other in others)


def check_classes(root: Path, to_train: bool) -> None:
    """Check that the splits are not in the class folders, nor all class folders in one.

    Raises:
        UserError: they are.
    """
    if to_train:
        check_only_folder(root, "classes or splits, give --data_dir {only}")
    names = set[str]()
    for folder in subfolders(root):
        below = {each.name for each in subfolders(folder)}
        names |= below
        if not below or any(name.lower() not in SPLIT_OF_FOLDER for name in below):
            return
    found = {SPLIT_OF_FOLDER[name.lower()] for name in names}
    if "train" in found and len(found) > 1:
        raise UserError(
            f"the class folders of {root} hold the splits {', '.join(sorted(names))}. Put the splits first: "
            f"{root}/train/CLASS/image.jpg"
        )


def check_parts(root: Path) -> None:
    """Check that folders are classes, and not the parts of a large set of images whose classes are in a table.

    Raises:
        UserError: all are called like parts, and a table lies beside them.
    """
    names = [folder.name for folder in subfolders(root)]
    found = [PART.fullmatch(name.lower()) for name in names]
    alike = len(names) > 1 and all(found) and len({match[1] for match in found if match}) == 1
    if alike and (hint := hint_at_table(root)):
        raise UserError(
            f"{root} holds {names[0]}, ..., {names[-1]}, which look like parts of one set of images{hint}. If these "
            "are classes, give them other names"
        )


def check_only_folder(root: Path, remedy: str) -> None:
    """Check that the class folders are not all in one folder.

    Args:
        root: where the class folders should be.
        remedy: the end of the message, with {root} and with {only}, the folder that they are in.

    Raises:
        UserError: they are.
    """
    only, inner = root, subfolders(root)
    while len(inner) == 1 and not holds_images(inner[0]):  # an archive may have several folders around
        only, inner = inner[0], subfolders(inner[0])
    if only != root and len(inner) > 1:
        raise UserError(
            f"{root} has one folder, {only.relative_to(root)}, and that has {plural(len(inner), 'folder')}, such as "
            f"{inner[0].name}. If these are the {remedy.format(root=root, only=only)}"
        )


def say_inner_classes(root: Path) -> None:
    """Say so where all class folders hold the same folders, which may be the classes: of several days, for one."""
    folders = subfolders(root)
    inner = {each.name for each in subfolders(folders[0])} if len(folders) > 1 else set()
    for folder in folders[1:]:
        inner = inner and inner & {each.name for each in subfolders(folder)}  # most have none, and need no other look
    if len(inner) > 1:
        first, name = folders[0].name, min(inner)
        say(
            "careful",
            f"the classes are {first}, ..., and all of them have folders of the same names, such as {name}. If those "
            f"are the classes, move the folders, to {root / name / first}, and add --group_by folder. If they are "
            "people, videos or places, add that alone. If they are views, such as front and back, change nothing",
        )


def hint_at_table(root: Path) -> str:
    """Return the end of a message where a table in the folder may hold the classes; an empty text where none is there.

    A metadata file is not meant: it has been tried.
    """
    files = [path for path in sorted(root.iterdir()) if not is_hidden(path.name)]
    tables = [path for path in files if path.suffix.lower() in TABLES and path.name not in METADATA]
    sheets = [path.name for path in files if path.suffix.lower() in SPREADSHEETS]
    if sheets and not tables:
        return f". If {sheets[0]} holds the classes, save it as CSV, and give that with --labels"
    tables.sort(key=lambda path: not re.search("train|label", path.name.lower()))  # not a competition's submission
    return f". If {tables[0].name} holds the classes, give --labels {tables[0]}" if tables else ""


def hint_at_archive(root: Path) -> str:
    """Return the end of a message where a file in the folder may hold the images; an empty text where none does."""
    names = [path.name for path in sorted(root.iterdir()) if path.suffix.lower() in ARCHIVES]
    return f". If {names[0]} holds the images, unpack it first" if names else ""


def are_splits(names: Iterable[str]) -> bool:
    """Tell whether names are all of splits, of train and another one."""
    splits = {SPLIT_OF_FOLDER.get(name.lower()) for name in names}
    return "train" in splits and len(splits) > 1 and None not in splits


def unpacked(folder: Path) -> Path:
    """Return a folder, or the one of the same name in it where there is nothing else: archives make `train/train`."""
    below = subfolders(folder)
    doubled = len(below) == 1 and below[0].name == folder.name and not holds_images(folder)
    return unpacked(below[0]) if doubled else folder


def holds_images(folder: Path) -> bool:
    """Tell whether images lie in a folder itself, and not in a folder below it."""
    return any(is_image(path.name) for path in folder.iterdir())


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry)]
    except OSError as error:
        refuse_folder(error)
    # Not the paths: those of Windows are sorted without regard to capitals, and a run begun elsewhere would not go on.
    return [folder / name for name in sorted(names)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link that leads to itself leads to no folder
            raise
        return False
