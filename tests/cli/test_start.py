"""The start of the command: the modules that it imports, and completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora_cli.cli.app import COMMANDS, load

HEAVY = {"torch", "numpy", "peft", "transformers", "matplotlib", "safetensors"}
ROOMS = {"aggregation", "analysis", "clients", "formats", "methods", "reports", "rounds"}


def imported(*arguments: str) -> tuple[set[str], set[str]]:
    """The heavy libraries and the rooms that are loaded after the command."""
    program = (
        "import json, sys\n"
        "from fedlora_cli.cli import app\n"
        f"try: app({list(arguments)!r}, prog_name='fedlora')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    rooms = {name.split(".")[1] for name in modules if name.startswith("fedlora_cli.")}
    return HEAVY & modules, ROOMS & rooms


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_list_of_commands_imports_none_of_them(arguments: list[str]) -> None:
    assert imported(*arguments) == (set(), set())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_no_library_of_tensors(command: str) -> None:
    libraries, _ = imported(command, "--help")

    assert libraries <= {"numpy"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_begins_with_its_line_in_the_list(command: str) -> None:
    assert load(command).get_short_help_str(200) == COMMANDS[command]


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("fedlora d", {"diagnose", "distribute"}),
        ("fedlora aggregate --method fl", {"flexlora", "flora"}),
        ("fedlora simulate --method ra", {"raflora"}),
        ("fedlora simulate --preset vit", {"vit-cifar100"}),
        ("fedlora diagnose --fail-on c", {"collapsing", "collapsed"}),
        ("fedlora diagnose --fail-on at", {"at-risk"}),
        ("fedlora init --task SEQ_", {"SEQ_2_SEQ_LM", "SEQ_CLS"}),
        ("fedlora aggregate --basis s", {"stored", "svd"}),
    ],
)
def test_completion_knows_the_words(typed: str, completed: set[str], tmp_path: Path) -> None:
    words = typed.split()
    environment = os.environ | {
        "_FEDLORA_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    program = "from fedlora_cli.cli import app; app(prog_name='fedlora')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )

    assert set(done.stdout.split()) == completed, done.stderr
