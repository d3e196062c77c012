"""Text from file names, labels and servers, made safe for a terminal, a spreadsheet or Markdown."""

import html


def escape_terminal(text: str) -> str:
    """Return text without the control characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def escape_lines(text: str) -> str:
    """Return text of several lines, each as `escape_terminal` returns it."""
    return "\n".join(map(escape_terminal, text.split("\n")))


def escape_cell(text: str) -> str:
    """Return text that a spreadsheet does not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def escape_markdown(text: object) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{character}" if character in r"\`*_[]|~#" else character for character in escaped)
