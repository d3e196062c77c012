"""Terminal output: counts with their nouns, progress lines, stage times, and a log without progress bars."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT, draw_folder

import luthier.terminal as module
from luthier.errors import exit_on_user_error
from luthier.escape import escape_terminal
from luthier.terminal import Stopwatch, Tenths, fraction, of_project, percent, plural, points, quote, say, shorten
from luthier.training.callbacks import EpochTable


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("n", "noun", "nouns", "expected"),
    [
        (1, "image", None, "1 image"),
        (0, "image", None, "0 images"),
        (1200, "image", None, "1,200 images"),
        (2, "class", "classes", "2 classes"),
        (1, "class", "classes", "1 class"),
    ],
)
def test_plural(n, noun, nouns, expected):
    assert plural(n, noun, nouns) == expected


def test_only_the_main_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    say("data", "x")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    say("data", "x")
    assert capsys.readouterr().out == "data     x\n"


def test_reader_that_leaves_does_not_end_the_run(monkeypatch):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(module.sys, "stdout", Left())
    say("data", "x")
    say("data", "y")  # to nobody
    assert not isinstance(sys.stdout, Left)


def test_control_characters_of_names_do_not_reach_the_terminal(capsys):
    say("data", "\x1b]0;title\x07red\nnext")
    assert capsys.readouterr().out == "data     ?]0;title?red\nnext\n"


def test_spaces_and_joiners_of_names_stay(capsys):
    say("data", "3.14\u202fPM a\u00a0b \U0001f469\u200d\U0001f52c \u202ey")
    assert capsys.readouterr().out == "data     3.14\u202fPM a\u00a0b \U0001f469\u200d\U0001f52c ?y\n"


def test_name_in_a_line_keeps_what_is_no_control_character():
    for name in (
        "3.00.00\u202fPM.png",
        "\u8d64\u3000\u732b",
        "\u0645\u06cc\u200c\u062e",
        "\U0001f469\u200d\U0001f680",
    ):
        assert escape_terminal(name) == name
    assert escape_terminal("a\tb\nc\x1b[0m\u202e\u2028\udcff") == "a?b?c?[0m???"


def test_long_lines_are_wrapped_on_a_terminal_and_whole_in_a_file(monkeypatch, capsys):
    text = f"{'words ' * 20}/a/long-path/{'x' * 100} end"
    say("race", text)
    assert capsys.readouterr().out == f"race     {text}\n"
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stdout(Terminal()) as stdout:
        say("race", text)
        say("", "continued\n  a line of its own")
    lines = stdout.getvalue().splitlines()
    assert max(len(line) for line in lines if "/a/" not in line) <= 80
    assert [line[:9] for line in lines[:-1]] == ["race     ", *[" " * 9] * (len(lines) - 2)]
    assert lines[-1] == "  a line of its own"
    assert " ".join(line[9:] for line in lines[:-1]) == f"{text} continued", "a path that is copied must not be broken"


def test_progress_prints_a_line_at_each_tenth(capsys):
    tenths = Tenths("train", 40, "steps")
    for step in range(1, 41):
        tenths.reach(step)
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 10 and lines[0].startswith("train    4 of 40 steps, ") and lines[-1].startswith("train    40 of")
    )


def test_fast_work_prints_no_progress(capsys):
    tenths = Tenths("inspect", 40, "images", quiet_seconds=60)
    for step in range(1, 41):
        tenths.reach(step)
    assert capsys.readouterr().err == ""


def test_terminal_gets_no_progress_lines(monkeypatch):
    with contextlib.redirect_stderr(Terminal()) as stderr:
        assert module.has_terminal()
        Tenths("train", 1, "steps").reach(1)
    assert stderr.getvalue() == ""


def test_stopwatch_adds_up_the_parts_of_a_stage(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    stopwatch = Stopwatch()
    for stage in ("train", "evaluate", "train"):
        stopwatch.end(stage)
    assert stopwatch.seconds == {"train": 5.0, "evaluate": 2.0}


@pytest.mark.slow
def test_log_file_has_progress_lines_and_no_carriage_returns(tmp_path, timm_checkpoint):
    draw_folder(tmp_path / "images", per_class=8)
    args = ["--data_dir", "images", "--model_name", str(timm_checkpoint), "--num_train_epochs", "5"]
    command = [sys.executable, str(PROJECT / "train.py"), *args, "--per_device_train_batch_size", "4"]
    command += ["--recipe", "full", "--refit", "none"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert b"\r" not in result.stdout + result.stderr
    lines = [text for text in result.stderr.decode().splitlines() if text.startswith("train    ")]
    assert len(lines) == 10 and lines[-1].startswith("train    15 of 15 steps"), result.stderr


@pytest.mark.parametrize(
    ("share", "places", "expected"),
    [(0.718, 1, "71.8%"), (1, 1, "100.0%"), (2999 / 3000, 1, "99.9%"), (1e-5, 1, "0.0%"), (0, 1, "0.0%"),
     (0.996, 0, "99%"), (float("nan"), 1, "nan%")],
)  # fmt: skip
def test_only_all_is_100_percent(share, places, expected):
    assert percent(share, places) == expected


def test_names_that_differ_at_their_ends_differ_when_they_are_shortened():
    assert shorten("a" * 24) == "a" * 24
    first, second = (shorten(f"A long name of a class, number {number}") for number in (1, 2))
    assert first != second and len(first) == 24 and first == "A long name of …number 1"


def test_reader_of_the_progress_that_leaves_does_not_end_the_run(monkeypatch):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Left())
    Tenths("train", 10, "steps").reach(5)
    EpochTable.write_header(SimpleNamespace(process_index=0, eval_strategy="epoch"))
    assert not isinstance(sys.stderr, Left) and not isinstance(sys.stdout, Left)


def test_names_that_the_encoding_of_the_output_lacks_are_written_as_codes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    exit_on_user_error(lambda: say("careful", "\u732b"))()
    assert raw.getvalue().split() == [b"careful", b"\\u732b"]


def test_files_of_the_project_are_named_so_that_a_command_finds_them(monkeypatch, tmp_path):
    monkeypatch.chdir(PROJECT)
    assert of_project("predict.py") == "predict.py"
    monkeypatch.chdir(tmp_path)
    Path("predict.py").touch()  # of somebody else
    assert of_project("predict.py") == str(PROJECT / "predict.py")


@pytest.mark.parametrize(
    ("platform", "expected"),
    [("linux", "python 'my runs/a b' '^[^_]+' outputs/x"), ("win32", 'python "my runs/a b" "^[^_]+" outputs/x')],
)
def test_commands_are_quoted_for_the_shell_of_the_system(monkeypatch, platform, expected):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        command = quote("python", "my runs/a b", "^[^_]+", "outputs/x")
        folder = quote(r"outputs\my_run")
        odd = quote('a "b"', "my photos\\")
    assert command == expected and folder == {"linux": r"'outputs\my_run'", "win32": r"outputs\my_run"}[platform]
    assert odd == {"linux": "'a \"b\"' 'my photos\\'", "win32": r'"a \"b\"" "my photos\\"'}[platform]


def test_difference_is_in_points():
    assert [points(share) for share in (0.0123, -0.0004, -0.25)] == ["+1.2", "+0.0", "-25.0"]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.7184, "0.718"), (1.0, "1.000"), (0.99975, "0.999"), (0.0, "0.000")]
)
def test_only_a_perfect_f1_is_1(share, expected):
    assert fraction(share) == expected
