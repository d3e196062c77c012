"""The README and the docs: every link, file, option and command in them exists, and their lists are complete."""

import re

import pytest
from conftest import PROJECT

from luthier.arguments import build_parser
from luthier.images.decode import EXTENSIONS
from luthier.images.views import AUGMENTATIONS
from luthier.parsing import option_names
from luthier.scoring.screening import HUB_BACKBONES
from luthier.training.recipe import RECIPES
from models import EFFICIENTNETS

COMMANDS = ("train", "score", "audit", "compare", "predict", "push", "app", "export", "prepare")
PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request):
    return request.param


def anchors_of(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert target.startswith("https://") or linked.exists(), target
        assert not anchor or target.startswith("https://") or anchor in anchors_of(linked), f"{target}#{anchor}"


def test_commands_name_real_options_and_files(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    train_commands = [line for line in blocks.splitlines() if "train.py" in line]
    known = {*option_names(build_parser()), "help"}
    for line in train_commands:
        _, _, options = line.split(" #")[0].partition("train.py")
        assert set(re.findall(r"--(\w+)", options)) <= known, line
    for name in re.findall(r"(?:configs|benchmarks)/[\w.]+|requirements[\w.-]*\.txt", blocks):
        assert (PROJECT / name).exists(), name


def test_commands_besides_train_name_real_options(page):
    cli = (PROJECT / "docs/cli.md").read_text()  # which is that of the parsers
    sections = re.findall(r"^## (\w+)\.py\n(.*?)(?=^## |\Z)", cli, re.MULTILINE | re.DOTALL)
    options = {name: set(re.findall(r"^\| `--(\w+)", text, re.MULTILINE)) for name, text in sections}
    options["compare"] |= set(option_names(build_parser()))  # which it passes on
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
    for name, rest in re.findall(r"(?:python|launch) (\w+)\.py(.*)", blocks.replace("\\\n", " ")):
        if name != "train":
            assert set(re.findall(r"--(\w+)", rest.split(" #")[0])) <= options[name], f"{name}.py{rest}"


def test_options_of_the_launcher_exist():
    """Before the command's name; the scripts in cloud/ keep some of them in a variable `several`."""
    from accelerate.commands.launch import launch_command_parser

    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    found = set()
    for path in (*PAGES, *PROJECT.glob("cloud/*.*"), PROJECT / "accelerate_config.yaml"):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for parts in re.findall(r"accelerate launch (.*?)(?:train|score)\.py|several\+?=(.*)", text):
            options = set(re.findall(r"--[\w-]+", "".join(parts)))
            assert options <= known, f"{path.name}: {options - known}"
            found |= options
    assert {"--config_file", "--quiet", "--machine_rank", "--main_process_port"} <= found


def test_commands_exist(page):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
    for name in re.findall(r"(?:python|launch) (\w+)\.py", blocks):
        assert name in COMMANDS and (PROJECT / f"{name}.py").exists()
    for module in re.findall(r"python -m ([\w.]+)", page.read_text()):
        assert module in ("venv", "http.server") or (PROJECT / f"{module.replace('.', '/')}.py").exists(), module


def test_list_of_options_is_up_to_date():
    from docs import cli

    assert cli.PAGE.read_text(encoding="utf-8") == cli.render(), "run: python -m docs.cli"


def test_there_is_one_word_for_an_image():
    folders = ("benchmarks", "cloud", "configs", "docs", "luthier", "tests")  # there may be a venv/, or images
    for path in (*PROJECT.glob("*.*"), *(path for name in folders for path in PROJECT.glob(f"{name}/**/*.*"))):
        hidden = any(part.startswith(".") for part in path.relative_to(PROJECT).parts)
        if (
            path.suffix in (".py", ".md", ".yaml", ".html", ".sh", ".txt")
            and not hidden
            and "outputs" not in path.parts
        ):
            assert not re.search("pict" + "ure", path.read_text(encoding="utf-8"), re.I), path


def test_readme_begins_with_a_sentence_an_image_and_a_table():
    text = (PROJECT / "README.md").read_text()
    assert [text.index(part) for part in ("Fine-tune an image", "![", "| images |", "## Start")] == sorted(
        text.index(part) for part in ("Fine-tune an image", "![", "| images |", "## Start")
    )
    assert "pip install -r requirements.txt\naccelerate launch train.py\n" in text
    assert "CC BY-SA 4.0" in text and "OpenMoji" in text


def test_test_command_is_the_one_ci_runs():
    assert "pip install -r requirements-dev.txt && pytest\n" in (PROJECT / "README.md").read_text()
    script = (PROJECT / ".ci/run").read_text()
    assert "-r requirements-dev.txt" in script and "\npytest\n" in script


def test_contributing_says_where_every_module_lives():
    _, _, section = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## What lives where")
    named = set(re.findall(r"`(\w+)`", section.partition("\n## ")[0]))
    modules = {path.stem for path in (PROJECT / "luthier").rglob("*.py")} - {"__init__"}
    assert modules - named == {"options", "checks", "arguments", "parsing"}, "these are named with their folder"


def test_usage_lists_every_recipe_augmentation_and_extension():
    text = (PROJECT / "docs/usage.md").read_text()
    assert all(f"| `{name}` |" in text for name in (*AUGMENTATIONS, *RECIPES))
    assert all(f"| `{name}` | Apache-2.0 |" in text for name in (*EFFICIENTNETS, *HUB_BACKBONES))
    assert all(f"{extension}" in text for extension in EXTENSIONS)


def test_example_of_the_audit_opens_what_the_text_writes():
    _, _, section = (PROJECT / "docs/usage.md").read_text().partition("\n## The audit")
    text = section.partition("\n## ")[0]
    assert text.index("--output_dir audits/my_photos") < text.index('open("audits/my_photos/audit.json"')
    assert '["suspect_labels"] or []' in text
