"""Whole runs of Flower's programs with the sample app, on this machine only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("flwr", minversion="1.42")  # its programs had other options before

pytestmark = pytest.mark.long

SAMPLE = Path(__file__).parents[2] / "samples/flower"
PROGRAMS = Path(sys.executable).parent

#: Steps of a fifth of a second until a server must answer.
PATIENCE = 600


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@dataclass
class Flower:
    """Programs of Flower with a home of their own; all end with the test."""

    home: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = field(default_factory=free_port)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{len(self.running)}-{name}.log").open("wb") as log:
            program = subprocess.Popen(
                [PROGRAMS / name, "--insecure", *arguments],
                cwd=self.home,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.running.append(program)
        return program

    def superlink(self, *arguments: str) -> None:
        self.start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--database", str(self.home / "state.db")),
            "--disable-runtime-dependency-installation",
            *arguments,
        )
        address = f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\n{address}'
        )
        for _ in range(PATIENCE):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.2)
        pytest.fail("the SuperLink does not answer")

    def run(self, app: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [PROGRAMS / "flwr", "run", app, "here", "--stream", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def statuses(self) -> list[str]:
        """The statuses of all runs: `flwr run` itself succeeds in any case."""
        done = subprocess.run(
            [PROGRAMS / "flwr", "list", "here", "--format", "json"],
            cwd=self.home, env=self.environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [run["status"] for run in json.loads(done.stdout)["runs"]]

    def kill(self, program: subprocess.Popen[bytes]) -> None:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[Flower]:
    home = tmp_path / "home"
    home.mkdir()
    made = Flower(home)
    yield made
    for program in made.running:
        program.terminate()
    for program in made.running:
        with suppress(subprocess.TimeoutExpired):
            program.wait(20)
        made.kill(program)


def app_with(tmp_path: Path, old: str, new: str, file: str) -> Path:
    """A copy of the sample with a changed line."""
    app = tmp_path / "app"
    shutil.copytree(SAMPLE, app, ignore=shutil.ignore_patterns("__pycache__", "results"))
    place = app / "flowertune_tiny" / file
    text = place.read_text()
    assert text.count(old) == 1
    place.write_text(text.replace(old, new))
    return app


def losses(log: str) -> list[float]:
    """The losses of the initial and of all global adapters on held-out texts."""
    return [float(number) for number in re.findall(r"'held_out_loss': ([\d.]+)", log)]


def test_four_simulated_nodes_of_which_one_fails(flower: Flower, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    line = '    num_partitions = context.node_config["num-partitions"]\n'
    failing = f'{line}    if partition_id == 3:\n        raise RuntimeError("no data here")\n'
    app = app_with(tmp_path, line, failing, "client_app.py")
    flower.superlink("--simulation")
    results = tmp_path / "results"
    process = flower.run(
        app,
        *("--federation-config", "num-supernodes=4 client-resources-num-cpus=1"),
        *("--run-config", f"num-server-rounds=2 results='{results}'"),
    )
    log, _ = process.communicate()
    print(log)  # noqa: T201 - seen if the test fails

    assert process.returncode == 0
    assert flower.statuses() == ["finished:completed"]
    assert log.count("aggregate_train: 3 replies and 1 failures") == 2
    assert log.count("no data here") >= 2
    assert log.count("rank 16 from 3 clients") == 2
    tensors = load_file(results / "peft_2/adapter_model.safetensors")
    assert {value.shape[0] for name, value in tensors.items() if "lora_A" in name} == {16}
    assert sorted(losses(log), reverse=True) == losses(log)
    assert len(losses(log)) == 3


def test_a_killed_supernode_does_not_end_the_run(flower: Flower, tmp_path: Path) -> None:
    line = '        lora_config=init_model.peft_config["default"],\n'
    rounds = tmp_path / "rounds"
    app = app_with(tmp_path, line, f"{line}        rounds={str(rounds)!r},\n", "server_app.py")
    flower.superlink()
    nodes = [
        flower.start(
            "flower-supernode",
            *("--superlink", f"127.0.0.1:{flower.port}"),
            *("--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions=4 rank={rank}"),
        )
        for number, rank in enumerate((4, 8, 16))
    ]
    results = tmp_path / "results"
    process = flower.run(app, "--run-config", f"num-server-rounds=3 results='{results}'")
    log = ""
    with process:
        for text in process.stdout or ():
            log += text
            if "[ROUND 2/3]" in text:
                flower.kill(nodes[2])
    print(log)  # noqa: T201 - seen if the test fails

    assert flower.statuses() == ["finished:completed"]
    replies = [text for text in log.splitlines() if "aggregate_train: " in text]
    assert "3 replies and 0 failures" in replies[0]
    assert "2 replies and 1 failures" in "".join(replies[1:])
    assert sorted(path.name for path in rounds.iterdir()) == ["round-01", "round-02", "round-03"]
    for folder in rounds.iterdir():
        report = json.loads((folder / "global/fedlora.json").read_text())
        assert report["rank"] == 16, "the rank of the killed node stays"
    assert sorted(losses(log), reverse=True) == losses(log)
    assert len(losses(log)) == 4
