"""`diagnose` and `compare` as a person and a pipeline meet them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from support.adapters import Spec, make
from support.cli import run

from fedlora_cli import AggregateOptions, aggregate

SAMPLES = Path(__file__).parents[2] / "samples"
ROUND = SAMPLES / "round-01"
COLLAPSED = SAMPLES / "rounds/flexlora"
HEALTHY = SAMPLES / "rounds/raflora"


EVERY_VIEW = [
    ("diagnose", ROUND),
    ("diagnose", ROUND, "-v"),
    ("diagnose", COLLAPSED),
    ("diagnose", COLLAPSED, "-v"),
    ("diagnose", HEALTHY / "round-02", "-v"),
    ("diagnose", ROUND / "clinic-b"),
    ("compare", ROUND),
    ("compare", ROUND, "--quorum", 0.123),
    ("compare", ROUND, "--rank", 3),
    ("inspect", ROUND),
    ("inspect", ROUND, "-v"),
    ("predict", ROUND),
    ("predict", ROUND, "-v", "-p", 0.3),
]


@pytest.mark.parametrize("command", EVERY_VIEW, ids=lambda c: " ".join(map(str, c))[-40:])
def test_every_table_fits_80_columns_and_holds_no_escape_code(command: tuple[object, ...]) -> None:
    result = run(*command)

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "…\n" not in result.stdout.replace(" ", "")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Long names, many clients, huge and tiny numbers."""
    deep = "model.layers.31.a_block_with_a_long_name.self_attention.projection.q_proj"
    for k in range(25):
        name = f"hospital-of-a-city-with-a-long-name-{k:03}"
        samples = 10 ** (k % 12)
        make(tmp_path / "round", Spec(name, rank=1 + k % 7, samples=samples, shapes={deep: (9, 8)}))
    for t in range(1, 31):
        place = tmp_path / f"a-rather-long-name-of-a-round-{t}"
        aggregate([tmp_path / "round"], place, AggregateOptions(max_count_ratio=1e12))
    return tmp_path


def test_long_names_and_many_rows_fit_too(wide: Path) -> None:
    globals_ = sorted(wide.glob("a-rather*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for command in (
        ("diagnose", wide / "round"),
        ("diagnose", wide / "round", "-v"),
        ("diagnose", *globals_),
        ("diagnose", globals_[0], "-v"),
        ("compare", wide / "round"),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "15 of 30 rounds" in run("diagnose", *globals_).stdout
    assert "25 clients" in result.stdout


def test_verdicts_end_pipelines() -> None:
    bad = run("diagnose", COLLAPSED, "--fail-on", "collapsing", "--quiet")
    fine = run("diagnose", HEALTHY, "--fail-on", "at-risk", "--fail-above", 0.9, "--quiet")
    above = run("diagnose", COLLAPSED, "--fail-above", 0.99, "--json", "--quiet")

    assert (bad.exit_code, bad.stdout) == (1, "")
    assert bad.stderr.startswith("finding: collapsed: ")
    assert (fine.exit_code, fine.output) == (0, "")
    assert above.exit_code == 1
    assert above.stdout.startswith("{")
    assert "finding: ρ = 0.995" in above.stderr
    assert run("diagnose", ROUND, "--fail-above", 0.85, "-q").exit_code == 1
    assert run("diagnose", ROUND, "--fail-above", 0.9, "-q").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROUND, "--fail-on", "collapsed"), "there is no verdict"),
        ((ROUND / "clinic-a", "--fail-above", 0.5), "ρ is not known; give --shared-rank"),
        ((COLLAPSED, "--fail-on", "healthy"), "no verdict healthy; use at risk, collapsing"),
        ((COLLAPSED, "--fail-above", 2), "2.0 is out of range"),
        ((COLLAPSED, "--shared-rank", 0), "--shared-rank: 0 is out of range; it must be 1 or more"),
        (
            (COLLAPSED, "--jobs", -1),
            "--jobs: -1 is out of range; it must be 0 or more; 0 is all cores",
        ),
        ((COLLAPSED, "--plot", "x.gif"), "--plot: x.gif has no known ending; use one of .png"),
        ((ROUND, COLLAPSED), "8 of 16 adapters, such as "),
    ],
)
def test_what_cannot_be_judged_never_passes(arguments: tuple[object, ...], message: str) -> None:
    result = run("diagnose", *arguments)

    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_bad_input_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    broken = make(tmp_path, Spec("a", 2)).folder
    with (broken / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(100)

    for command in ("diagnose", "compare"):
        result = run(command, broken, "--plot", tmp_path / "x.png", "--html", tmp_path / "x.html")
        assert result.exit_code == 3
        assert len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize(
    "command", [("diagnose", COLLAPSED), ("compare", ROUND), ("predict", ROUND)], ids=str
)
def test_pictures_are_written_whole(command: tuple[object, ...], tmp_path: Path) -> None:
    for name in ("a.png", "a.svg", "a.pdf", "a.html"):
        flag = "--html" if name == "a.html" else "--plot"
        target = tmp_path / name
        target.write_text("an older one")
        result = run(*command, flag, target)
        assert result.exit_code == 0
        assert f"wrote: {target}" in result.stderr
    start = {path.suffix: path.read_bytes()[:15] for path in tmp_path.iterdir()}
    assert start[".png"].startswith(b"\x89PNG")
    assert start[".svg"].startswith(b"<?xml")
    assert start[".pdf"].startswith(b"%PDF")
    assert start[".html"] == b"<!DOCTYPE html>"
    if command[0] == "diagnose":
        page = (tmp_path / "a.html").read_text()
        assert f"{COLLAPSED}/round-01 to {COLLAPSED}/round-08" in page
        assert page.index("verdict: collapsed") < page.index("<svg") < page.index("<table")


def test_a_picture_that_cannot_be_written_stops_the_command_at_once(tmp_path: Path) -> None:
    nowhere = run("diagnose", ROUND, "--plot", tmp_path / "no/folder.png")
    (tmp_path / "taken.html").mkdir()
    taken = run("diagnose", ROUND, "--html", tmp_path / "taken.html")

    for result in (nowhere, taken):
        assert result.exit_code == 4
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1


def test_lists_come_from_standard_input(tmp_path: Path) -> None:
    paths = "\n".join(str(COLLAPSED / f"round-0{t}") for t in (1, 2, 3))

    result = run("diagnose", "-", stdin=paths)

    assert "rounds: 3 of flexlora, rank 16" in result.stdout


def test_on_a_terminal_there_is_colour_and_off_it_none() -> None:
    """A real terminal, a pipe, and a terminal that asks for no colour."""
    command = [sys.executable, "-m", "fedlora_cli", "diagnose", str(COLLAPSED)]

    def on_terminal(**environment: str) -> str:
        parent, child = pty.openpty()
        plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")}
        with subprocess.Popen(
            command, stdout=child, stderr=child, env=plain | {"TERM": "xterm"} | environment
        ):
            os.close(child)
            output = b""
            while True:
                try:
                    output += (block := os.read(parent, 4096))
                except OSError:
                    break
                if not block:
                    break
        os.close(parent)
        return output.decode()

    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    coloured, plain = on_terminal(), on_terminal(NO_COLOR="1")

    assert "\x1b[" not in piped.stdout + piped.stderr
    assert "\x1b[1;31mverdict: collapsed" in coloured
    assert "[36m" not in plain
    assert "[31m" not in plain
    assert "[1;31m" not in plain


@pytest.mark.parametrize("command", ["diagnose", "compare", "predict", "inspect"])
def test_help_is_quick_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom fedlora_cli.cli import app\n"
        f"try: app(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'peft', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert f"fedlora {command}" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
@pytest.mark.parametrize("command", [("predict", "--ranks", "4,8"), ("diagnose", str(ROUND))])
def test_a_full_disk_is_an_error_of_output(command: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fedlora_cli", *command, "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "standard output: cannot be written" in done.stderr
