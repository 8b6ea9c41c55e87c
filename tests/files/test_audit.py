"""What an aggregation touches: its input, its output, and the Python installation. Nothing else.

No pickle is loaded, no program started, no network asked, whatever the configs name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.adapters import Spec, make
from support.damage import CONFIG, set_config

import fedlora_cli
from fedlora_cli.formats.peft.names import PICKLE

PACKAGE = Path(fedlora_cli.__file__).parent

#: Runs the command with every event of the interpreter looked at, and says what it did that it
#: should not, one line each. What an aggregation may do, it does on threads, to which hooks hold.
WATCHED = """
import json, os, sys, sysconfig
readable, writable, trap, *commands = json.loads(sys.argv[1])
name = os.path.basename(trap)
sys.path.append(trap)
installed = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
system = [os.path.realpath(one) for one in installed] + ["/proc", "/sys", "/dev/null"]

seen = set()

def inside(path, places):
    real = os.path.realpath(path)
    return any(real == place or real.startswith(place + os.sep) for place in places)

def opened(path, mode, flags):
    if isinstance(path, int) or path is None:
        return
    path = os.fsdecode(path)
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if writes and "__pycache__" not in path and not inside(path, [*writable, "/dev/null"]):
        seen.add(f"writes {path}")
    if not writes and (inside(path, [trap]) or not inside(path, [*readable, *writable, *system])):
        seen.add(f"reads {path}")

FORBIDDEN = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.bind",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
    "urllib.Request", "http.client.connect", "shutil.unpack_archive")

def watch(event, args):
    if event == "open":
        opened(*args)
    elif event in FORBIDDEN:
        seen.add(f"{event} {str(args)[:200]}")
    elif event == "import" and args[0].partition(".")[0] == name:
        seen.add(f"imports {args[0]}")

sys.addaudithook(watch)
from fedlora_cli.cli import main
codes = []
for command in commands:
    sys.argv = ["fedlora", *command]
    try:
        main()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)
print("\\n" + json.dumps({"codes": codes, "seen": sorted(seen)}))
"""


def watched(
    home: Path,
    readable: list[str],
    writable: list[str],
    trap: Path,
    commands: list[list[str]],
    before: str = "",
) -> Any:
    """What the commands did in a process of their own, after the code `before`."""
    for name in ("made", "temporary"):
        (home / name).mkdir()
    job = json.dumps([readable, [str(home / one) for one in writable], str(trap), *commands])
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.replace("codes = []", f"codes = []\n{before}"), job],
        capture_output=True,
        text=True,
        check=False,
        cwd=home / "made",
        env=os.environ | {"TMPDIR": str(home / "temporary")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


#: The name of a module that must never be imported.
TRAP = "a_module_of_the_enemy"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A module that tells when it is run, and a pickle that would run it."""
    place = tmp_path / TRAP
    place.mkdir()
    (place / f"{TRAP}.py").write_text(f"open({str(place / 'sprung')!r}, 'w')\n")
    (place / "x.pt").write_bytes(f"c{TRAP}\nf\n(tR.".encode())
    return place


def test_an_aggregation_touches_nothing_but_its_input_and_output(
    tmp_path: Path, trap: Path
) -> None:
    files = {"cache_file": str(trap / "x.pt"), "covariance_file": str(trap / "x.pt")}
    ignored = {
        "auto_map": {"AutoModel": f"{trap}--{TRAP}.f"},
        "auto_mapping": {"parent_library": TRAP, "base_model_class": "f"},
        "base_model_name_or_path": str(trap),
        "eva_config": files,
        "loftq_config": files,
        "megatron_core": TRAP,
        "runtime_config": files,
        **files,
    }
    # With plain factors, the first two say how the adapter was initialized, and nothing reads them.
    refused = {
        "corda_config": {"corda_config": files, "init_lora_weights": "corda"},
        "lora_ga_config": {"lora_ga_config": files, "init_lora_weights": "lora_ga"},
        "megatron_config": {"megatron_config": {"x": TRAP}},
    }
    ignored |= {"corda_config": files, "lora_ga_config": files}
    for rank in (1, 2, 3):
        made = make(tmp_path / "ignored", Spec(f"sly-{rank}", rank=rank))
        set_config(made.folder, **ignored)
        (made.folder / PICKLE).write_bytes((trap / "x.pt").read_bytes())
        (made.folder / f"{TRAP}.py").write_bytes((trap / f"{TRAP}.py").read_bytes())
    for field, values in refused.items():
        set_config(make(tmp_path / field, Spec("bad", rank=2)).folder, **values)
    (tmp_path / "pickles/bad").mkdir(parents=True)
    (tmp_path / "pickles/bad" / PICKLE).write_bytes((trap / "x.pt").read_bytes())
    make(tmp_path / "plain", Spec("ann", rank=2))

    rounds = ["plain", "ignored", *refused, "pickles"]
    places = [str(tmp_path / one) for one in rounds]
    outputs = [str(tmp_path / "made" / one) for one in rounds]
    commands = [
        ["aggregate", place, "-o", output, "--verify", "--quiet"]
        for place, output in zip(places, outputs, strict=True)
    ]
    said = watched(tmp_path, [*places, str(PACKAGE)], ["made", "temporary"], trap, commands)

    assert said["codes"] == [0, 0, 3, 3, 3, 3]
    assert said["seen"] == []
    assert not (trap / "sprung").exists()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["ignored", "plain"]
    written = json.loads((tmp_path / "made/ignored" / CONFIG).read_text())
    assert written["base_model_name_or_path"] == str(trap)
    assert not {*ignored, *refused} - {"base_model_name_or_path"} & set(written)


def test_the_watch_would_notice(tmp_path: Path, trap: Path) -> None:
    """What is named here as input is all that may be read: nothing."""
    make(tmp_path / "round", Spec("ann", rank=2))
    command = ["aggregate", str(tmp_path / "round"), "-o", str(tmp_path / "made/out"), "-q"]
    said = watched(tmp_path, [str(PACKAGE)], [], trap, [command], f"import {TRAP}\n{NOTICED}")

    for one in ("reads", "writes", "imports", "socket.connect", "pickle.find_class"):
        assert any(line.startswith(one) for line in said["seen"]), (one, said)


#: What a program does that is not watched in vain.
NOTICED = """
import pickle, socket
with socket.socket() as one:
    one.settimeout(0.1)
    one.connect_ex(("127.0.0.1", 9))
pickle.loads(pickle.dumps(print))
"""
