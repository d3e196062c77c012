"""Generates docs/cli.md, the options of every command, from the parsers.

python -m docs.cli
"""

import argparse
from pathlib import Path

import app
import audit
import compare
import export
import predict
import prepare
import push
import score
from luthier.arguments import COMMON, build_parser
from luthier.parsing import value_of

PAGE = Path(__file__).with_name("cli.md")
HEAD = """# Commands and their options

Generated from the parsers by `python -m docs.cli`. Run the commands from the root of the checkout.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """Return the page."""
    sections = [HEAD, *render_train()]
    for module in (score, audit, prepare, compare, predict, export, push, app):
        shown = [action for action in module.build_parser()._actions if action.help != argparse.SUPPRESS]
        sections.append(f"## {module.__name__}.py\n\n{str(module.__doc__).strip()}\n\n{table(shown)}")
    return "\n".join(sections)


def render_train() -> list[str]:
    """Return the section of train.py, a table for each group of its options."""
    parser = build_parser()
    sections = [f"## train.py\n\n{parser.description}\n\n    {parser.usage}\n"]
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if group.title in ("data", "model"):
            sections.append(f"### {group.title}\n\n{table(shown)}")
    common = [action for action in parser._actions if action.dest in COMMON]
    sections.append(
        "### training\n\nThe options of `transformers.TrainingArguments` that people use, with Luthier's defaults. "
        f"`python train.py --help-all` shows all of them.\n\n{table(common)}"
    )
    return sections


def table(actions: list[argparse.Action]) -> str:
    """Return options as a Markdown table."""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for action in actions:
        if "--help" in action.option_strings:
            continue
        name = f"`{action.option_strings[0]} {value_of(action)}`" if action.option_strings else f"`{action.dest}`"
        name = f"`{action.option_strings[0]}`" if action.option_strings and action.nargs == 0 else name
        default = (
            "" if action.default in (None, False, []) else f"`{getattr(action.default, 'value', action.default)}`"
        )
        text = str(action.help).replace("|", "\\|")
        rows.append(f"| {name} | {default} | {text} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
