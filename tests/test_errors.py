"""What ends in one message, and what keeps its traceback: a user's mistake and a bug."""

import errno
import subprocess
import sys
import textwrap

import pytest
from conftest import PROJECT

import models
from luthier.errors import UserError, exit_on_user_error, message_for_user


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("give another"), "give another"),
        (models.ModelError("no such model"), "no such model"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: No space left on device. Free some"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), "/data/x: Permission denied. Free some"),
    ],
)
def test_users_mistake_is_one_message_and_exit_code_2(error, message, capsys):
    @exit_on_user_error
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1


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


def test_bug_in_the_training_loop_of_the_library_keeps_its_traceback(tmp_path):
    """A ValueError after hours must say where it came from."""
    code = f"""
        import sys
        sys.path[:0] = [{str(PROJECT)!r}, {str(PROJECT / "tests")!r}]
        from pathlib import Path
        from conftest import draw_folder
        from luthier.training.trainer import SafeTrainer
        import train

        def broken(self, *arguments, **options):
            raise ValueError("a bug of the library")

        SafeTrainer.training_step = broken
        draw_folder(Path("images"), per_class=5)
        train.main(["--data_dir", "images", "--model_name", "simple_cnn", "--num_train_epochs", "1"])
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "a bug of the library" in ran.stderr


def test_developers_see_the_traceback_of_a_users_mistake_too():
    command = [sys.executable, "-X", "dev", "-W", "ignore", str(PROJECT / "train.py"), "--learning_rat", "1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1 and "Traceback" in ran.stderr and "did you mean 'learning_rate'" in ran.stderr
