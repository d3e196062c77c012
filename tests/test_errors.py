"""Errors: a user's mistake ends in one message and exit code 2, and a bug keeps its traceback."""

import errno
import subprocess
import sys
import textwrap

import pytest
from conftest import PROJECT
from safetensors import SafetensorError
from torch.utils.data import DataLoader

import models
from luthier.errors import UserError, exit_on_user_error, first_line, message_for_user


def caused(cause: Exception) -> Exception:
    error = RuntimeError("while the dataset was written")
    error.__cause__ = cause
    return error


def test_first_line_of_an_error_is_its_kind_where_it_says_nothing():
    assert first_line(ValueError("\none\ntwo")) == "one" and first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("one"), "another\ntext") == "another"


def test_ctrl_c_gives_one_line(capsys):
    @exit_on_user_error
    def command():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped  by Ctrl-C\n"


def test_message_has_no_control_characters(capsys):
    @exit_on_user_error
    def command():
        raise UserError("no class \x1b[31mred\nin two lines")

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == "error: no class ?[31mred\nin two lines\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("give another"), "give another"),
        (models.ModelError("no such model"), "no such model"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space left on device. Free some"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/x"),
            "/data/x: Permission denied. Check the permissions",
        ),
        (
            caused(OSError(errno.ENOSPC, "No space left on device", "/data/x")),
            "/data/x: No space left on device. Free",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "No space left on device, while weights",
        ),
        (OSError("Not enough disk space. Needed: 1 GB"), "Not enough disk space. Needed: 1 GB. Free some"),
    ],
)
def test_users_mistake_gives_one_message_and_exit_code_2(error, message, capsys):
    @exit_on_user_error
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_info:
        command()
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1


class Rows:
    """Rows whose file cannot be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> int:
        raise UserError("train.parquet cannot be read: mend it,\nand resume")


@pytest.mark.parametrize("workers", [0, 1])
def test_mistake_in_a_data_worker_gives_its_message_alone(workers, capsys):
    @exit_on_user_error
    def command() -> None:
        list(DataLoader(Rows(), num_workers=workers))  # type: ignore[arg-type]

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == "error: train.parquet cannot be read: mend it,\nand resume\n"


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("x"), FileNotFoundError(errno.ENOENT, "x"), OSError("x")]
)
def test_bug_keeps_its_traceback(error):
    @exit_on_user_error
    def command() -> None:
        raise error

    assert message_for_user(error) is None
    with pytest.raises(type(error)):
        command()


@pytest.mark.slow
def test_bug_in_the_librarys_training_loop_keeps_its_traceback(tmp_path):
    """A ValueError after hours of training must show where it comes from."""
    code = f"""
        import sys
        sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}]
        from pathlib import Path
        from conftest import draw_folder
        from luthier.training.safe_trainer import SafeTrainer
        import train

        def broken(self, *arguments, **options):
            raise ValueError("a bug of the library")

        SafeTrainer.training_step = broken
        draw_folder(Path("images"), per_class=5)
        train.main(["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1"])
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" in result.stderr and "a bug of the library" in result.stderr


def test_development_mode_shows_the_traceback_of_a_users_mistake():
    command = [sys.executable, "-X", "dev", "-W", "ignore", str(PROJECT / "train.py"), "--learning_rat", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr and "did you mean 'learning_rate'" in result.stderr


def test_remedy_says_which_command_goes_on():
    said = str(message_for_user(PermissionError(errno.EACCES, "x", "/y")))
    assert "an interrupted run of train.py goes on with" in said
