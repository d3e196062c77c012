"""A trained model on pictures that it has not seen: files, folders, addresses.

    python predict.py outputs/my_run picture.jpg photos/ "more/*.png" https://example.org/a.jpg
    find . -name "*.jpg" | python predict.py me/instruments - --format jsonl --output answers.jsonl

MODEL is a folder with a saved model, or a name on the Hub. Exit code 0: all inputs were answered; 1: some could not
be, and each says why; 2: the command is wrong.
"""

import argparse
import csv
import gc
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from images import hidden, is_picture, reason

if TYPE_CHECKING:
    from classifier import Answer

BAR = 32  # columns


def main(argv: list[str] | None = None) -> None:
    """Answer the inputs; see `python predict.py --help`."""
    args = parse_line(argv)
    gc.disable()  # what the imports make stays: looking through it again and again for garbage takes a second
    from arguments import user_errors  # these imports take seconds: mistakes in the line are answered before
    from classifier import Classifier

    gc.freeze()
    gc.enable()

    with user_errors():
        let_names_pass()
        classifier = Classifier(args.model, args.always_answer, args.allow_private_urls)
        with open_output(args.output) as file:
            write = WRITERS[args.format](file, min(args.top_k, len(classifier.labels)))
            unanswered = 0
            # Beside answers on the same terminal a bar would be in the way.
            silent = not sys.stderr.isatty() or (args.output is None and sys.stdout.isatty())
            answers = classifier.answers(expand(args.input, sys.stdin or ()), args.top_k)
            for answer in tqdm(answers, unit=" pictures", delay=1, disable=silent):
                write(answer)
                unanswered += answer.error is not None
    if unanswered:
        print(f"{unanswered} of the inputs could not be answered", file=sys.stderr)
        sys.exit(1)


def let_names_pass() -> None:
    """Let the standard streams carry names of files that are no text.

    Raises:
        ValueError: there is no standard output.
    """
    if sys.stdout is None:
        raise ValueError("the standard output is closed: give --output FILE")
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def parse_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Return what the line says."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder with a saved model, or a name on the Hub")
    parser.add_argument(
        "input", nargs="+", help="files, folders, globs, http(s) addresses; - reads one a line from the standard input"
    )
    parser.add_argument("--format", choices=list(WRITERS), default="table", help="for people, or for programs")
    parser.add_argument("--top_k", type=_positive, default=5, help="how many classes to show (5)")
    parser.add_argument("--output", type=Path, help="a file to write to, in the place of the terminal")
    parser.add_argument("--always_answer", action="store_true", help='never say "unsure"')
    parser.add_argument(
        "--allow_private_urls", action="store_true", help="fetch from this machine and its network too"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return int(text)


def expand(inputs: Iterable[str], stdin: Iterable[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Yield (file or address, None) for each input, or (input, what is wrong with it), in order."""
    for text in inputs:
        if text == "-":
            yield from expand(line.rstrip("\r\n") for line in stdin if line.strip())
        # os.path, because a path that is too long, or holds a null, is no file there, and an error in pathlib. Which
        # addresses are fetched, fetch.py decides.
        elif "://" in text or os.path.isfile(text):  # noqa: PTH113
            yield text, None
        elif os.path.isdir(text):  # noqa: PTH112
            yield from _pictures_in(text)
        elif glob.has_magic(text) and (found := sorted(glob.iglob(text, recursive=True))):  # noqa: PTH207
            for name in found:
                yield from _pictures_in(name) if Path(name).is_dir() else [(name, None)]
        else:
            yield text, "no file matches" if glob.has_magic(text) else "there is no such file"


def _pictures_in(folder: str) -> Iterator[tuple[str, str | None]]:
    empty, errors = True, []
    for directory, subdirectories, names in os.walk(folder, onerror=errors.append):
        subdirectories[:] = sorted(name for name in subdirectories if not hidden(name))
        for name in filter(is_picture, sorted(names)):
            empty = False
            yield str(Path(directory, name)), None
    for error in errors:
        empty = False
        yield error.filename, reason(error)
    if empty:
        yield folder, "there are no pictures in this folder"


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Give the file to write to, or the standard output; who reads that may leave whenever they like."""
    try:
        if path:
            with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                yield file
        else:
            yield sys.stdout
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        sys.exit(1)


def write_table(file: TextIO, top_k: int) -> Callable[["Answer"], None]:
    """Return the function that writes an answer for people: its classes with bars."""

    def write(answer: "Answer") -> None:
        name = printable(answer.name)
        if answer.error:
            print(f"{name}\n  not answered: {printable(answer.error)}", file=file, flush=True)
            return
        print(f"{name}: unsure" if answer.unsure else name, file=file)
        for label, share in answer.top:
            short = printable(label if len(label) <= 24 else f"{label[:23]}…")
            print(f"  {short:<24}  {share:6.1%}  {'█' * round(share * BAR)}".rstrip(), file=file)
        file.flush()

    return write


def write_jsonl(file: TextIO, top_k: int) -> Callable[["Answer"], None]:
    """Return the function that writes an answer as a line of JSON; `answer` is null where there is none, or unsure."""

    def write(answer: "Answer") -> None:
        said = {"input": answer.name, "answer": None}
        if answer.error:
            said["error"] = answer.error
        else:
            said["answer"] = None if answer.unsure else answer.top[0][0]
            said["top"] = [{"label": label, "score": round(share, 6)} for label, share in answer.top]
        print(json.dumps(said, ensure_ascii=False), file=file, flush=True)

    return write


def write_csv(file: TextIO, top_k: int) -> Callable[["Answer"], None]:
    """Return the function that writes an answer as a row; `answer` is empty where there is none, or unsure."""
    table = csv.writer(file)
    numbers = range(1, top_k + 1)
    table.writerow(["input", "answer", *(f"{kind}_{k}" for k in numbers for kind in ("label", "score")), "error"])

    def write(answer: "Answer") -> None:
        top = [cell for label, share in answer.top for cell in (as_cell(label), f"{share:.6f}")]
        said = as_cell(answer.top[0][0]) if answer.top and not answer.unsure else ""
        empty = [""] * (2 * top_k - len(top))
        table.writerow([as_cell(answer.name), said, *top, *empty, as_cell(answer.error or "")])
        file.flush()

    return write


def printable(text: str) -> str:
    """Return text without what a terminal would obey: names come from files, classes and errors from elsewhere."""
    return "".join(character if character.isprintable() else "?" for character in text)


def as_cell(text: str) -> str:
    """Return text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


WRITERS = {"table": write_table, "jsonl": write_jsonl, "csv": write_csv}


if __name__ == "__main__":
    main()
