"""Files that are written whole or not at all, and folders that one process at a time writes to."""

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from luthier.errors import UserError

logger = logging.getLogger(__name__)

WAITS = (0.1, 0.5, 2, 5)  # seconds before each new attempt to rename, on Windows


def expand_home(path: str | Path) -> Path:
    """Return a path whose `~` is a home directory; a name that begins so and is no user's stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - that of pathlib fails for such names


@contextlib.contextmanager
def lock_folder(folder: Path, name: str, busy: str) -> Iterator[None]:
    """Keep other processes out of a folder; the lock belongs to the system and ends with the process.

    Args:
        folder: to write to.
        name: of the lock's file in it.
        busy: the message if another process has the lock.

    Raises:
        UserError: another process has it.
    """
    lock = FileLock(folder / name, fallback_to_soft=False)  # a soft lock would outlive its process
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(busy) from None
    except (OSError, NotImplementedError) as error:  # some network disks have no locks
        logger.warning(f"{folder} cannot be locked against a second run: {error}")
    try:
        yield
    finally:
        # Before the release, so that it is never another run's lock. Windows removes it only once it is released.
        with contextlib.suppress(OSError):
            (folder / name).unlink()
        lock.release()


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which then gets its name: it is there whole, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = target.with_name(f".{target.name}")
    try:
        yield whole
        sync(whole)
        rename(whole, target)
    finally:
        whole.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder. Windows refuses that while a virus scanner reads it, as it does with new files."""
    for wait in (*WAITS, None):
        try:
            source.replace(target)
            return
        except PermissionError:
            if wait is None or sys.platform != "win32":
                raise
            time.sleep(wait)


def sync(path: Path) -> None:
    """Wait until what has been written to a file is on the disk."""
    # A mounted bucket may refuse to open a file for writing again. Windows needs it.
    with path.open("rb+" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


def atomic_copy(source: Path, target: Path) -> None:
    """Copy a file to its place, whole or not at all; the two may be on different disks."""
    with atomic_write(target) as whole:
        shutil.copyfile(source, whole)


def copy_permissions_to_weights(source: Path) -> None:
    """Give the weights in a file's folder its permissions: safetensors lets nobody but their owner read them."""
    for path in source.parent.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # some mounted buckets have no permissions
            shutil.copymode(source, path)
