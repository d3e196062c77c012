"""Predict the classes of images with a trained model: files, folders, addresses.

    python predict.py outputs/my_run a.jpg photos/ https://example.org/b.jpg
    find . -name "*.jpg" | python predict.py me/instruments - --output c.jsonl

MODEL is a folder with a saved model, a name on the Hub, or a model.onnx of
export.py, which starts in half a second. Exit code 0: every input has a
prediction; 1: some have none, and each says why; 2: the command is wrong.
"""

import argparse
import codecs
import csv
import gc
import glob
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TextIO
from urllib.parse import unquote

from tqdm import tqdm

from luthier.command_line import CommandParser, path_of_option
from luthier.errors import PERMISSIONS, UserError, exit_on_user_error
from luthier.escape import escape_cell, escape_terminal
from luthier.images.decode import CONVERT, EXTENSIONS, UNREAD, is_image, is_unread, reason
from luthier.images.image_files import walk
from luthier.output_dir import is_of_run
from luthier.terminal import SHORT, has_terminal, ignore_closed, is_closed, percent, plural, shorten, width_of

if TYPE_CHECKING:
    from luthier.serving.classifier import Prediction

BAR_WIDTH = 32  # columns
NONE, UNSURE, NO_PREDICTION = "none of these", "unsure", "no prediction"  # in place of a class
MANY, NAMED = 20, 20  # inputs whose answers are counted at the end, and answers that are named there
LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl")  # endings of lists of files, and of tables
NO_IMAGE = "it is a list, and no image: give - for a list of files, as in python predict.py MODEL - < list.txt"


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Predict the inputs; see `python predict.py --help`."""
    args = build_parser().parse_args(argv)
    if args.output == Path("-"):  # as many programs call the standard output
        args.output = None
    if args.output is None and sys.stdout is None:
        raise UserError("the standard output is closed: give --output FILE")
    ending = args.output.suffix[1:].lower() if args.output else ""
    args.format = args.format or (ending if ending in WRITERS else "table")
    accept_undecodable_names()
    if args.output:
        check_output(args.output, args.input)
    # Slow imports come after the options, so that wrong ones are reported first. What they create stays: searching it
    # for garbage, again and again and at exit, would take two seconds more.
    gc.disable()
    from luthier.serving.classifier import Classifier, open_network

    classifier = Classifier(open_network(args.model, args.backend), args.always_answer, args.allow_private_urls)
    gc.freeze()
    gc.enable()
    answers = Counter[str]()
    with open_output(args.output) as file:
        write = WRITERS[args.format](file, min(args.top_k, len(classifier.labels)))
        # A bar would be in the way of predictions on the same terminal.
        silent = not has_terminal() or (args.output is None and sys.stdout.isatty())
        predictions = classifier.predict_files(expand(args.input, sys.stdin or ()), args.top_k)
        try:
            for prediction in tqdm(predictions, unit=" images", delay=1, disable=silent):
                write(prediction)
                answers[answer_of(prediction)] += 1
        except KeyboardInterrupt:
            os._exit(130)  # at once: a normal exit waits for what is being fetched
    failed = answers[NO_PREDICTION]
    lines = [f"no prediction for {plural(failed, 'input')}"] if failed else []
    lines += [f"answers: {count_in_words(answers)}"] if answers.total() >= MANY else []
    if sys.stderr is not None:  # `print` would take the standard output, among the predictions
        with ignore_closed("stderr"):
            for line in lines:
                print(line, file=sys.stderr, flush=True)
    if failed:
        sys.exit(1)


def check_output(path: Path, inputs: list[str]) -> None:
    """Check that a file can be written, and replaces no image, no input and no file of a run.

    Raises:
        UserError: it cannot, or would.
    """
    if path.suffix.lower() in EXTENSIONS | UNREAD:  # also of a hidden image, or a raw one
        raise UserError(f"--output {path} would replace an image: give the name of a file for the predictions")
    if is_of_run(path):
        raise UserError(f"--output {path} would replace a file of the run in this folder: give another name")
    if not path.parent.is_dir():
        raise UserError(f"cannot write --output {path}: there is no folder {path.parent}. Create it, or give another")
    if not path.is_file():  # a terminal or a pipe may be input and output
        return
    names = [name for text in inputs for name in (text, *expand_pattern(text))]
    is_input = any(os.path.isfile(name) and path.samefile(name) for name in names)  # noqa: PTH113 - see `_expand_one`
    if "-" in inputs and sys.stdin is not None:
        with suppress(OSError, ValueError):  # it is no file of the system
            is_input |= os.path.samestat(path.stat(), os.fstat(sys.stdin.fileno()))
    if is_input:
        raise UserError(f"--output {path} would replace one of the inputs: give another name")


def answer_of(prediction: "Prediction") -> str:
    """Return the answer to one input as it is counted: a class, or that there is none."""
    if prediction.error:
        return NO_PREDICTION
    if prediction.none or prediction.unsure:
        return NONE if prediction.none else UNSURE
    label = prediction.top[0][0]
    return f"{label} (the class)" if label in (NONE, UNSURE, NO_PREDICTION) else label


def count_in_words(answers: Counter[str]) -> str:
    """Return how often each answer was given, the most frequent first."""
    named = answers.most_common(NAMED)
    counts = [f"{escape_terminal(shorten(answer))} {count:,}" for answer, count in named]
    others = answers.total() - sum(count for _, count in named)
    return ", ".join([*counts, f"others {others:,}"] if others else counts)


def accept_undecodable_names() -> None:
    """Let the standard streams carry file names that are not valid text."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = CommandParser(prog="predict.py", description=__doc__)
    parser.add_argument("model", help="a folder with a saved model, a name on the Hub, or a .onnx file")
    parser.add_argument(
        "input",
        nargs="+",
        help="files, folders, globs, http(s) addresses; - reads one per line from the standard input",
    )
    parser.add_argument(
        "--format",
        choices=list(WRITERS),
        help="table for people, jsonl and csv for programs; if not given, by the ending of --output, or else table",
    )
    parser.add_argument("--top_k", type=_positive, default=5, help="how many classes to show")
    parser.add_argument("--output", type=path_of_option, help="a file to write to, instead of the terminal")
    parser.add_argument("--backend", choices=["onnxruntime", "openvino"], help="what runs a .onnx file")
    parser.add_argument("--always_answer", action="store_true", help='never say "unsure" or "none of these"')
    parser.add_argument(
        "--allow_private_urls", action="store_true", help="fetch from this machine and its network too"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def expand(inputs: Iterable[str], stdin: Iterable[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Yield (file or address, None) for each input, or (input, what is wrong with it), in order."""
    for text in inputs:
        if text == "-":
            for number, line in enumerate(stdin):
                if number == 0:  # Windows may begin a list with a mark, which it may also read in its own encoding
                    line = line.removeprefix("\ufeff").removeprefix("\u00ef\u00bb\u00bf")
                if line.strip():
                    yield from _expand_one(line.rstrip("\r\n"))
        elif os.path.isfile(text) and text.lower().endswith(LISTS):  # noqa: PTH113 - see `_expand_one`
            yield text, NO_IMAGE
        else:
            yield from _expand_one(text)


def _expand_one(text: str) -> Iterator[tuple[str, str | None]]:
    # os.path, because a path that is too long or holds a null byte is not a file there, but an error in pathlib.
    # fetch.py decides which addresses are fetched.
    if "\0" in text:  # as in a list of `find -print0`; glob fails at it
        yield text, "there is no such file"
    elif text.startswith("file://"):  # as file managers copy it
        path = unquote(text.removeprefix("file://"))
        path = path.removeprefix("/") if path[2:3] == ":" else path  # of Windows: /C:/photos
        yield text, f"give its path, without file://: {path}"
    elif "://" in text or os.path.isfile(text):  # noqa: PTH113
        yield text, None
    elif os.path.isdir(text):  # noqa: PTH112
        yield from _images_in(text)
    elif glob.has_magic(text) and (names := sorted(expand_pattern(text))):
        seen: set[str] = set()  # with ** both a folder and its images match
        for name in names:
            for entry in _images_in(name) if os.path.isdir(name) else [(name, None)]:  # noqa: PTH112
                if (path := os.path.normpath(entry[0])) not in seen:
                    seen.add(path)
                    yield entry
    else:
        yield text, "no file matches" if glob.has_magic(text) else _why_none(text)


def expand_pattern(pattern: str) -> Iterator[str]:
    """Yield the files and folders that a pattern matches; with ** in any folder below, which may match them twice.

    Python's own ** follows links in circles.
    """
    if not (stars := re.search(r"(?<![^/\\])(\*\*([/\\]+|$))+", pattern)):
        yield from glob.iglob(pattern)  # noqa: PTH207 - it keeps the name as it was written
        return
    above, below = pattern[: stars.start()], pattern[stars.end() :]
    for root in glob.iglob(above) if above else ["."]:  # noqa: PTH207
        if not below:
            yield root
            continue
        for folder, _ in walk(Path(root), lambda _: None):
            place = "" if folder == Path() else glob.escape(f"{folder}{os.sep}")
            yield from expand_pattern(place + below)


def _why_none(text: str) -> str:
    """Return why there is no file of a name that can be read."""
    try:
        os.stat(text)  # noqa: PTH116 - see `_expand_one`
    except OSError as error:
        return reason(error) if error.errno in PERMISSIONS else "there is no such file"
    return "it is no regular file"


def _images_in(folder: str) -> Iterator[tuple[str, str | None]]:
    empty, errors = True, list[OSError]()
    for directory, names in walk(Path(folder), errors.append):
        images = list(filter(is_image, names))
        stems = {Path(name).stem for name in images}  # a camera may write a raw file beside its JPEG
        unread = [name for name in names if is_unread(name) and Path(name).stem not in stems]
        empty = empty and not images and not unread
        yield from ((str(directory / name), None) for name in images)
        yield from ((str(directory / name), f"its format is not read: {CONVERT}") for name in unread)
    for error in errors:
        empty = False
        yield error.filename, reason(error)
    if empty:
        yield folder, "there are no images in this folder"


@contextmanager
def open_output(path: Path | None) -> Iterator[TextIO]:
    """Give the file to write to, or the standard output, whose reader may close it at any time.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        if path:
            try:
                file = path.open("w", newline="", encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                raise UserError(f"cannot write --output {path}: {error.strerror}. Give another file") from error
            with file:
                yield file
        else:
            yield sys.stdout
            sys.stdout.flush()
    except OSError as error:
        if not is_closed(error):
            raise
        if path is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        sys.exit(1)


def write_table(file: TextIO, top_k: int) -> Callable[["Prediction"], None]:
    """Return the function that writes a prediction for people: its classes with bars."""
    block = "█"
    try:
        block.encode(file.encoding or "utf-8")
    except UnicodeEncodeError:  # Windows' code page lacks it, where the output goes into a file or a pipe
        block = "#"

    def write(prediction: "Prediction") -> None:
        name = escape_terminal(prediction.name)
        if prediction.error:
            print(f"{name}\n  no prediction: {escape_terminal(prediction.error)}", file=file, flush=True)
            return
        refusal = f": {NONE}" if prediction.none else f": {UNSURE}" if prediction.unsure else ""
        print(f"{name}{refusal}", file=file)
        labels = [escape_terminal(shorten(label)) for label, _ in prediction.top]
        width = max([SHORT, *map(width_of, labels)])
        for label, (_, share) in zip(labels, prediction.top, strict=True):
            padded = label + " " * (width - width_of(label))
            print(f"  {padded}  {percent(share):>6}  {block * round(share * BAR_WIDTH)}".rstrip(), file=file)
        file.flush()

    return write


def write_jsonl(file: TextIO, top_k: int) -> Callable[["Prediction"], None]:
    """Return the function that writes a prediction as a line of JSON; `answer` is null without one, and if unsure."""
    # What another encoding lacks would be escaped as Python does, which is no JSON.
    ascii_alone = codecs.lookup(file.encoding or "utf-8").name != "utf-8"

    def write(prediction: "Prediction") -> None:
        line: dict[str, object] = {"input": prediction.name, "answer": None}
        if prediction.error:
            line["error"] = prediction.error
        else:
            line["answer"] = None if prediction.unsure else prediction.top[0][0]
            line["top"] = [{"label": label, "score": round(share, 6)} for label, share in prediction.top]
        print(json.dumps(line, ensure_ascii=ascii_alone), file=file, flush=True)

    return write


def write_csv(file: TextIO, top_k: int) -> Callable[["Prediction"], None]:
    """Return the function that writes a prediction as a row; `answer` is empty without one, and if unsure."""
    # The writer quotes what its line ending holds: with its own one, carriage returns too. Windows' standard output
    # makes two characters of "\n" by itself.
    table = csv.writer(SimpleNamespace(write=lambda row: file.write(row.removesuffix("\r\n") + "\n")))
    numbers = range(1, top_k + 1)
    table.writerow(["input", "answer", *(f"{kind}_{k}" for k in numbers for kind in ("label", "score")), "error"])

    def write(prediction: "Prediction") -> None:
        top = [cell for label, share in prediction.top for cell in (escape_cell(label), f"{share:.6f}")]
        answer = escape_cell(prediction.top[0][0]) if prediction.top and not prediction.unsure else ""
        empty = [""] * (2 * top_k - len(top))
        table.writerow([escape_cell(prediction.name), answer, *top, *empty, escape_cell(prediction.error or "")])
        file.flush()

    return write


WRITERS = {"table": write_table, "jsonl": write_jsonl, "csv": write_csv}


if __name__ == "__main__":
    main()
