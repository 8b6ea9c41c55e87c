"""The README cannot lie: its commands print what it shows, its tables are generated.

`PYTHONPATH=tests python tests/documents/test_readme.py` writes what the commands print now into the
README.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from support import readme_attacks, readme_simulations
from typer.main import get_command

from fedlora_cli import METHODS, __version__, read_clients
from fedlora_cli.analysis.diagnosis import verdict
from fedlora_cli.cli import app
from fedlora_cli.methods.weights import Holdings, coverage

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"

_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def shell(command: str, folder: Path) -> str:
    """What a command prints, standard error included, in a terminal of 80 columns."""
    environment = os.environ | {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def ran(block: str, folder: Path) -> str:
    """The block again, with what its commands print now."""
    commands = re.findall(r"^\$ (.*)$", block, re.M)
    return "".join(f"$ {command}\n{shell(command, folder)}" for command in commands)


def prepared(folder: Path) -> Path:
    """A place like a fresh clone, for the commands to write in."""
    shutil.copytree(ROOT / "samples", folder / "samples")
    return folder


def methods_table() -> str:
    rows = ["| method | aggregates | weight of client k at rank index i | basis-free | source |"]
    rows += ["|---|---|---|---|---|"]
    for method in METHODS.values():
        paper = f"[{method.source}](https://arxiv.org/abs/{method.source.removeprefix('arXiv:')})"
        formula = method.formula.replace("|", "\\|")
        free = "yes" if method.basis_free else "no"
        rows.append(f"| `{method.name}` | {method.summary} | {formula} | {free} | {paper} |")
    return "\n".join(rows) + "\n"


def collapse_table() -> str:
    """The column sums of the weights on the sample round, and what they do to the energy."""
    cohort = read_clients([ROOT / "samples/round-01"]).cohort
    holdings = Holdings(cohort.ranks(cohort.modules[0]), cohort.samples, cohort.samples)
    c, raflora = coverage(holdings), METHODS["raflora"].rule(holdings).clients.sum(axis=0)
    bounds = [0, *cohort.distinct_ranks]
    rows = [
        "| rank index | clients | FlexLoRA: column sum | energy left after 1 round | after 5 | "
        "raFLoRA: column sum | energy left |",
        "|---|---|---|---|---|---|---|",
    ]
    for first, last in pairwise(bounds):
        holders = sum(client.adapter.rank >= last for client in cohort.clients)
        left = [100 * float(f"{factor:.2g}") for factor in (c[first] ** 2, c[first] ** 10)]
        rows.append(
            f"| {first + 1}-{last} | {holders} | {c[first]:.2f} | {left[0]:g} % | "
            f"{left[1]:g} % | {raflora[first]:.2f} | {100 * raflora[first] ** 2:g} % |"
        )
    return "\n".join(rows) + "\n"


GENERATED = {
    "methods": methods_table,
    "collapse": collapse_table,
    **readme_attacks.TABLES,
    **readme_simulations.TABLES,
}


def generated(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", re.S)


def test_every_console_block_prints_what_it_shows(tmp_path: Path) -> None:
    """One after the other in one folder, as a reader would."""
    folder = prepared(tmp_path)
    blocks = _CONSOLE.findall(README.read_text())

    assert len(blocks) >= 5
    for block in blocks:
        assert ran(block, folder) == block


def test_every_python_block_runs(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    for block in _PYTHON.findall(README.read_text()):
        (folder / "block.py").write_text(block)
        assert "Traceback" not in shell(f"{sys.executable} block.py", folder)


@pytest.mark.parametrize("name", GENERATED)
def test_generated_tables_are_up_to_date(name: str) -> None:
    found = generated(name).search(README.read_text())

    assert found is not None
    assert found[2] == GENERATED[name]()


def test_every_command_has_help_an_example_and_a_place_in_the_readme() -> None:
    commands = get_command(app).commands
    assert set(commands) == {
        *("init", "aggregate", "diagnose", "distribute", "predict", "compare", "simulate"),
        *("inspect", "methods"),
    }
    for name, command in commands.items():
        assert f"fedlora {name}" in README.read_text()
        assert command.help
        assert f"fedlora {name}" in command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("name", get_command(app).commands)
def test_every_option_is_in_the_section_of_its_command(name: str) -> None:
    section = re.search(rf"^## fedlora {name}$(.*?)^## ", README.read_text(), re.M | re.S)
    assert section is not None
    everywhere = {"--help", "--debug", "--null", "--jobs", "--json", "--quiet"}
    for parameter in get_command(app).commands[name].params:
        for flag in {*parameter.opts, *parameter.secondary_opts} - everywhere:
            if flag.startswith("--"):
                assert f"`{flag}" in section[1], f"{flag} of {name} is not in the README"


def test_the_verdicts_are_defined_by_the_numbers_that_decide() -> None:
    text = README.read_text()

    assert f"| collapsed | κ ≤ {verdict.COLLAPSED:g} |" in text
    assert f"reaches {verdict.COLLAPSED:g} within {verdict.HORIZON} rounds |" in text
    assert f"| at risk | κ ≤ {verdict.AT_RISK:g}, or" in text
    assert f"by less than {verdict.RATE_AT_RISK:g} a round |" in text


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def rewrite() -> None:
    """Bring the README up to date."""
    with tempfile.TemporaryDirectory() as place:
        folder = prepared(Path(place))
        blocks = {block: ran(block, folder) for block in _CONSOLE.findall(README.read_text())}
    # Read once more: the commands took a minute, in which somebody may have written on.
    text = README.read_text()
    for name, make in GENERATED.items():
        text = generated(name).sub(lambda found, make=make: found[1] + make() + found[3], text)
    for block, now in blocks.items():
        text = text.replace(f"```console\n{block}```", f"```console\n{now}```")
    README.write_text(text)


if __name__ == "__main__":
    rewrite()
