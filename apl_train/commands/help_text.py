"""How `apl` explains itself: what an option does and what holds without it, on lines of a terminal's width."""

from __future__ import annotations

import textwrap
from argparse import SUPPRESS, Action
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from apl_core import errors

_SETTINGS = "settings"
_STANDARD = ("positional arguments", "options", "subcommands")


class Help(DefaultHelpFormatter):
    """Help without the names of Python's types, and with a default only where there is one."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if action.dest == "help":
            return "show this help and exit"
        if action.required and action.option_strings:
            return f"{text} (required)"
        if action.nargs == 0 or action.default in (None, SUPPRESS, "", [], ()) or not action.option_strings:
            return text
        held = "%(default)s"
        if isinstance(action.default, bool):
            held = str(action.default).lower()
        elif isinstance(action.default, list | tuple):  # as it is written on the command line
            held = " ".join(map(str, action.default))
        return f"{text} (default: {held})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled, their lines that begin with blanks stay as they are."""
        parts = []
        for part in text.split("\n\n"):
            lines = part.splitlines()
            kept = all(line.startswith(" ") for line in lines[1:]) and len(lines) > 1
            parts.append("\n".join(indent + line for line in lines) if kept else
                         textwrap.fill(" ".join(part.split()), width, initial_indent=indent, subsequent_indent=indent))
        return "\n\n".join(parts)


def exit_codes() -> str:
    """The exit codes, each in the words of the errors that bring it about."""
    rows = {0: "Done."}
    for kind in errors.APLError.__subclasses__():
        if kind.__module__ == errors.__name__ and kind is not errors.PolicyError:  # of hosts alone
            rows.setdefault(kind.exit_code, (kind.__doc__ or kind.__name__).splitlines()[0])
    lines = (textwrap.fill(words, 78, initial_indent=f"  {code:<5}", subsequent_indent=" " * 7)
             for code, words in sorted(rows.items()))
    return "exit codes:\n" + "\n".join(lines)


def parser(name: str, description: str, **options: Any) -> ArgumentParser:
    """A parser of `apl` (name "") or of one of its commands."""
    text = description[:1].upper() + description[1:]
    return ArgumentParser(prog=f"apl {name}".strip(), description=text if text.endswith(".") else f"{text}.",
                          formatter_class=Help, epilog=options.pop("epilog", exit_codes() if not name else None),
                          **options)


def name_groups(made: ArgumentParser) -> None:
    """Settings that come from a dataclass stand under a word, not under its docstring."""
    for group in made._action_groups:
        if group.title not in _STANDARD:
            group.title = _SETTINGS
