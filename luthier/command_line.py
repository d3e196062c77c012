"""The parser of a command: every mistake gets one message, which names the option that was probably meant."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from luthier.errors import UserError
from luthier.files import expand_home

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # that word processors put in the place of hyphens
QUOTES = "\u201c\u201d\u201e"


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError for a wrong command line, where argparse would print all of the usage.

    It takes no abbreviated options, and each with hyphens too (`--top-k` is `--top_k`). The help keeps the line breaks
    of the description.
    """

    def __init__(self, *args: Any, **settings: Any):
        defaults: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **(defaults | settings))

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument; an option gets its name with hyphens too, as `HfArgumentParser` does."""
        spellings = [*names, *(name.replace("_", "-") for name in names if name.startswith("--"))]
        return super().add_argument(*dict.fromkeys(spellings), **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments of a command line.

        Raises:
            UserError: one is wrong, unknown or missing.
        """
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(self._explain_unknown(unknown[0]))
        return parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the arguments that this parser knows, and the others; see `parse_args`."""
        self._given = list(sys.argv[1:] if args is None else args)  # for `error`
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise `message`, with each option in one spelling, what a number looks like, and where examples are."""
        message = re.sub(r"^argument (--\w+)/--[\w-]+:", r"argument \1:", message)
        if found := re.search(r"invalid (int|float) value", message):
            number = "a whole number such as 10" if found[1] == "int" else "a number such as 10 or 0.5"
            message += f"; give {number}, without a unit"
        elif message.startswith("the following arguments are required"):
            files = [token for token in self._given if token.startswith("-") and os.path.lexists(token)]
            message = self._explain_unknown(files[0]) if files else f"{message}. Examples: python {self.prog} --help"
        raise UserError(message)

    def _explain_unknown(self, token: str) -> str:
        """Return what is wrong with an argument that this parser cannot place."""
        if typed := explain_typing(token):
            return typed
        if token.startswith("-") and os.path.lexists(token):
            return f"{token} is taken for an option: if you mean the file of this name, write ./{token}"
        if token.startswith("-"):
            known = [action.dest for action in self._actions if action.option_strings]
            hint = nearest(option_in(token), known) or "."
            return f"unknown option {token}{hint} All options: python {self.prog} --help"
        return (
            f"cannot place the argument {token!r}: a path with spaces needs quotes, and no option may stand between "
            f"two paths. All arguments: python {self.prog} --help"
        )


def path_of_option(value: str) -> Path:
    """Return the path that an option gives; an empty one, as of an unset variable, would be this folder."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: give a value, or leave the option out")
    return expand_home(value)


def explain_typing(token: str) -> str:
    """Return what is wrong with a comment, or an argument that a word processor has changed; nothing for any other."""
    if token == "#":
        return "# begins a comment, which this shell does not skip: leave it out, and what follows it"
    word = token.lstrip("-")  # it ends with such a quote where the shell has cut a path at its space
    if (word[:1] in (*DASHES, *QUOTES) or word[-1:] in (*QUOTES,)) and token.strip(f"-{DASHES}"):
        return f'{token} has a dash or a quote of a word processor in it: type it again, with plain ones (-- and ")'
    return ""


def option_in(token: str) -> str:
    """Return the name of the option in an argument such as `--Top-K=3`, as parsers spell it: top_k."""
    return token.lstrip("-").split("=")[0].replace("-", "_").lower()


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a question after the known word that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1) or [name for name in known if f"_{word}_" in f"_{name}_"]
    return f"; did you mean {close[0]!r}?" if close else ""
