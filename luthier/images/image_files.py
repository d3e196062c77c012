"""The image files below a folder, found by what a table calls them."""

import itertools
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from luthier.errors import UserError
from luthier.images.decode import CLOUD, CONVERT, EXTENSIONS, is_hidden, is_image, is_unread
from luthier.run_files import CONFIG, LEARNED_FROM, METRICS, RACE
from luthier.terminal import plural

logger = logging.getLogger(__name__)

SAMPLE = 1000  # rows by which columns, and the folders to skip, are found
MAX_NAME = 1000  # characters of a file's name with its folders
MAX_DIGITS = 15  # of a number that a spreadsheet keeps whole
ARCHIVES = {".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".xz", ".bz2"}
OF_RUN = (RACE, LEARNED_FROM, "trainer_state.json")  # in the folder of a run, or of a checkpoint of it
# What a run has beside these. Data has such files too: labels of faces by race, for one, are a race.json.
BESIDE = (METRICS, CONFIG, "race/*/checkpoint-*", "checkpoint-*", "*.safetensors")
ANNOTATIONS = (".json", ".xml", ".txt")  # endings of files that say what is where in an image


class ImageFiles:
    """The image files below a folder, found by what a table calls them.

    A name may lack its extension, or the folders above it. It may begin with folders that are not here, such as those
    of another machine.

    Attributes:
        root: the folder.
        paths: of the image files, relative to it, sorted.
    """

    def __init__(self, root: Path):
        self.root = root
        # A folder that cannot be read may be one of the system, which no row needs.
        found = (folder / name for folder, names in walk(root, lambda _: None) for name in names if is_image(name))
        self.paths = sorted((PurePosixPath(path.relative_to(root).as_posix()) for path in found), key=str)
        self._named: dict[int, dict[tuple[str, ...], list[PurePosixPath]]] = {}

    def find_all(self, names: Sequence[str]) -> list[Path | str]:
        """Return the path of each image of a table, or why there is none."""
        skip = self.folders_to_skip(names)
        found = [self.find(name, skip) for name in names]
        self._say_other_folder(names, found, skip)
        deeper = [
            (name, path)
            for name, path in zip(names, found, strict=True)
            if isinstance(path, Path) and len(path.parts) - len(self.root.parts) > len(_parts(name) or []) - skip
        ]
        if deeper and len(deeper) < len(found) / 2:  # where most are, names without folders mean files in any of them
            logger.warning(
                f"{plural(len(deeper), 'image')} found in folders that the table does not name, such as "
                f"{as_text(deeper[0][1].relative_to(self.root))} for {deeper[0][0]}"
            )
        return found

    def _say_other_folder(self, names: Sequence[str], found: Sequence[Path | str], skip: int) -> None:
        """Say so where images lie in another folder than the one that all names begin with."""
        pairs = ((name, path) for name, path in zip(names, found, strict=True) if isinstance(path, Path))
        name, path = next(pairs, ("", self.root))
        parts = _parts(name) or []
        if skip and path.absolute().parents[len(parts) - skip - 1].name.casefold() != parts[skip - 1].casefold():
            logger.warning(
                f"Ignored: {'/'.join(parts[:skip])} at the beginning of all names of files, which is not here. "
                f"{name} is taken for {as_text(path.relative_to(self.root))}"
            )

    def find(self, name: str, skip: int) -> Path | str:
        """Return the path of an image, or why there is none.

        Args:
            name: as in a table.
            skip: how many folders at its beginning are not here.
        """
        if not name:
            return "there is no file name"
        if _parts(name) is None:
            return f"{name!r} leads out of the folder"
        found = self.matches(name, skip)
        if not found:
            stem, point, ending = name.rpartition(".")
            is_ending = point and not {"/", "\\"} & {*ending}
            if is_ending and (others := self.matches(stem, skip)):  # as after all were converted
                return f"there is no image {name!r}, but {others[0]}: write that name"
            if name.isdecimal() and (others := self._with_zeros(name, skip)):
                remedy = "has a spreadsheet removed zeros? Write the whole name"
                return f"there is no image {name!r}, but {others[0]}: {remedy}"
            if is_unread(name):
                return f"{name!r} is in a format that is not read: {CONVERT}"
            return f"there is no image {name!r} below {self.root}"
        if len(found) > 1:
            remedy = "write the whole name, as the file has it"
            if found[0].parent != found[1].parent:
                remedy = f"write the folder too, or give the right one of these folders instead of {self.root}"
            return f"{name!r} could be {found[0]} or {found[1]}: {remedy}"
        return self.root / found[0]

    def _by_name(self, depth: int) -> dict[tuple[str, ...], list[PurePosixPath]]:
        """Return the files by stem and last `depth` folders: many files may share the one or the others."""
        if depth not in self._named:
            named = self._named[depth] = defaultdict(list)
            for path in self.paths:
                if len(path.parts) > depth:
                    *folders, file = _compared(path.parts[-depth - 1 :])
                    key = (*folders, _stem(file))
                    named[key].append(path)
        return self._named[depth]

    def matches(self, name: str, skip: int) -> list[PurePosixPath]:
        """Return the image files that a name could mean."""
        parts = (_parts(name) or [])[skip:]
        wanted = _compared(parts)
        if not wanted:
            return []
        *folders, file = wanted
        found = []
        for path in self._by_name(len(folders)).get((*folders, _stem(file)), []):
            (own,) = _compared([path.name])
            if file in (own, _stem(own)):
                found.append(path)
        exact = [path for path in found if len(path.parts) == len(wanted)]
        if len(exact) > 1 or (not exact and len(found) > 1):  # of `a.png` and `A.png` the one that is written so
            as_written = [
                path
                for path in exact or found
                if list(path.parts[-len(parts) : -1]) == parts[:-1] and parts[-1] in (path.name, _stem(path.name))
            ]
            return as_written if len(as_written) == 1 else found
        return exact or found

    def _with_zeros(self, number: str, skip: int) -> list[PurePosixPath]:
        """Return the image files that a number could mean if it had more zeros at its beginning."""
        widths = range(len(number) + 1, MAX_DIGITS + 1)
        return [path for width in widths for path in self.matches(number.zfill(width), skip)]

    def folders_to_skip(self, names: Sequence[str]) -> int:
        """Return how many folders at the beginning of all names are not here: so many that most names are found."""
        folders = [parts[:-1] for name in names if (parts := _parts(name))]
        shared = sum(1 for _ in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*folders, strict=False)))
        sample = names[:SAMPLE]
        found = [sum(bool(self.matches(name, skip)) for name in sample) for skip in range(shared + 1)]
        return found.index(max(found))


def walk(root: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder below a folder, and itself, with the names of its files, in order and without hidden ones.

    Links to folders are followed, but no folder comes twice, and none that holds this one.

    Args:
        root: the folder.
        onerror: gets the error of a folder that cannot be read.

    Raises:
        UserError: a folder cannot be read, and `onerror` is not given.
    """
    seen, waiting = {str(folder) for folder in root.resolve().parents}, [root]
    while waiting:  # links come last, so that a folder has its own name where that is below the root too
        for directory, subdirectories, names in os.walk(waiting.pop(0), onerror=onerror or refuse_folder):
            place, folder = os.path.realpath(directory), Path(directory)
            if place in seen:
                subdirectories.clear()
                continue
            seen.add(place)
            subdirectories[:] = sorted(name for name in subdirectories if not is_hidden(name))
            waiting += [folder / name for name in subdirectories if (folder / name).is_symlink()]
            yield folder, sorted(name for name in names if not is_hidden(name))


def explain_no_folder(folder: Path, advice: str, may_be_name: bool = False) -> str:
    """Return what a path is, if no folder, and what to do.

    Args:
        folder: the path, as given.
        advice: on what to give for a file.
        may_be_name: whether the name of a dataset may stand in its place, as it may not for `--data_dir`.
    """
    if folder.exists():
        return "but an archive: unpack it first" if folder.suffix.lower() in ARCHIVES else f"but a file: {advice}"
    given = str(folder)
    found = "because there is nothing of that name" + ("" if folder.is_absolute() else f" in {Path.cwd()}")
    bare = given.strip(" \r\n\t\u00a0'\"\u2018\u2019\u201c\u201d")
    if bare != given and Path(bare).is_dir():
        return f"{found}: leave out the quotes or spaces around {bare}"
    if (plain := given.replace("\\ ", " ")) != given and Path(plain).is_dir():
        return f"{found}: within quotes write {plain}, without backslashes before the spaces"
    if given.startswith("file:"):
        return "but an address: give the path alone, without file://"
    if re.match(r"[a-z][a-z\d+.-]+:[\\/]", given):
        how = "as OWNER/NAME" if may_be_name else "with --dataset_name"
        remedy = "download and unpack it first, or mount it as a folder, or name a dataset of the Hub"
        return f"but an address: {remedy} {how}"
    if "*" in given or "?" in given:  # after addresses, which may end in ?dl=1
        return "but a pattern: give the folder that holds these images or class folders"
    if re.match(r"[A-Za-z]:[^\\/]", given):
        return f"{found}. This shell takes backslashes away: put the path into quotes"
    if re.match(r"[A-Za-z]:[\\/]", given) and os.name != "nt":
        return f"{found}. That is a path of Windows: in WSL the drive is called /mnt/{given[0].lower()}"
    if not may_be_name and re.fullmatch(r"\w[\w.-]*/[\w.-]+", given):
        return f"{found}. A dataset of the Hub is given as --dataset_name"
    return f"{found}. Check the spelling, or give the whole path"


def refuse_run(paths: Iterable[Path]) -> None:
    """Raise UserError where files are those of a run, whose figures are no images of a class."""
    marked = dict.fromkeys(path.parent for path in paths if path.name in OF_RUN)
    if run := next((folder for folder in marked if any(any(folder.glob(name)) for name in BESIDE)), None):
        raise UserError(
            f"{run} holds a run of Luthier, and no images of a class: name another folder, or move the run"
        )


def remedy_without_images(others: Sequence[Path]) -> str:
    """Return what to do about a class folder without images, by the files in it."""
    if any(path.name.endswith(CLOUD) for path in others):
        return "some files are in iCloud alone. Download the folder in the Finder"
    if any(path.suffix.lower() in ANNOTATIONS for path in others):
        return (
            "add some, or move it elsewhere. If it holds annotations (as of COCO, YOLO or VOC), they are not read: "
            "sort the images into class folders, or write their classes into a table (docs/usage.md), and move this "
            "folder elsewhere"
        )
    return "add some, or move it elsewhere" if others else "fill it or remove it"


def warn_of_skipped(names: Iterable[str]) -> None:
    """Say which files are not used: images in formats that are not read, and what is no image of a class."""
    kinds = {
        f"in a format that is not read ({CONVERT})": is_unread,
        "in iCloud alone (download it in the Finder)": lambda name: name.endswith(CLOUD),
        "not an image in a class folder": lambda name: True,
    }
    files: dict[str, list[str]] = {reason: [] for reason in kinds}
    for name in names:
        files[next(reason for reason, is_kind in kinds.items() if is_kind(name))].append(name)
    for reason, found in files.items():
        if found:
            few = ", ".join(found[:3])
            logger.warning(f"Not used, because {reason}: {plural(len(found), 'file')}, such as {few}")


def refuse_folder(error: OSError) -> NoReturn:
    """Raise UserError for a folder that cannot be read."""
    raise UserError(
        f"the folder {error.filename} cannot be read: {error.strerror}. Change its permissions or remove it"
    ) from error


def as_text(path: Path) -> str:
    """Return a path as `datasets` can keep it.

    Raises:
        UserError: it is not valid UTF-8.
    """
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError:
        raise UserError(f"the file name {os.fsencode(path)!r} is not valid UTF-8: rename it or its folder") from None


def _parts(name: str) -> list[str] | None:
    """Return the folders and the file of a name, on any system; None where it leads out of the folder."""
    parts: list[str] = []
    for part in name[:MAX_NAME].replace("\\", "/").split("/"):
        if part == ".." and not parts:
            return None
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _compared(parts: Sequence[str]) -> list[str]:
    """Return the parts of a path as they are compared: systems write capital and accented letters differently."""
    return [unicodedata.normalize("NFC", part).casefold() for part in parts]


def _stem(name: str) -> str:
    """Return a file name without the extension of an image."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in EXTENSIONS else path.name
