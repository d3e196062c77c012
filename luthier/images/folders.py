"""A folder of class folders as a dataset, without the traps of the `imagefolder` loader of `datasets`.

`imagefolder` skips files silently, loses every label to one nested file, and takes a class folder called "freight
train" for a split.
"""

import logging
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath

from datasets import DatasetDict

from luthier.errors import UserError
from luthier.images.decode import CONVERT, EXTENSIONS, is_hidden, is_image, is_unread
from luthier.images.folder_checks import (
    ELSEWHERE,
    SPLIT_OF_FOLDER,
    check_classes,
    check_names,
    check_only_folder,
    check_parts,
    hint_at_archive,
    hint_at_table,
    holds_images,
    say_inner_classes,
    subfolders,
    unpacked,
)
from luthier.images.image_files import (
    as_text,
    explain_no_folder,
    refuse_run,
    remedy_without_images,
    walk,
    warn_of_skipped,
)
from luthier.images.listed_images import Grouping, ListedImage, load_listed
from luthier.terminal import plural, say

logger = logging.getLogger(__name__)

FILE_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}")  # of a file, and not of a class such as `v1.0` or `St.Bernard`
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
        check_classes(root, to_train)
        check_parts(root)
        if not grouping:
            say_inner_classes(root)
        roots = {"train": root}
    if "train" not in roots:
        roots = {"train": roots.get("test") or roots["validation"]}
    if to_train:
        if roots["train"] != root and not holds_images(roots["train"]):
            check_only_folder(roots["train"], "classes, move them to {root}, and do the same in the other splits")
        roots = {split: folder for split, folder in roots.items() if split == "train" or not _is_unlabelled(folder)}
    skipped: list[str] = []
    files = {
        split: _list_class_folders(folder, root, skipped, grouping, to_train and split == "train")
        for split, folder in roots.items()
    }
    _check_found(root, roots, files)
    warn_of_skipped(skipped)
    hint = hint_at_table(root)
    if to_train and len(classes := {image.label for listed in files.values() for image in listed}) == 1:
        hint = hint or hint_at_table(roots["train"]) or ELSEWHERE
        raise UserError(f"all images have the one class {min(classes)!r}: a classifier needs at least two{hint}")
    if hint:
        say("labels", f"of the class folders{hint}")
    return load_listed(files)


def _check_found(root: Path, roots: dict[str, Path], files: dict[str, list[ListedImage]]) -> None:
    """Check that every split has images.

    Args:
        root: of all splits.
        roots: the folder of each split.
        files: the images of each.

    Raises:
        UserError: one has none.
    """
    if not any(files.values()):
        hint = hint_at_table(root) or (ELSEWHERE if holds_images(root) else hint_at_archive(root))
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
    splits = {SPLIT_OF_FOLDER[folder.name.lower()]: unpacked(folder) for folder in named}
    with_classes = any(subfolders(folder) for folder in splits.values())
    to_score = not to_train and with_classes and len(named) == len(folders)
    if ("train" not in splits and not to_score) or (len(named) == 1 and len(folders) > 1):
        check_names(root, folders)
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


def _check_shards(folder: Path, *places: Path) -> None:
    """Raise UserError where folders hold Parquet or tar files: these are no folders of images."""
    if any(path.suffix in SHARDS for place in places for path in place.iterdir()):
        raise UserError(
            f"{folder} holds Parquet or tar files: give --dataset_name {folder}, or --data_dir with the folder that "
            "they are in"
        )


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
