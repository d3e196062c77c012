"""Text from file names, labels and servers, made safe for a terminal, a spreadsheet or Markdown."""

import html
import re
import unicodedata


def escape_terminal(text: str) -> str:
    """Return one line of text without control characters; what joins letters and emoji stays, and every space."""
    return "".join("?" if character == "\n" or _is_control(character) else character for character in text)


def escape_lines(text: str) -> str:
    """Return text of several lines without control characters, as `escape_terminal`; tabs become spaces."""
    return "".join("?" if _is_control(character) else character for character in text.expandtabs())


def _is_control(character: str) -> bool:
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"  # the direction of the text
    return character != "\n" and (turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"))


def escape_cell(text: str) -> str:
    """Return text that a spreadsheet does not take for a formula; a number, as of the class -1, stays as it is."""
    is_formula = text.startswith(("=", "+", "-", "@", "\t", "\r")) and not re.fullmatch(r"[-+]\d+([.,]\d+)?", text)
    return f"'{text}" if is_formula else text


def escape_markdown(text: object) -> str:
    """Return text that Markdown, also with formulas between dollar signs, and HTML show as it is, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{character}" if character in r"\`*_[]|~#$" else character for character in escaped)
