"""The documents agree with the code: commands print the shown output, tables are generated.

`PYTHONPATH=tests python tests/documents/test_readme.py` rewrites the output of all commands and all
generated tables.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.readme import RESULTS
from benchmarks.rows import load, markdown
from support import readme_attacks, readme_options, readme_simulations

from fedlora_cli import METHODS, FedloraError, __version__, read_clients
from fedlora_cli.analysis.diagnosis import verdict
from fedlora_cli.cli.command import FINDING, TERMINATED
from fedlora_cli.files.interrupts import INTERRUPTED
from fedlora_cli.kernels import cost
from fedlora_cli.methods.weights import Holdings, coverage

ROOT = Path(__file__).parents[2]

_FOLDERS = (
    ".",
    ".github",
    "fedlora_cli",
    "fedlora_cli/*",
    "samples",
    "samples/*",
    "tests",
    "tests/*",
)

#: Every document of the repository.
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix() for folder in _FOLDERS for path in ROOT.glob(f"{folder}/*.md")
)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The contents of the fenced blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(document), re.M | re.S)


def documents_with(language: str) -> list[str]:
    return [document for document in DOCUMENTS if blocks(document, language)]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with bash in a terminal of 80 columns; standard error joins the output."""
    environment = os.environ | {
        "COLUMNS": "80",
        "NO_COLOR": "1",
        "LC_ALL": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ran(block: str, folder: Path) -> str:
    """The block with the present output of its commands."""
    lines = []
    for command in re.findall(r"^\$ (.*)$", block, re.M):
        lines += [f"$ {command}", *shell(command, folder).stdout.splitlines()]
    return "".join(line.rstrip() + "\n" for line in lines)


def prepared(folder: Path) -> Path:
    """A folder like a fresh clone, for commands to write in."""
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


def layers_table() -> str:
    """The layers of the import contract, with their comments."""
    contract = (ROOT / "pyproject.toml").read_text().split("\nlayers = [", 1)[1].split("\n]", 1)[0]
    table = "| packages | hold |\n|---|---|\n"
    for layer, comment in re.findall(r'^ *"([^"]+)", *(?:# (.*))?$', contract, re.M):
        packages = ", ".join(f"`{name}`" for name in layer.split(" | "))
        table += f"| {packages} | {comment.replace(' | ', '; ')} |\n"
    return table


GENERATED: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "collapse": collapse_table,
    "layers": layers_table,
    "benchmark": lambda: markdown(load(RESULTS)),
    **readme_options.TABLES,
    **readme_attacks.TABLES,
    **readme_simulations.TABLES,
}

_GENERATED = re.compile(r"(<!-- ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.S)


def regenerated(text: str) -> str:
    """The text with the present contents of its generated tables."""
    return _GENERATED.sub(lambda found: found[1] + GENERATED[found[2]]() + found[4], text)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it.

    >>> slug("How fast: `fedlora`, by numbers?")
    'how-fast-fedlora-by-numbers'
    """
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.M)}


def broken_links(document: str) -> list[str]:
    """The links of a document whose file or anchor does not exist, and images at URLs."""
    broken = []
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text_of(document)):
        if re.match(r"https?://", target):
            broken += [target] * bool(image)
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("document", documents_with("console"))
def test_every_console_block_prints_what_it_shows(document: str, tmp_path: Path) -> None:
    """The blocks of a document run one after the other in one folder."""
    folder = prepared(tmp_path)

    for block in blocks(document, "console"):
        assert ran(block, folder) == block


@pytest.mark.parametrize("document", documents_with("python"))
def test_every_python_block_runs(document: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    for block in blocks(document, "python"):
        (folder / "block.py").write_text(block)
        done = shell(f"{sys.executable} block.py", folder)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("document", documents_with("bash"))
def test_every_bash_block_runs(document: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    for block in blocks(document, "bash"):
        done = shell(f"set -euo pipefail\n{block}", folder)
        assert done.returncode == 0, done.stdout


def test_the_documents_have_blocks_of_each_kind() -> None:
    assert {"README.md", "fedlora_cli/cli/README.md"} <= set(documents_with("console"))
    assert "README.md" in documents_with("python")
    assert documents_with("bash") == ["README.md"]


def test_the_first_shell_blocks_of_the_readme_install_and_test() -> None:
    """`.ci/run` runs these two."""
    first, second = blocks("README.md", "sh")

    assert "pip install ." in first
    assert "-o global" in first
    assert "pytest" in second


@pytest.mark.parametrize("document", DOCUMENTS)
def test_generated_tables_are_up_to_date(document: str) -> None:
    assert regenerated(text_of(document)) == text_of(document)


def test_every_generated_table_is_in_one_document() -> None:
    names = [found[1] for document in DOCUMENTS for found in _GENERATED.findall(text_of(document))]

    assert sorted(names) == sorted(GENERATED)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document: str) -> None:
    assert broken_links(document) == []


def test_the_readme_names_every_document() -> None:
    listed = text_of("README.md").split("\n## Documents", 1)[1]

    assert len(DOCUMENTS) >= 9
    for document in DOCUMENTS:
        assert document == "README.md" or document in listed


def test_every_command_has_help_an_example_and_a_section() -> None:
    commands = readme_options.COMMANDS
    assert set(commands) == {
        *("init", "aggregate", "diagnose", "distribute", "predict", "compare", "simulate"),
        *("inspect", "methods"),
    }
    for name, command in commands.items():
        assert slug(f"fedlora {name}") in anchors(text_of("fedlora_cli/cli/README.md"))
        assert command.help
        assert f"fedlora {name}" in command.help
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_the_tables_of_options_have_all_options() -> None:
    for name, command in readme_options.COMMANDS.items():
        shown = readme_options.options_table(name) + readme_options.shared_table()
        flags = [flag for one in command.params for flag in (*one.opts, *one.secondary_opts)]
        for flag in flags:
            if flag.startswith("-"):
                assert re.search(rf"[`, ]{flag}[`, ]", shown), f"{name} {flag}"


def test_the_table_of_exit_codes_has_all_exit_codes() -> None:
    section = text_of("README.md").split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    shown = {
        int(n) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.M) for n in row.split(",")
    }
    raised = {error.exit_code for error in (FedloraError, *descendants(FedloraError))}

    assert shown == raised | {0, FINDING, INTERRUPTED, TERMINATED}


def descendants(kind: type[Any]) -> list[type[Any]]:
    return [one for child in kind.__subclasses__() for one in (child, *descendants(child))]


def test_the_table_of_routes_has_all_routes() -> None:
    estimates = cost.choose((4096, 4096), 600, 64, "float32").estimates
    shown = re.findall(r"^\| `(\w+)` \|", text_of("fedlora_cli/kernels/README.md"), re.M)

    assert sorted(shown) == sorted(estimate.route for estimate in estimates)


def test_the_verdicts_are_defined_by_the_numbers_that_decide() -> None:
    text = text_of("fedlora_cli/analysis/README.md")

    assert f"| collapsed | κ ≤ {verdict.COLLAPSED:g} |" in text
    assert f"reaches {verdict.COLLAPSED:g} within {verdict.HORIZON} rounds |" in text
    assert f"| at risk | κ ≤ {verdict.AT_RISK:g}, or" in text
    assert f"by less than {verdict.RATE_AT_RISK:g} a round |" in text


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def rewrite(document: str) -> None:
    """Bring the output of commands and the generated tables of a document up to date."""
    with tempfile.TemporaryDirectory() as place:
        folder = prepared(Path(place))
        now = {block: ran(block, folder) for block in blocks(document, "console")}
    # Read the text only now: the commands took a minute, in which it may have been edited.
    text = regenerated(text_of(document))
    for block, output in now.items():
        text = text.replace(f"```console\n{block}```", f"```console\n{output}```")
    (ROOT / document).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for document in sys.argv[1:] or DOCUMENTS:
        rewrite(document)
