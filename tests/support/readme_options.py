"""The documents' tables of commands and options, from the help of the commands."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from itertools import groupby
from typing import Any

import typer

from fedlora_cli.cli.app import COMMANDS as _SUMMARIES
from fedlora_cli.cli.app import load

COMMANDS = {name: load(name) for name in _SUMMARIES}

REFERENCE = "fedlora_cli/cli/README.md"

#: Commands that must have an option before it is shown once for all of them.
_MANY = 3

_HEADS = "| option | does |\n|---|---|\n"


def options_of(name: str) -> list[tuple[str, str, str]]:
    """Panel, option with its value, and help, of each parameter in the order of the help.

    >>> options_of("methods")[0]
    ('', '--json', 'Print one JSON document on standard output.')
    """
    command = COMMANDS[name]
    rows = [_row(parameter, typer.Context(command)) for parameter in command.params]
    panels = list(dict.fromkeys(panel for panel, _, _ in rows))
    return sorted(rows, key=lambda row: panels.index(row[0]))


def _row(parameter: Any, context: typer.Context) -> tuple[str, str, str]:
    option, help_text = parameter.get_help_record(context)
    if parameter.param_type_name == "argument":
        option = parameter.metavar
    return getattr(parameter, "rich_help_panel", None) or "", option, " ".join(help_text.split())


def _shared() -> list[tuple[str, str]]:
    """The options, with their help, that three commands or more have."""
    rows = [row[1:] for name in COMMANDS for row in options_of(name)]
    return [row for row, count in Counter(rows).items() if count >= _MANY]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def shared_table() -> str:
    return _HEADS + "".join(_line(f"`{option}`", text) for option, text in _shared())


def options_table(name: str) -> str:
    """The options of a command, panel by panel, and the names of those that it shares."""
    shared = _shared()
    table = _HEADS
    own = [row for row in options_of(name) if row[1:] not in shared]
    for panel, group in groupby(own, key=lambda row: row[0]):
        table += _line(f"**{panel}**", "") if panel else ""
        table += "".join(_line(f"`{option}`", text) for _, option, text in group)
    names = re.findall(
        r"--[\w-]+", " ".join(row[1] for row in options_of(name) if row[1:] in shared)
    )
    return table + _line("**Shared**", ", ".join(f"`{flag}`" for flag in names))


def commands_table() -> str:
    """A line for each command, with a link to its section."""
    lines = [
        f"| [`fedlora {name}`]({REFERENCE}#fedlora-{name}) | {command.get_short_help_str(200)} |\n"
        for name, command in COMMANDS.items()
    ]
    return "| command | does |\n|---|---|\n" + "".join(lines)


TABLES = {
    "commands": commands_table,
    "options shared": shared_table,
    **{f"options {name}": partial(options_table, name) for name in COMMANDS if name != "methods"},
}
