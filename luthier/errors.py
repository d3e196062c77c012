"""The one kind of error that a user can mend, and the decorator that ends a command with its message."""

import errno
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable
from typing import ParamSpec

from luthier.escape import escape_lines
from luthier.terminal import of_project, quote

Parameters = ParamSpec("Parameters")

# What the system refuses because of the user's disk, wherever it happens.
PERMISSIONS = {errno.EACCES, errno.EPERM, errno.EROFS}
SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
REFUSED_BY_SYSTEM = {errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, *SPACE, *PERMISSIONS}
# Windows has numbers of its own: access denied, and two for a full disk. Python translates them for its own
# errors, and safetensors does not.
OF_WINDOWS = {5: errno.EACCES, 39: errno.ENOSPC, 112: errno.ENOSPC}


class UserError(Exception):
    """What the user can mend: the message says what is wrong, where, and what to do about it."""


class NotFinite(UserError):
    """A loss or a gradient that is not a finite number: nothing more is learned from it, but a run may go on."""


class ImagesChanged(UserError):
    """Images cannot be read that could be read at the beginning of a run, or are other ones now."""


class NoSpace(UserError):
    """Checkpoints would not fit on the disk."""


def first_line(error: BaseException, text: str | None = None) -> str:
    """Return the first line of what an error says, or of another text of it; its kind where that is empty."""
    return next(iter((text or str(error)).strip().splitlines()), type(error).__name__)


def require(what: str, packages: Collection[str], requirements: str) -> None:
    """Check that the packages of a part of the project that not everybody needs are installed.

    Args:
        what: what needs them, for the message.
        packages: by the names that they are imported by.
        requirements: the file that installs them.

    Raises:
        UserError: some are missing.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        command = quote("pip", "install", "-r", of_project(requirements))
        raise UserError(f"{what} needs {' and '.join(missing)}: {command}")


def exit_on_user_error(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """Make a command end with one message and exit code 2 where the user can mend it, and with 130 after Ctrl-C.

    Everything else is a bug and keeps its traceback. `python -X dev` shows the traceback of user errors too.
    """

    @functools.wraps(command)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        if hasattr(sys.stdout, "reconfigure"):  # Windows' code page, or an old locale, may lack letters of a name
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            if sys.flags.dev_mode:
                raise
            print("stopped  by Ctrl-C", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            message = message_for_user(error)
            if message is None or sys.flags.dev_mode:
                raise
            print(f"error: {escape_lines(message)}", file=sys.stderr)
            sys.exit(2)

    return guarded


def exit_with(failures: Iterable[str]) -> None:
    """Exit with 1 and the messages of what failed after a run was complete; an empty one is no failure."""
    if messages := [f"error: {escape_lines(failure)}" for failure in failures if failure]:
        sys.exit("\n".join(messages))


def message_for_user(error: Exception) -> str | None:
    """Return what to tell the user about an error; None where it is a bug."""
    # models.py is pushed to the Hub beside the weights, so it has an error of its own. It imports torch, so that it is
    # only asked where it has been imported already.
    models = sys.modules.get("models")
    if isinstance(error, UserError) or (models is not None and isinstance(error, models.ModelError)):
        # torch puts the traceback of a data worker before its message.
        return str(error).rpartition(f"\n{UserError.__module__}.{UserError.__name__}: ")[2].strip()
    cause: BaseException | None = error
    while cause is not None:  # `datasets` puts an error of its own around the system's, and has one without a number
        if isinstance(cause, OSError) and (cause.errno in REFUSED_BY_SYSTEM or "Not enough disk space" in str(cause)):
            where = f"{cause.filename}: " if cause.filename else ""
            return f"{where}{cause.strerror or cause}. {_remedy(cause.errno)}"
        number = _number_of_safetensors(cause)
        if number in REFUSED_BY_SYSTEM:
            return f"{os.strerror(number)}, while weights are written. {_remedy(number)}"
        cause = cause.__cause__
    return None


def _number_of_safetensors(error: BaseException) -> int:
    """Return the number of the system's error that one of safetensors stands for; 0 where there is none."""
    # safetensors has no other way to say it.
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    number = int(found[1]) if found else 0
    return OF_WINDOWS.get(number, 0) if sys.platform == "win32" else number


def _remedy(number: int | None) -> str:
    """Return what to do about an error of the system, by its number; None is a full disk, as `datasets` reports it."""
    remedy = "Check the disk"
    if number is None or number in SPACE:
        remedy = "Free some space"
    elif number in PERMISSIONS:
        remedy = "Check the permissions"
    elif number == errno.ENAMETOOLONG:
        remedy = "Give a shorter name"
    goes_on = "an interrupted run of train.py goes on with --output_dir and --resume_from_checkpoint auto"
    return f"{remedy}, and start again; {goes_on}"
