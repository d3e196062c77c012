"""Write a dataset once, in shards: inspected, without exact copies, resized and split.

    python prepare.py my_photos shards
    python prepare.py someone/their-set shards --side 768
    accelerate launch train.py --data_dir shards

DATA is a folder of images, or the name of a dataset. FOLDER gets Parquet files
of each split. Images that cannot be read, and exact copies of an image of the
same class and split, are left out. A second start goes on after an
interruption. Several machines with a common disk take a share each (docs/usage.md):

    python prepare.py my_photos shards --share 2/4
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from luthier.command_line import CommandParser
from luthier.cores import count_cores
from luthier.errors import UserError, exit_on_user_error
from luthier.files import expand_home
from luthier.options import OF_DATA, parse_part
from luthier.terminal import of_project, plural, quote, say

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict

    from luthier.parsing import Parser

# Options of train.py that have a meaning here too.
SHOWN = (*OF_DATA, "on_bad_image", "validation_fraction", "test_fraction", "split_seed")
POLL = 5.0  # seconds between two looks for the other machines


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Prepare a dataset; see `python prepare.py --help`."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        build_parser().print_help()
        return
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise UserError("name the data and a folder for the shards: python prepare.py DATA FOLDER")
    from luthier.arguments import option_of_data, parse_arguments, refuse_others
    from luthier.parsing import option_names_in

    own = CommandParser(add_help=False)
    add_own_options(own)
    options, rest = own.parse_known_args(argv[2:])
    for name in ("side", "images"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, but must be at least 1")
    share = parse_share(options.share)
    refuse_others("prepare.py", option_names_in(rest), SHOWN)
    line = [*option_of_data(argv[0]), *rest, "--eval_strategy", "no"]
    arguments = parse_arguments(line, own=vars(options), parser=build_parser())

    from data import load_splits
    from luthier.images.groups import given_groups
    from luthier.machine import set_up_process

    set_up_process(arguments.training_args)
    folder, source = expand_home(argv[1]), expand_home(argv[0])
    if source.is_dir() and source.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(
            f"{folder} is or lies in {source}, whose images its files would be among: give a folder elsewhere"
        )
    check_folder(folder)
    if share.machines > 1:
        inspect_share(arguments.data_args.for_images(), folder, share)
    splits, unreadable = load_splits(**arguments.data_args.for_images(), **arguments.data_args.for_cut())
    if unreadable:
        say("left out", f"{plural(len(unreadable), 'image')} that cannot be read, such as {unreadable[0].name}")
    write_shards(splits, folder, options.side, options.images, share)
    groups = " --group_column group" if given_groups(splits) else ""
    when = ", when all machines have ended" if share.machines > 1 else ""
    say("next", f"{quote('accelerate', 'launch', of_project('train.py'), '--data_dir', str(folder))}{groups}{when}")


def build_parser() -> "Parser":
    """Return the parser of train.py, with this command's help and its own options."""
    from luthier.arguments import build_parser

    parser = build_parser("prepare.py", "python prepare.py DATA FOLDER [--option value ...]", str(__doc__), SHOWN)
    add_own_options(parser)
    return parser


def add_own_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that train.py does not have."""
    parser.add_argument("--side", type=int, default=512, help="Shorter side of a stored image in pixels, at most.")
    parser.add_argument("--images", type=int, default=1000, help="Images in a file.")
    parser.add_argument("--share", default="1/1", help="Such as 2/4: the second of four machines with a common disk.")


class Share(NamedTuple):
    """Which of several machines this is, from 1 on."""

    machine: int
    machines: int


def parse_share(text: str) -> Share:
    """Return what `--share` says.

    Raises:
        UserError: it is no share.
    """
    part = parse_part(text)
    if part is None or part[0] > part[1]:
        raise UserError(f"--share {text} is not a share: give one such as 2/4, the second of four machines")
    return Share(*part)


def inspect_share(source: dict, folder: Path, share: Share) -> None:
    """Inspect this machine's share of the images, and wait for the other machines: the results are in a common cache.

    Args:
        source: of `data.load_images`.
        folder: of the shards; tells the machines of each other.
        share: of this machine.

    Raises:
        UserError: the images cannot be listed, see `data.list_images`, or the folder cannot be one.
    """
    from data import list_images
    from luthier.images.inspection import inspect
    from luthier.images.listed_images import STAMP

    splits, root = list_images(**{key: value for key, value in source.items() if key != "on_bad_image"})
    for split, dataset in splits.items():
        own = range(share.machine - 1, len(dataset), share.machines)
        if STAMP in dataset.column_names and own:  # other rows have no name by which another machine would know them
            inspect(dataset.select(own), split, root)
    done = [folder / f".inspected-{number}-of-{share.machines}" for number in range(1, share.machines + 1)]
    create_folder(folder)
    done[share.machine - 1].touch()
    said: list[Path] = []
    while missing := [path for path in done if not path.exists()]:
        if missing != said:
            example = missing[0].name.removeprefix(".inspected-")
            say("wait", f"for {plural(len(missing), 'machine')} to inspect their share, such as {example}")
        said = missing
        time.sleep(POLL)


def write_shards(splits: "DatasetDict", folder: Path, side: int, images: int, share: Share) -> None:
    """Write the images of each split into Parquet files, in an order that is random; files that are there stay.

    A file has the columns `image` and `label`, and `group`, the number of what an image belongs to.

    Args:
        splits: of `data.load_splits`.
        folder: to write to.
        side: the shorter side of a stored image in pixels, at most; see `data.store_training_image`.
        images: in a file.
        share: of this machine, which writes every `machines`-th file.

    Raises:
        UserError: the folder has shards of something else, another process writes this share, or an image has changed
            or cannot be read any more.
    """
    import numpy as np
    from datasets import concatenate_datasets

    from luthier.cache import list_of
    from luthier.files import atomic_write, lock_folder
    from luthier.images.shards import BLOCK
    from luthier.images.splits import draw_order

    kept = {split: keep_one_of_each(dataset) for split, dataset in splits.items()}
    claim_folder(folder, plan_of(kept, side, images))
    busy = f"another prepare.py is writing into {folder}: wait for it, or give each machine another --share"
    with lock_folder(folder, f".lock-{share.machine}-of-{share.machines}", busy):
        for split, dataset in kept.items():
            copies = len(splits[split]) - len(dataset)
            order = draw_order(list_of(dataset, "digest"), seed=1)
            parts = list(enumerate(np.array_split(order, -(-len(order) // images))))
            own, there = parts[share.machine - 1 :: share.machines], 0
            for number, rows in own:
                path = folder / f"{split}-{number:05}-of-{len(parts):05}.parquet"
                if is_whole(path):
                    there += 1
                    continue
                blocks = [rows[begin : begin + BLOCK] for begin in range(0, len(rows), BLOCK)]
                with atomic_write(path) as whole:  # of blocks: Arrow has at most 2 GB in an array
                    images_of_file = concatenate_datasets([resized(dataset, block, side) for block in blocks])
                    images_of_file.to_parquet(str(whole), batch_size=BLOCK)
            found = f", {there} of them from before" if there else ""
            share_of = f", {len(own)} of them on this machine" if share.machines > 1 else ""
            files = f"{plural(len(parts), 'file')}{share_of}{found}"
            text = f"{plural(len(dataset), 'image')} in {files}; exact copies left out: {copies}"
            say("shards", f"{split}: {text}")


def is_whole(path: Path) -> bool:
    """Tell whether a Parquet file is there from an earlier time, and can be read as far as its end tells."""
    from pyarrow import ArrowException, parquet

    try:
        parquet.read_metadata(path)
    except (ArrowException, OSError):
        return False
    return True


def keep_one_of_each(dataset: "Dataset") -> "Dataset":
    """Return a split without images whose file and class are those of an earlier one."""
    from luthier.cache import list_of

    seen: dict[tuple[str, int], int] = {}
    # Not the column `pixels`: large JPEGs are decoded at a reduced scale for it, where fine details are lost.
    for row, image in enumerate(zip(list_of(dataset, "digest"), list_of(dataset, "label"), strict=True)):
        seen.setdefault(image, row)
    return dataset.select(seen.values())


def plan_of(splits: dict[str, "Dataset"], side: int, images: int) -> dict:
    """Return what decides the content of every file."""
    from data import PREPARATION
    from luthier.cache import list_of

    plan: dict = {"version": PREPARATION, "side": side, "images": images, "splits": {}}
    for split, dataset in splits.items():
        names = dataset.features["label"].names
        rows = zip(*(list_of(dataset, column) for column in ("digest", "label", "group")), strict=True)
        lines = sorted(f"{digest} {names[label]} {group}" for digest, label, group in rows)
        plan["splits"][split] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return plan


def check_folder(folder: Path) -> None:
    """Check that a folder is empty, or one that this command has begun.

    Raises:
        UserError: it has something else, or its name could not be read by train.py.
    """
    from luthier.images.decode import is_hidden
    from luthier.images.loading import PLAN

    if glob.has_magic(str(folder.resolve())):
        raise UserError(f"{folder.resolve()} has one of * ? [ in it, and train.py could not read it: give another one")
    foreign = folder.exists() and (not folder.is_dir() or any(not is_hidden(path.name) for path in folder.iterdir()))
    if foreign and not (folder / PLAN).is_file():
        raise UserError(f"{folder} is not an empty folder: give another one for the shards")


def create_folder(folder: Path) -> None:
    """Create a folder for shards where it is not there.

    Raises:
        UserError: it cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} cannot be a folder: {error.strerror}. Give another one for the shards") from error


def claim_folder(folder: Path, plan: dict) -> None:
    """Write the plan into a folder, if that is empty or has the same plan already.

    Raises:
        UserError: it has something else, or see `check_folder` and `create_folder`.
    """
    from luthier.files import atomic_write, rename
    from luthier.images.loading import PLAN

    text = json.dumps(plan, indent=1)
    check_folder(folder)
    create_folder(folder)
    if not (folder / PLAN).is_file():
        # Of several machines none may empty what another one renames, and the plan of the first one stays.
        own = folder / f".{PLAN}-{uuid.uuid4().hex}"
        with atomic_write(own) as whole:
            whole.write_text(text, encoding="utf-8")
        try:
            (folder / PLAN).hardlink_to(own)
        except FileExistsError:  # another one was first
            pass
        except (OSError, NotImplementedError):  # some disks have no hard links
            rename(own, folder / PLAN)
        with contextlib.suppress(OSError):  # Windows removes no file that a virus scanner reads; it is hidden
            own.unlink()
    if (folder / PLAN).read_text(encoding="utf-8") != text:
        raise UserError(
            f"{folder} has shards of other images, splits or sizes, or of another version of Luthier: give another "
            "folder, or remove it"
        )


def resized(dataset: "Dataset", rows: "np.ndarray", side: int) -> "Dataset":
    """Return some rows of a split with the images as they are stored.

    Args:
        dataset: the split, as loaded.
        rows: int [n].
        side: see `write_shards`.

    Raises:
        UserError: an image has changed since it was inspected, or cannot be read any more.
    """
    from datasets import Dataset, Features, Image, Value

    from data import store_training_image
    from luthier.images.decode import extensions_of, read_bytes, reason

    chosen = dataset.select(rows)
    sources = chosen.select_columns(["image", "name", "digest"])

    def store(number: int) -> dict:
        row = sources[number]  # read here, so that few images are in memory at a time
        try:
            content = read_bytes(row["image"])
            if hashlib.sha256(content).hexdigest() != row["digest"]:
                raise ValueError("it has changed")
            image = store_training_image(content, side)
        except Exception as error:  # Pillow's plugins raise errors of any kind on damaged data
            raise UserError(
                f"{row['name']} is no longer as it was inspected: {reason(error)}. Put it back, or start again, with "
                "another folder"
            ) from error
        name = row["name"].replace(os.sep, "-").replace("/", "-")
        stored_as, ending = ("PNG", ".png") if image["bytes"].startswith(b"\x89PNG") else ("JPEG", ".jpg")
        if image["bytes"] != content and Path(name).suffix.lower() not in extensions_of(stored_as):
            name += ending
        return image | {"path": name}

    # Threads are enough, because Pillow releases the interpreter while it decodes, resizes and encodes.
    with ThreadPoolExecutor(count_cores()) as pool:
        images = list(pool.map(store, range(len(sources))))
    features = Features({"image": Image(), "label": dataset.features["label"], "group": Value("int64")})
    columns = {"image": images, "label": chosen["label"][:], "group": chosen["group"][:]}
    return Dataset.from_dict(columns, features=features)


if __name__ == "__main__":
    main()
