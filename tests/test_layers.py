"""The architecture: imports point down, functions and train.py are short, training arguments never change."""

import ast
import re
from pathlib import Path

import pytest
from conftest import PROJECT

# The floors, from the lowest up. A file may import from its own floor and from the floors below.
FLOORS = [
    ["luthier", "models"],
    ["luthier.images", "luthier.parsing", "luthier.options", "luthier.checks", "luthier.arguments"],
    ["luthier.training", "data"],
    ["luthier.scoring"],
    ["luthier.reporting"],
    ["luthier.serving"],
    ["train", "score", "audit", "compare", "predict", "push", "app", "export", "prepare"],
    ["benchmarks", "docs"],
]
COMMANDS = FLOORS[6]
MAX_FUNCTION_LINES = 60
MAX_TRAIN_LINES = 170
SOURCES = sorted(
    path for pattern in ("*.py", "luthier/**/*.py", "benchmarks/*.py", "docs/*.py") for path in PROJECT.glob(pattern)
)
ROOMS = [path for path in SOURCES if path.is_relative_to(PROJECT / "luthier")]


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the project."""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


def floor_of(name: str) -> int:
    """Return the floor of a module: the longest prefix in FLOORS decides."""
    matches = [
        (len(prefix), number)
        for number, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(matches)[1]


def imports_of(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, at any place in the file."""
    known = {name_of(source) for source in SOURCES}
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known


def relative_path(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_imports_point_down_only(path):
    own_floor = floor_of(name_of(path))
    assert {name for name in imports_of(path) if floor_of(name) > own_floor} == set()


@pytest.mark.parametrize("path", ROOMS, ids=relative_path)
def test_the_package_imports_no_root_file_but_models(path):
    root_modules = {source.stem for source in PROJECT.glob("*.py")} - {"models"}
    assert not imports_of(path) & root_modules


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_only_commands_and_benchmarks_import_data_and_arguments(path):
    allowed = floor_of(name_of(path)) >= floor_of("train")
    assert allowed or not imports_of(path) & {"data", "luthier.arguments"}


def test_models_imports_nothing_of_the_project():
    assert imports_of(PROJECT / "models.py") == set()


def test_no_circular_imports():
    imported = {name_of(path): imports_of(path) for path in SOURCES}

    def reachable(name: str) -> set[str]:
        seen, pending = set(), [name]
        while pending:
            new = imported[pending.pop()] - seen
            seen |= new
            pending += new
        return seen

    assert [name for name in imported if name in reachable(name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_functions_are_short(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES] == []


def test_train_script_is_short_and_has_its_sections():
    text = (PROJECT / "train.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_TRAIN_LINES
    sections = re.findall(r"^ +# (Data|Model|Probe|Train|Evaluate|Refit|Report)$", text, re.M)
    assert sections == ["Data", "Model", "Probe", "Train", "Evaluate", "Refit", "Report"]
    tree = ast.parse(text)
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Dict, ast.Try))]


@pytest.mark.parametrize("path", SOURCES, ids=relative_path)
def test_training_arguments_are_never_changed_after_they_are_built(path):
    targets = [
        target
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    changed = [
        ast.unparse(t) for t in targets if re.search(r"(training_args|trainer\.args|self\.args)\.", ast.unparse(t))
    ]
    assert changed == []
