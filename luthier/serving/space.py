"""A Space: the app that tries a model, published on the Hub with the modules and packages that it needs."""

import ast
import importlib.metadata
import json
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from luthier.errors import UserError
from luthier.serving import hub
from luthier.terminal import PROJECT

APP = "app.py"


def push_to_space(model_name: str, repo_id: str, private: bool | None = None) -> str:
    """Publish the app of a model on the Hub as a Space; return its address.

    Args:
        model_name: of the model on the Hub.
        repo_id: of the Space, `owner/name`.
        private: whether a new Space is hidden from others; None is the owner's default.

    Raises:
        UserError: the model is not on the Hub, or the Hub does not accept the Space.
    """
    if Path(model_name).exists() or not all(model_name.partition("/")):
        raise UserError(
            "a Space loads its model from the Hub: push it (push.py), and give its name there, such as "
            f"me/instruments, instead of {model_name}"
        )
    hub.with_retries(lambda: HfApi().repo_info(model_name), model_name)
    repo_id = hub.check_access(repo_id, private, sdk="gradio")
    with tempfile.TemporaryDirectory() as staging:
        stage_space(model_name, repo_id, Path(staging))
        return hub.upload(Path(staging), repo_id, "space", "App by Luthier")


def stage_space(model_name: str, repo_id: str, staging: Path) -> None:
    """Write the files of a Space into an empty folder."""
    modules, packages = find_imports()
    for module in modules:
        (staging / module).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / module, staging / module)
    (staging / "start.py").write_text(f"from app import main\n\nmain([{model_name!r}])\n", encoding="utf-8")
    requirements = "\n".join(find_requirements(packages)) + "\n"
    (staging / "requirements.txt").write_text(requirements, encoding="utf-8")
    (staging / "README.md").write_text(
        f"""---
title: {json.dumps(repo_id.split("/")[1])}
sdk: gradio
sdk_version: {importlib.metadata.version("gradio")}
python_version: "{sys.version_info.major}.{sys.version_info.minor}"
app_file: start.py
models:
- {model_name}
---

An app to try [{model_name}](https://huggingface.co/{model_name}). Made with Luthier. For a private model, add a
token that may read this model and nothing else, as the secret HF_TOKEN in the settings of the Space. Whoever sees the
Space can then use the model.
""",
        encoding="utf-8",
    )


def find_imports() -> tuple[list[str], set[str]]:
    """Return the files of the project that the app needs, by their imports, and the packages that these import.

    Imports for type checkers are left out, and so is this module: a Space does not publish Spaces.
    """
    files, packages, waiting = [], set(), [APP]
    while waiting:
        file = waiting.pop()
        if file in files or PROJECT / file == Path(__file__).resolve():
            continue
        files.append(file)
        for name in _imported_names((PROJECT / file).read_text(encoding="utf-8")):
            own = _file_of(name)
            if own:
                parents = Path(own).parents
                waiting += [own, *(str(p / "__init__.py") for p in parents if (PROJECT / p / "__init__.py").exists())]
            else:
                packages.add(name.partition(".")[0])
    ours = {file.partition("/")[0].removesuffix(".py") for file in files}
    return sorted(files), packages - ours - set(sys.stdlib_module_names)


def find_requirements(packages: set[str]) -> list[str]:
    """Return the lines of requirements.txt for packages, given by the names that they are imported by."""
    distributions = importlib.metadata.packages_distributions()
    needed = {_compared(name) for package in packages for name in distributions.get(package, [package])}
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.split("#")[0].strip() for line in lines]
    return [line for line in requirements if _compared(line.split(">=")[0].split("==")[0]) in needed]


def _compared(distribution: str) -> str:
    """Return the name of a distribution as indexes compare it: pi-heif calls itself pi_heif."""
    return distribution.lower().replace("_", "-")


def _imported_names(source: str) -> set[str]:
    """Return the dotted names of all modules that a file imports, or may import (`from package import name`)."""
    tree, names = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _file_of(name: str) -> str | None:
    """Return the file of a module of this project, None for any other name."""
    path = name.replace(".", "/")
    return next((file for file in (f"{path}.py", f"{path}/__init__.py") if (PROJECT / file).is_file()), None)
