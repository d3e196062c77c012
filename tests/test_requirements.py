"""Every package that the code imports is listed in a requirements file."""

import ast
import importlib.metadata
import re
import sys

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHON = re.compile(r"Programming Language :: Python :: 3\.(\d+)$").match
SOURCES = ("*.py", "tests/**/*.py")
OWN_MODULES = {path.stem for pattern in SOURCES for path in PROJECT.glob(pattern)} | {"luthier", "benchmarks", "docs"}


def imported(*patterns: str) -> set[str]:
    """Return the top-level names that files import."""
    names = set()
    for path in (path for pattern in patterns for path in PROJECT.glob(pattern)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return names - OWN_MODULES - set(sys.stdlib_module_names)


def required(*files: str) -> set[str]:
    """Return the names of the packages in requirements files, as they are compared (PEP 503)."""
    lines = [line for file in files for line in (PROJECT / file).read_text(encoding="utf-8").splitlines()]
    names = (re.match(r"[A-Za-z0-9][\w.-]*", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def missing(names: set[str], packages: set[str]) -> set[str]:
    distributions = importlib.metadata.packages_distributions()
    return {
        name
        for name in names
        if not {re.sub(r"[-_.]+", "-", d).lower() for d in distributions.get(name, [name])} & packages
    }


def test_everything_that_the_product_imports_is_required():
    files = ("requirements.txt", "requirements-app.txt", "requirements-export.txt")
    assert missing(imported("*.py", "luthier/**/*.py"), required(*files)) == set()


def test_everything_that_the_tests_import_is_required():
    files = ("requirements.txt", "requirements-app.txt", "requirements-export.txt", "requirements-dev.txt")
    assert missing(imported("tests/**/*.py"), required(*files)) - {"packaging"} == set()


def test_lock_has_everything_that_the_requirements_need():
    """The image and the cloud would otherwise get versions that nobody has tried."""
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    todo = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    found: dict[str, set[str]] = {}  # the extras of each package
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras - found[name]:
            found[name] = found.get(name, set()) | requirement.extras
            needed = map(Requirement, importlib.metadata.requires(name) or ())
            todo += [
                each
                for each in needed
                if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in {"", *found[name]})
            ]
    assert found.keys() - required("requirements.lock") == set()


def test_readme_names_the_versions_of_python_for_which_there_are_builds():
    names = ("numpy", "scipy", "matplotlib", "torch", "faiss-cpu", "pillow")
    lock = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in lock.splitlines() if "==" in line)
    if any(Version(importlib.metadata.version(name)) < Version(pins[name]) for name in names):
        pytest.skip("older versions, as for Python 3.10, know no newer Python")
    newest = min(
        max(
            int(found[1])
            for line in importlib.metadata.metadata(name).get_all("Classifier")
            if (found := PYTHON(line))
        )
        for name in names
    )
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python 3.10 to 3.{newest}" in (PROJECT / page).read_text(encoding="utf-8")
