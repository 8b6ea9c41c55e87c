"""Standard streams that are closed, full, or without a reader; interrupts at any moment; no home.

Every command ends with one line or none, and with the exit code that its work has.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.rounds.aggregate import aggregate

ROOT = Path(__file__).parents[2]
ROUND = ROOT / "samples/round-01"
FEDLORA = [sys.executable, "-m", "fedlora_cli"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a shell and its redirections")

#: What a shell does to the streams, and the exit code of a command that has a result.
STREAMS = {
    "<&-": 0,
    ">&-": 0,
    "2>&-": 0,
    "<&- >&- 2>&-": 0,
    "> /dev/full": 4,
    "2> /dev/full": 0,
    "> /dev/full 2> /dev/full": 4,
    "| true": 0,
    "2>&1 | true": 0,
}

#: Commands by name.
COMMANDS = {
    "aggregate": f"aggregate {ROUND} -o out",
    "aggregate --json": f"aggregate {ROUND} -o out --json",
    "aggregate --quiet": f"aggregate {ROUND} -o out --quiet",
    "distribute": f"distribute {ROUND}/clinic-b -o out --rank 1",
    "diagnose": f"diagnose {ROUND} --json",
    "predict": "predict --ranks 4,8 --html page.html",
    "inspect": f"inspect {ROUND}",
    "compare": f"compare {ROUND} --json --quiet",
    "init": f"init {ROOT}/samples/base -o out --ranks 2 --target-modules all-linear",
    "methods": "methods",
    "--help": "--help",
    "--version": "--version",
}


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command in bash; of a pipeline, the exit code of its first part."""
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def fedlora(arguments: str) -> str:
    return f"{sys.executable} -m fedlora_cli {arguments}"


def checked(done: subprocess.CompletedProcess[str], code: int, lines: int = 1) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr + done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) <= lines


#: Those that are tried without `-m long`.
QUICK = ("aggregate --json", "inspect", "methods", "--help", "--version")

#: The quickest command under all streams, every other one under the worst of them.
TABLE = [("predict", streams) for streams in STREAMS] + [
    pytest.param(command, streams, marks=() if command in QUICK else pytest.mark.long)
    for command in COMMANDS
    if command != "predict"
    for streams in ("> /dev/full", "<&- >&- 2>&-")
]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
@pytest.mark.parametrize(("command", "streams"), TABLE, ids=lambda value: str(value))
def test_a_command_ends_as_its_work_does(command: str, streams: str, tmp_path: Path) -> None:
    done = shell(f"{fedlora(COMMANDS[command])} {streams}", tmp_path)

    checked(done, 0 if command == "aggregate --quiet" else STREAMS[streams])
    if "-o out" in COMMANDS[command]:
        assert any((tmp_path / "out").iterdir())
    if done.returncode and "2>" not in streams:
        assert done.stderr.splitlines()[-1] == (
            "error: standard output: cannot be written (no space left on device); free some space"
        )


@pytest.mark.parametrize(
    "streams",
    [
        ">&-",
        *(
            pytest.param(one, marks=pytest.mark.long)
            for one in ("", "> /dev/full", "2>&-", "| true")
        ),
    ],
)
def test_a_finding_and_a_fault_keep_their_exit_codes(streams: str, tmp_path: Path) -> None:
    aggregate([ROUND], tmp_path / "global", AggregateOptions(method="flexlora"))
    for arguments, code in (
        ("diagnose global --fail-above 0", 1),
        ("predict --ranks 4,x", 2),
        ("inspect none", 3),
        ("aggregate global -o none/out", 3),
    ):
        checked(shell(f"{fedlora(arguments)} {streams}", tmp_path), code)


@pytest.mark.parametrize("arguments", ["inspect -", "aggregate - -o out", "diagnose -"])
@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("<&-", 2, "no folders in the list"),
        ("< /dev/null", 2, "no folders in the list"),
        ("0> list", 3, "standard input: cannot be read (bad file descriptor)"),
    ],
)
def test_a_list_that_does_not_come_is_said(
    arguments: str, streams: str, code: int, said: str, tmp_path: Path
) -> None:
    done = shell(f"{fedlora(arguments)} {streams}", tmp_path)

    checked(done, code)
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_no_file_is_opened_under_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """A library that writes to standard error would write into an adapter."""
    code = (
        "import os, sys\n"
        "from fedlora_cli.cli.streams import secure_streams\n"
        "secure_streams()\n"
        "assert os.open('file', os.O_CREAT | os.O_RDWR) > 2\n"
        "os.write(2, b'chatter')\n"
        "print('no place to go')\n"
    )
    done = shell(f'{sys.executable} -c "{code}" <&- >&- 2>&-', tmp_path)

    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    done = shell(fedlora("predict --ranks 4,8"), tmp_path, PYTHONIOENCODING="ascii")

    checked(done, 0)
    assert "ρ" not in done.stdout


@pytest.mark.parametrize("module", ["fedlora_cli.cli", "rich.console", "numpy", "torch"])
def test_an_interrupt_while_libraries_are_loaded_is_one_line(module: str, tmp_path: Path) -> None:
    """At a moment that is certain: when the import of a module begins."""
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == '{module}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"sys.argv = ['fedlora', 'aggregate', '{ROUND}', '-o', 'out']\n"
        "from fedlora_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 130
    assert done.stderr == "error: interrupted; nothing is half written\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_at_work_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "import fedlora_cli.rounds.output as output\n"
        "def interrupted(*_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "output.average_tensor = output.tensor_names = output.grouped = interrupted\n"
        f"sys.argv = ['fedlora', 'aggregate', '{ROUND}', '-o', 'out', '--quiet']\n"
        "from fedlora_cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 130
    assert done.stderr == "error: interrupted; nothing is half written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_interrupts_in_the_first_moments(tmp_path: Path) -> None:
    """After every few hundredths of a second; before the first line of ours runs, Python's own."""
    for number in range(4, 60, 2):
        process = subprocess.Popen(
            [*FEDLORA, "aggregate", str(ROUND), "-o", "out", "--quiet"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(number / 50)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode in (0, 130), said
        assert len(said.splitlines()) <= 1
        if (tmp_path / "out").exists():
            return


def test_a_job_that_ignores_interrupts_goes_on(tmp_path: Path) -> None:
    """A shell starts jobs in the background that way."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from fedlora_cli.files.interrupts import leaving_at_once, raising\n"
        "with leaving_at_once(), raising():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "home",
    ["/dev/null/none", *(pytest.param(one, marks=pytest.mark.long) for one in ("/proc", ""))],
)
@pytest.mark.parametrize(
    "arguments",
    ["predict --ranks 4,8 --plot plot.svg --html page.html", f"diagnose {ROUND} --plot plot.png"],
)
def test_without_a_home_there_is_no_chatter(arguments: str, home: str, tmp_path: Path) -> None:
    places = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"), home)
    done = shell(fedlora(arguments), tmp_path, **places, MPLCONFIGDIR="")

    checked(done, 0, lines=0)
    assert "atplotlib" not in done.stderr
    assert "font" not in done.stderr


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish", "none"])
def test_completion_that_cannot_be_installed_is_one_line(shell_name: str, tmp_path: Path) -> None:
    """Never the exit code of a finding."""
    done = shell(
        fedlora(f"--install-completion {shell_name}"),
        tmp_path,
        HOME="/dev/null/none",
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )

    checked(done, 2 if shell_name == "none" else 4)


def test_a_picture_without_any_place_for_fonts_is_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile\n"
        "def refused(*args, **kwargs):\n"
        "    raise OSError('no usable folder')\n"
        "tempfile.mkdtemp = refused\n"
        "sys.argv = ['fedlora', 'predict', '--ranks', '4,8', '--plot', 'plot.png']\n"
        "from fedlora_cli.__main__ import main\n"
        "main()\n"
    )
    (tmp_path / "script.py").write_text(code)
    places = {"HOME": "/dev/null/none", "XDG_CONFIG_HOME": "/dev/null", "MPLCONFIGDIR": ""}
    done = shell(f"{sys.executable} script.py", tmp_path, **places, XDG_CACHE_HOME="/dev/null")

    checked(done, 4)
    assert "matplotlib cannot be loaded (" in done.stderr
    assert not (tmp_path / "plot.png").exists()
