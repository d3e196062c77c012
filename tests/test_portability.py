"""Windows and macOS: every module of the project can be imported without modules that only POSIX has."""

import errno
import io
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECT
from safetensors import SafetensorError

from luthier import cache, checks, errors, files, terminal
from luthier.arguments import parse_arguments
from luthier.errors import UserError, message_for_user
from luthier.images import duplicates
from luthier.images.folder_checks import subfolders
from luthier.options import DataArguments

MODULES = sorted(
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")
    for pattern in ("*.py", "luthier/**/*.py")
    for path in PROJECT.glob(pattern)
)


@pytest.mark.slow
def test_every_module_can_be_imported_without_posix(tmp_path):
    code = f"""
        import builtins, importlib, os, sys
        import transformers, datasets  # on Linux their dependencies use the modules that are hidden from the project

        def without_posix(name, globals=None, *rest, **more):
            if name in ("fcntl", "resource") and str((globals or {{}}).get("__file__")).startswith({str(PROJECT)!r}):
                raise ModuleNotFoundError(name)
            return original_import(name, globals, *rest, **more)

        sys.path.insert(0, {str(PROJECT)!r})
        original_import, builtins.__import__ = builtins.__import__, without_posix
        del os.sched_getaffinity
        for name in {MODULES!r}:
            importlib.import_module(name)
        from luthier.processes import available_cores

        assert available_cores() >= 1
        print("imported", len({MODULES!r}))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and f"imported {len(MODULES)}" in result.stdout, result.stderr


def test_posix_only_modules_are_imported_nowhere():
    for path in (*PROJECT.glob("*.py"), *PROJECT.glob("luthier/**/*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (fcntl|resource|pwd|grp|termios)\b", text, re.M), path


@pytest.fixture
def refusals(monkeypatch):
    """The errors that renaming ends with first, as while a scanner reads a new file."""
    refusals, replace = [PermissionError(13, "Access is denied")] * 2, Path.replace

    def refuse(self, target):
        if refusals:
            raise refusals.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    return refusals


def test_new_files_are_renamed_on_windows_once_a_scanner_has_read_them(tmp_path, monkeypatch, refusals):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").touch()
    with pytest.raises(PermissionError):
        files.rename(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(files.sys, "platform", "win32")
    files.rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/x").exists() and not refusals


@pytest.mark.parametrize(("platform", "started"), [("darwin", ["spawn"]), ("win32", ["spawn"]), ("linux", [])])
def test_faiss_has_a_process_of_its_own_where_it_crashes_beside_torch(monkeypatch, platform, started):
    found = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers, mp_context):
            found.append(mp_context.get_start_method())
            super().__init__(workers)

    monkeypatch.setattr(duplicates.sys, "platform", platform)
    monkeypatch.setattr(duplicates, "ProcessPoolExecutor", Pool)
    duplicates.near_duplicates(np.zeros((1, 3, 32), np.uint8), np.zeros((1, 64, 64), np.uint8))
    assert found == started


def test_reader_that_leaves_does_not_end_the_run_on_windows(monkeypatch):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("sys.stdout", Left())
    with pytest.raises(OSError, match="Invalid argument"), terminal.ignore_closed("stdout"):
        print("an error of another kind, elsewhere")
    monkeypatch.setattr(terminal.sys, "platform", "win32")
    with terminal.ignore_closed("stdout"):
        print("a")
    assert not isinstance(sys.stdout, Left)


def test_data_workers_are_refused_where_processes_cannot_fork(monkeypatch):
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="--dataloader_num_workers needs a system that can fork"):
        parse_arguments(["--dataloader_num_workers", "2", "--use_cpu", "True"])


def test_shell_scripts_keep_their_line_ends_in_a_checkout_on_windows():
    assert "*.sh text eol=lf" in (PROJECT / ".gitattributes").read_text(encoding="utf-8").splitlines()
    for path in PROJECT.glob("cloud/*.sh"):
        assert b"\r" not in path.read_bytes(), path


def test_class_folders_come_in_the_same_order_on_every_system(tmp_path):
    class LikeWindows(type(tmp_path)):
        def __lt__(self, other):
            return str(self).lower() < str(other).lower()

    for name in ("Zebra", "lion"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in subfolders(LikeWindows(tmp_path))] == ["Zebra", "lion"]


def test_kept_features_wait_on_windows_for_a_scanner(tmp_path, monkeypatch, refusals):
    monkeypatch.setattr(cache.datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(files.sys, "platform", "win32")
    cache.write_cached("scanned", "a", torch.arange(3))
    found = cache.read_cached("scanned", "a")
    assert not refusals and found is not None and found.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("There is not enough space on the disk. (os error 112)", "while weights are written. Free some space"),
        ("Access is denied. (os error 5)", "while weights are written. Check the permissions"),
        ("The printer is out of paper. (os error 28)", None),  # which is a full disk elsewhere
    ],
)
def test_numbers_of_errors_are_those_of_windows_there(monkeypatch, text, message):
    monkeypatch.setattr(errors.sys, "platform", "win32")
    found = message_for_user(SafetensorError(f"I/O error: {text}"))
    assert found is None if message is None else message in str(found)


def test_backslash_before_a_closing_quote_is_named_on_windows(monkeypatch):
    options = dict.fromkeys(checks.PATHS) | {"data_dir": 'my photos" --recipe probe'}
    checks._check_quotes(options)
    monkeypatch.setattr(checks.sys, "platform", "win32")
    with pytest.raises(UserError, match=r'--data_dir my photos" .* a backslash before a closing quote: leave'):
        checks._check_quotes(options)
    checks._check_quotes(dict.fromkeys(checks.PATHS) | {"data_dir": "my photos"})


def test_paths_are_options():
    assert set(checks.PATHS) <= {*checks.OWN, *checks.NAMES}


def test_data_that_is_a_whole_drive_has_a_name():
    assert DataArguments(data_dir=str(Path(Path.cwd().anchor))).name == "images"


def test_commas_are_quoted_for_powershell(monkeypatch):
    monkeypatch.setattr(terminal.sys, "platform", "win32")
    assert terminal.quote("--set", "a=none,augmix", "b") == '--set "a=none,augmix" b'
