"""Windows and macOS: every module of the project can be imported without modules that only POSIX has."""

import re
import subprocess
import sys
import textwrap

import pytest
from conftest import PROJECT

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
