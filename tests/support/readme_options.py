"""The documents' tables of commands and options, from the help of the commands."""

from __future__ import annotations

from functools import partial
from itertools import groupby
from typing import Any

import typer
from typer.main import get_command

from fedlora_cli.cli import app

COMMANDS = get_command(app).commands

REFERENCE = "fedlora_cli/cli/README.md"

_HEADS = "| option | does |\n|---|---|\n"


def options_of(name: str) -> list[tuple[str, str, str]]:
    """Panel, option with its value, and help, of each parameter in the order of the help.

    >>> options_of("methods")[0]
    ('', '--json', 'One JSON document on standard output.')
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


def _common() -> list[tuple[str, str, str]]:
    """The options that all commands have, with the same help."""
    first, *others = (options_of(name) for name in COMMANDS)
    return [row for row in first if all(row in other for other in others)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def common_table() -> str:
    return _HEADS + "".join(_line(f"`{option}`", text) for _, option, text in _common())


def options_table(name: str) -> str:
    """The options of a command but for the common ones, with a line for each panel."""
    table = _HEADS
    rows = [row for row in options_of(name) if row not in _common()]
    for panel, group in groupby(rows, key=lambda row: row[0]):
        table += _line(f"**{panel}**", "") if panel else ""
        table += "".join(_line(f"`{option}`", text) for _, option, text in group)
    return table


def commands_table() -> str:
    """A line for each command, with a link to its section."""
    lines = [
        f"| [`fedlora {name}`]({REFERENCE}#fedlora-{name}) | {command.get_short_help_str(200)} |\n"
        for name, command in COMMANDS.items()
    ]
    return "| command | does |\n|---|---|\n" + "".join(lines)


TABLES = {
    "commands": commands_table,
    "options common": common_table,
    **{f"options {name}": partial(options_table, name) for name in COMMANDS if name != "methods"},
}
