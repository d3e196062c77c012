"""What a command prints: its few lines, numbers in words, progress where there is no terminal, seconds by stage."""

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from luthier.escape import escape_lines

PROJECT = Path(__file__).resolve().parents[1]
INDENT = 9  # columns before the text of a line
SHORT = 24  # characters of a shortened name, at most


def is_first_process() -> bool:
    """Tell whether this is the process that speaks for all; accelerate and torchrun number them so."""
    return os.environ.get("RANK", "0") == "0"


def say(topic: str, text: str) -> None:
    """Print one line of a run, once, whatever the number of processes.

    Args:
        topic: the first word, at most 8 characters; empty continues the line before.
        text: the rest.
    """
    if is_first_process():
        with ignore_closed("stdout"):
            for line in f"{topic:<{INDENT}}{escape_lines(text)}".split("\n"):
                print(_wrap(line), flush=True)


@contextlib.contextmanager
def ignore_closed(stream: Literal["stdout", "stderr"]) -> Iterator[None]:
    """Go on where whoever read along is gone, as with `| head`: nothing more is written to that stream."""
    try:
        yield
    except OSError as error:
        if not is_closed(error):
            raise
        setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - until the process ends


def is_closed(error: OSError) -> bool:
    """Tell whether an error of writing says that nobody reads any more; Windows has another number for it."""
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and error.errno == errno.EINVAL)


def _wrap(line: str) -> str:
    """Break a line between words where a person reads it; in a file it stays whole, and can be searched."""
    if sys.stdout is None or not sys.stdout.isatty():
        return line
    width, indent = shutil.get_terminal_size().columns, INDENT * " "
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def plural(n: int, noun: str, nouns: str | None = None) -> str:
    """Return a number with its noun: `1 image`, `1,200 images`, `2 classes`."""
    return f"{n:,} {noun if n == 1 else nouns or f'{noun}s'}"


def some_of(names: Sequence[str], most: int) -> str:
    """Return names in a list, the first ones of many: `a, b and 1,200 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def percent(share: float, places: int = 1) -> str:
    """Return a share in percent, `71.8%`, in which only all are 100%."""
    return f"{min(share, 1 - 10.0 ** -(places + 2)) if share < 1 else share:.{places}%}"


def fraction(share: float) -> str:
    """Return a share as a number, `0.718`, in which only all are 1.000."""
    return f"{min(share, 0.999) if share < 1 else share:.3f}"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points: `+1.2`."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # the sum makes -0.0 a zero


def shorten(name: str) -> str:
    """Return a name with at most `SHORT` characters; its end stays, because names often differ there."""
    end = SHORT // 3
    return name if len(name) <= SHORT else f"{name[: SHORT - end - 1]}…{name[-end:]}"


def width_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: East Asian letters two, marks that join a letter none."""
    joined = sum(unicodedata.category(letter) in ("Mn", "Me", "Cf") for letter in text)
    wide = sum(unicodedata.east_asian_width(letter) in ("W", "F") for letter in text)
    return len(text) - joined + wide


def quote(*words: str) -> str:
    """Return words as a command line for the shell of this system.

    Windows' `cmd` knows double quotes alone. PowerShell divides words at commas, and has a meaning of its own for @.
    """
    if sys.platform != "win32":
        return shlex.join(words)
    return " ".join(word if re.fullmatch(r"[\w%+=:./\\-]+", word) else _in_quotes(word) for word in words)


def _in_quotes(word: str) -> str:
    """Return a word in double quotes for Windows, where backslashes before a quote count twice."""
    at_end = len(word) - len(word.rstrip("\\"))
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', word) + at_end * "\\" + '"'


def of_project(name: str) -> str:
    """Return the path of a file of this project for a command: its name alone where that is enough."""
    return name if Path(name).resolve() == PROJECT / name else str(PROJECT / name)


def has_terminal() -> bool:
    """Tell whether a person watches the progress: where not, bars would fill a log file."""
    return sys.stderr is not None and sys.stderr.isatty()


class Tenths:
    """Says on stderr how far a long piece of work is, a line at each tenth, where there is no terminal for a bar.

    Args:
        topic: the first word of the lines.
        total: amount of work.
        unit: what is counted.
        quiet_seconds: no line before this many seconds have passed.
    """

    def __init__(self, topic: str, total: int, unit: str, quiet_seconds: float = 0):
        self.topic, self.total, self.unit, self.quiet_seconds = topic, total, unit, quiet_seconds
        self.start, self.said = time.monotonic(), 0

    def reach(self, done: int) -> None:
        """Say that this much of the work is done, if that completes a tenth."""
        tenth = 10 * done // max(1, self.total)
        if tenth > self.said and not has_terminal() and is_first_process():
            self.said = tenth
            seconds = time.monotonic() - self.start
            if seconds >= self.quiet_seconds:
                line = f"{self.topic:<{INDENT}}{done:,} of {self.total:,} {self.unit}, {seconds:.0f} s"
                with ignore_closed("stderr"):
                    print(line, file=sys.stderr, flush=True)


class Stopwatch:
    """Seconds by stage, each counted from the end of the one before.

    Attributes:
        seconds: by name of the stage.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._begin = self._last = time.perf_counter()

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._begin

    def end(self, stage: str) -> None:
        """End a stage, or one more part of it."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0) + now - self._last, 3)
        self._last = now
