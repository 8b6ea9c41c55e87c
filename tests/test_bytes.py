"""Every command on the samples: the bytes that it writes, and the keys and numbers that it reports.

`PYTHONPATH=tests python tests/test_bytes.py` writes `tests/digests.json` anew. Do that only when a
change of numbers is intended, and say so in the CHANGELOG.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("digests.json")

#: The same arithmetic on every processor: one thread, and no instructions beyond the common ones.
SAME = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "80",
    "NO_COLOR": "1",
}

ROUND, ROUNDS = "samples/round-01", "samples/rounds/raflora"
LAST, BEFORE = f"{ROUNDS}/round-08", f"{ROUNDS}/round-07"
METHODS = ("raflora", "flexlora", "fedavg", "hetlora", "rbla", "flora", "residual")
#: What `aggregate` is given beside the round, its output and `--json`.
AGGREGATE = {
    **{f"aggregate {method}": f"--method {method}" for method in METHODS},
    "aggregate rank": "--rank 4 --quorum 0.5",
    "aggregate energy": "--energy 0.9 --explain",
    "aggregate momentum": f"--previous {LAST} --before-previous {BEFORE} --momentum 0.5",
    "aggregate rounds": f"--rounds {ROUNDS} --quorum 0.5",
    "aggregate basis": "--basis svd --split left",
    "aggregate robust": "--robust geometric-median --clip-norm auto --max-weight 0.5",
    "aggregate krum": "--robust multi-krum --attackers 1 --missing zero",
    "aggregate bfloat16": "--dtype bfloat16 --verify",
    "aggregate skip": "--on-bad-client skip --min-clients 3",
    "aggregate vllm": "--target vllm --max-rank 64",
}
COMMANDS = {
    **{name: f"aggregate {ROUND} -o OUT {rest}" for name, rest in AGGREGATE.items()},
    "distribute": f"distribute {LAST} --like {ROUND} -o OUT",
    "distribute ranks": f"distribute {LAST} --rank 2,8 -o OUT --dtype float16",
    "init": "init samples/base --rank 4,8 -o OUT --seed 1 --target-modules all-linear",
    "init like": f"init samples/base --like {ROUND} -o OUT",
    "diagnose clients": f"diagnose {ROUND}",
    "diagnose rounds": f"diagnose samples/rounds/flexlora {ROUNDS}",
    "compare": f"compare {ROUND}",
    "predict": "predict --ranks 4,8,16 --samples 100,50,10",
    "inspect": f"inspect {ROUND} --values",
    "methods": "methods",
    "simulate": "simulate -m raflora,flexlora --cohort 2x2,2x4 --rounds 2 --seeds 1 -o OUT",
}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every place in a JSON document without the positions in lists, with its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path, value


def of_document(text: str) -> dict[str, str]:
    """The digests of a document: its keys, and its numbers to six digits. Prose may change."""
    found = list(leaves(json.loads(text)))
    # Times depend on the machine, and sizes of files on the paths in them.
    numbers = [
        f"{place} {value:.6g}"
        for place, value in found
        if isinstance(value, (int, float)) and not re.search("seconds|bytes", place)
    ]
    return {
        "keys": digest("\n".join(sorted({p for p, _ in found}))),
        "numbers": digest("\n".join(numbers)),
    }


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[
        :16
    ]


def ran(place: Path) -> dict[str, dict[str, str]]:
    """The digests of all that each command writes and prints, by command and file."""
    import torch
    from typer.testing import CliRunner

    from fedlora_cli.cli import app

    os.chdir(ROOT)
    torch.set_num_threads(1)
    results = {}
    for name, command in COMMANDS.items():
        out = place / name
        words = [str(out) if word == "OUT" else word for word in command.split()]
        done = CliRunner().invoke(app, [*words, "--json"])
        if done.exit_code:
            raise SystemExit(f"{command}: exit code {done.exit_code}\n{done.output}")
        found = {f"stdout {kind}": one for kind, one in of_document(done.stdout).items()}
        # A simulation's files hold the path of its base model, which is another in every run.
        for path in sorted(out.rglob("adapter*")) if name != "simulate" else ():
            content = path.read_bytes()
            if path.suffix == ".json":
                config = json.loads(content)
                config.pop("peft_version", None)
                content = json.dumps(config).encode()
            found[str(path.relative_to(out))] = digest(content)
        results[name] = found
    return {"versions": {"torch": torch.__version__.partition("+")[0]}, **results}


def in_fresh_process(place: Path) -> dict[str, dict[str, str]]:
    """The same from a process that computes alike everywhere."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, __file__, str(place)],
        env=os.environ | SAME | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    results: dict[str, dict[str, str]] = json.loads(done.stdout)
    return results


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return in_fresh_process(tmp_path_factory.mktemp("bytes"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_bytes_are_those_of_before(command: str, now: dict[str, dict[str, str]]) -> None:
    """Weights and numbers are compared where the same version of torch made them."""
    kept = json.loads(KEPT.read_text())
    same = kept["versions"] == now["versions"]

    def compared(found: dict[str, str]) -> dict[str, str]:
        exact = ("adapter_config.json", "stdout keys")
        return {name: one for name, one in found.items() if same or name.endswith(exact)}

    assert compared(now[command]) == compared(kept[command])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(ran(Path(sys.argv[1]))))  # noqa: T201
    else:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            KEPT.write_text(json.dumps(in_fresh_process(Path(folder)), indent=1) + "\n")
