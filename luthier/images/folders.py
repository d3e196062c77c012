"""A folder of class folders as a dataset, without the traps of the `imagefolder` loader of `datasets`.

`imagefolder` skips files silently, loses every label to one nested file, and takes a class folder called "freight
train" for a split.
"""

import logging
import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from datasets import DatasetDict

from luthier.errors import UserError
from luthier.images.decode import CONVERT, EXTENSIONS, is_hidden, is_image, is_unread
from luthier.images.image_files import (
    as_text,
    explain_no_folder,
    refuse_folder,
    refuse_run,
    remedy_without_images,
    walk,
    warn_of_skipped,
)
from luthier.images.listed_images import Grouping, ListedImage, load_listed
from luthier.terminal import plural, say

logger = logging.getLogger(__name__)

SPLIT_OF_FOLDER = {
    "train": "train", "training": "train", "validation": "validation", "val": "validation", "valid": "validation",
    "dev": "validation", "validate": "validation", "test": "test", "testing": "test",
}  # fmt: skip
FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}")  # of a file, and not of a class such as `v1.0` or `St.Bernard`
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")  # which `tables.read_table` reads
# As `datasets` names them, TSV, and as Roboflow does.
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet", "_classes.csv")
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
PART = re.compile(r"((?:.*[^a-z])?(?:part|batch|chunk|images?)[^a-z\d]*)\d+")  # as archives of a large set are called
ELSEWHERE = ". If the labels are elsewhere, as in the file names, give a table (docs/usage.md)"
MOST_SPLITS = 5  # folders that splits may be; more are classes
SHARDS = (".parquet", ".tar")  # of files that hold many images


def load_folder(root: Path, grouping: Grouping | None, to_train: bool) -> DatasetDict:
    """Load the splits that a folder holds, or all of it as `train`.

    Args:
        root: the folder.
        grouping: gives an image's group by its path below the class folder, see `groups.build_grouping`; or None.
        to_train: False takes the folder of test (or validation) for `train` where there is none, because a model is
            scored only.

    Returns the splits as `load_listed` does.

    Raises:
        UserError: there are no images in class folders, or the splits are not what they seem.
    """
    check_folder(root, "give one with a folder of images for each class")
    refuse_run(root.iterdir())
    roots = _split_folders(root, to_train)
    for folder in (root, *roots.values()):
        _check_links(folder)
    if not roots:
        _check_classes(root, to_train)
        _check_parts(root)
        if not grouping:
            _say_inner_classes(root)
        roots = {"train": root}
    if "train" not in roots:
        roots = {"train": roots.get("test") or roots["validation"]}
    if to_train:
        roots = {split: folder for split, folder in roots.items() if split == "train" or not _is_unlabelled(folder)}
    skipped: list[str] = []
    files = {
        split: _list_class_folders(folder, root, skipped, grouping, to_train and split == "train")
        for split, folder in roots.items()
    }
    if not any(files.values()):
        hint = hint_at_table(root) or (ELSEWHERE if holds_images(root) else "")
        raise UserError(
            f"{root} has no images in class folders. Expected {root}/CLASS/image.jpg, in the formats "
            f"{', '.join(sorted(EXTENSIONS))}{hint}"
        )
    for split, listed in files.items():
        if not listed:
            if holds_images(roots[split]):
                raise UserError(
                    f"the images of the split folder {roots[split]} have no labels, because they are in no class "
                    "folders: sort them, or move the folder elsewhere"
                )
            raise UserError(
                f"the split folder {roots[split]} has no images: fill it, or remove it, and a split is cut from train"
            )
    warn_of_skipped(skipped)
    if hint := hint_at_table(root):
        say("labels", f"of the class folders{hint}")
    return load_listed(files)


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


def are_splits(names: Iterable[str]) -> bool:
    """Tell whether names are all of splits, of train and another one."""
    splits = {SPLIT_OF_FOLDER.get(name.lower()) for name in names}
    return "train" in splits and len(splits) > 1 and None not in splits


def check_folder(folder: Path, advice: str) -> None:
    """Check that `--data_dir` is a folder.

    Raises:
        UserError: it is none, with advice on which to give.
    """
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder} is not a folder, {explain_no_folder(folder, advice)}")
    as_text(folder.resolve())  # or nothing about it could be written down


def _split_folders(root: Path, to_train: bool) -> dict[str, Path]:
    """Return the folder of each split, or nothing where the folders are classes."""
    folders = subfolders(root)
    named = [folder for folder in folders if folder.name.lower() in SPLIT_OF_FOLDER]
    splits = {SPLIT_OF_FOLDER[folder.name.lower()]: _unpacked(folder) for folder in named}
    with_classes = any(subfolders(folder) for folder in splits.values())
    to_score = not to_train and with_classes and len(named) == len(folders)
    if ("train" not in splits and not to_score) or (len(named) == 1 and len(folders) > 1):
        _check_names(root, folders)
        return {}  # images of trains are not a training split
    names = ", ".join(folder.name for folder in named)
    if len(splits) < len(named):
        raise UserError(f"{root} holds two folders for one split: {names}. Merge or remove one")
    if len(named) == len(folders) and not with_classes:
        _check_shards(root, *splits.values())
        raise UserError(
            f"{root} has the splits {names}, but no class folders in them: put the images in folders such as "
            f"{splits['train']}/CLASS{hint_at_table(root)}"
        )
    if len(named) < len(folders) and with_classes:
        others = ", ".join(folder.name for folder in folders if folder not in named)
        raise UserError(
            f"{root} holds the splits {names} and beside them {others}: move what is not a split elsewhere"
        )
    return splits if with_classes else {}


def _unpacked(folder: Path) -> Path:
    """Return a folder, or the one of the same name in it where there is nothing else: archives make `train/train`."""
    below = subfolders(folder)
    doubled = len(below) == 1 and below[0].name == folder.name and not holds_images(folder)
    return _unpacked(below[0]) if doubled else folder


def holds_images(folder: Path) -> bool:
    """Tell whether images lie in a folder itself, and not in a folder below it."""
    return any(is_image(path.name) for path in folder.iterdir())


def _is_unlabelled(folder: Path) -> bool:
    """Tell whether the folder of a split holds images without labels, as in a competition, and say so."""
    is_unlabelled = holds_images(folder) and not subfolders(folder)
    if is_unlabelled:
        logger.warning(f"Not used: the images in {folder}, which have no labels, because they are in no class folders")
    return is_unlabelled


def _check_links(folder: Path) -> None:
    """Check that no class or split is a link to a disk that is away; a link to another file is reported later.

    Raises:
        UserError: one is.
    """
    with os.scandir(folder) as entries:
        links = [Path(entry.path) for entry in entries if entry.is_symlink() and not is_hidden(entry.name)]
    for link in links:
        if not FILE_SUFFIX.fullmatch(link.suffix) and not link.exists():
            raise UserError(f"{link} is a link to what is not there: mend or remove it")


def _check_names(root: Path, folders: list[Path]) -> None:
    """Check that folders are classes, and not splits of which some have names that are not known.

    Raises:
        UserError: some are called like splits, and have folders of the same names in them, as class folders are.
    """
    for folder in folders:
        if folder.name.lower() in SPLIT_OF_FOLDER:
            shared = sorted({each.name for each in subfolders(_unpacked(folder))} & {each.name for each in folders})
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
    below = {folder: {each.name for each in subfolders(_unpacked(folder))} for folder in folders}
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


def _check_classes(root: Path, to_train: bool) -> None:
    """Check that the splits are not in the class folders, nor all class folders in one.

    Raises:
        UserError: they are.
    """
    names, folders = set[str](), subfolders(root)
    only, inner = root, folders
    while to_train and len(inner) == 1 and not holds_images(inner[0]):  # an archive may have several folders around
        only, inner = inner[0], subfolders(inner[0])
    if only != root and len(inner) > 1:
        raise UserError(
            f"{root} has one folder, {only.relative_to(root)}, and that has {plural(len(inner), 'folder')}, such as "
            f"{inner[0].name}. If these are the classes or splits, give --data_dir {only}"
        )
    for folder in folders:
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


def _check_parts(root: Path) -> None:
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


def _say_inner_classes(root: Path) -> None:
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


def _check_shards(folder: Path, *places: Path) -> None:
    """Raise UserError where folders hold Parquet or tar files: these are no folders of images."""
    if any(path.suffix in SHARDS for place in places for path in place.iterdir()):
        raise UserError(
            f"{folder} holds Parquet or tar files: give --dataset_name {folder}, or --data_dir with the folder that "
            "they are in"
        )


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    except OSError as error:
        refuse_folder(error)
    # Not the paths: those of Windows are sorted without regard to capitals, and a run begun elsewhere would not go on.
    return [folder / name for name in sorted(names)]


def _list_class_folders(
    split_root: Path, root: Path, skipped: list[str], grouping: Grouping | None, is_learned: bool
) -> list[ListedImage]:
    """Return every image, at any depth below a class folder; add other files to `skipped`."""
    listed = []
    skipped.extend(
        str(entry.relative_to(root))
        for entry in split_root.iterdir()
        if not is_hidden(entry.name) and (entry.is_file() or not entry.exists())
    )
    for folder in subfolders(split_root):
        # macOS and Linux write an accented letter differently; a model must not see two classes in that.
        label = unicodedata.normalize("NFC", folder.name)
        files, others = [], []
        for path in (directory / name for directory, names in walk(folder) for name in names):
            if is_image(path.name):
                group = grouping(PurePosixPath(path.relative_to(folder).as_posix())) if grouping else ""
                files.append(ListedImage(as_text(path), label, group))
            else:
                others.append(path)
        skipped.extend(str(path.relative_to(root)) for path in others)
        if files or is_learned:  # or else it is no class
            refuse_run(others)
        unread = [path.name for path in others if is_unread(path.name)]
        if not files and unread:
            raise UserError(
                f"the class folder {folder} has {plural(len(unread), 'image')} in a format that is not read, such as "
                f"{unread[0]}: {CONVERT}"
            )
        if not files and is_learned:
            _check_shards(folder, folder)
            formats = f" in the formats {', '.join(sorted(EXTENSIONS))}, but {others[0].name}" if others else ""
            raise UserError(f"the class folder {folder} has no images{formats}: {remedy_without_images(others)}")
        listed += files
    return listed
