"""The sample app: Flower's template for LLMs with six other lines."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from support.flower import Calls

from fedlora_cli.integrations import flower

tomllib = pytest.importorskip("tomllib")

SAMPLE = Path(__file__).parents[2] / "samples/flower"
README = (SAMPLE / "README.md").read_text(encoding="utf-8")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The names of a config with dots, as Flower makes them."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        result |= {f"{prefix}{name}": value} if inner is None else inner
    return result


class Partitions(Calls):
    """Nodes that know their partitions, as in Flower's simulations."""

    def node_config(self, node: int) -> dict[str, Any]:
        return {"partition-id": node - 101, "num-partitions": len(self.names)}


def run_app(app: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
    """Run the app with four nodes, in the current folder."""
    project = tomllib.loads((SAMPLE / "pyproject.toml").read_text())
    settings = flat(project["tool"]["flwr"]["app"]["config"]) | config
    for name in [name for name in sys.modules if name.startswith("flowertune_tiny")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(app)
    from flowertune_tiny import client_app, server_app

    grid = Partitions(client_app.app, "abcd", run_config=settings)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=settings)
    server_app.app(grid, context)
    for name in [name for name in sys.modules if name.startswith("flowertune_tiny")]:
        monkeypatch.delitem(sys.modules, name)


def losses(lines: list[str]) -> list[float]:
    found = (re.search(r"'held_out_loss': ([\d.e-]+)", line) for line in lines)
    return [float(match[1]) for match in found if match]


def ranks_in(folder: Path) -> set[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {value.shape[0] for name, value in tensors.items() if "lora_A" in name}


def test_the_sample_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_app(SAMPLE, monkeypatch)

    first, *_, last = losses(lines)
    assert last < 0.75 * first
    assert lines.count("FedLoRA: round 3: rank 16 from 4 clients") == 1
    assert ranks_in(tmp_path / "results/peft_3") == {16}


def hunks() -> list[tuple[str, str, str]]:
    """File, old and new lines of every change in the README."""
    [diff] = re.findall(r"```diff\n(.*?)```", README, re.S)
    result = []
    for file, body in re.findall(r"^--- (\S+)\n((?:[+-](?!-).*\n)+)", diff, re.M):
        for old, new in re.findall(r"((?:^-.*\n)*)((?:^\+.*\n)+)", body, re.M):
            result.append(
                (file, re.sub("^-", "", old, flags=re.M), re.sub(r"^\+", "", new, flags=re.M))
            )
    return result


def test_six_lines_make_the_template_train_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Without them, the app knows nothing of fedlora and is Flower's FedAvg."""
    app = tmp_path / "app"
    shutil.copytree(SAMPLE, app, ignore=shutil.ignore_patterns("__pycache__", "results"))
    changes = hunks()
    for file, old, new in changes:
        place = app / "flowertune_tiny" / file
        text = place.read_text()
        assert text.count(new) == 1, new
        place.write_text(text.replace(new, old))

    assert sum(new.count("\n") for _, _, new in changes) == 6
    code = [path.read_text() for path in (app / "flowertune_tiny").glob("*.py")]
    assert not any("fedlora" in text for text in code)
    monkeypatch.chdir(tmp_path)
    run_app(app, monkeypatch, **{"num-server-rounds": 1})
    assert losses(lines)[-1] < losses(lines)[0]
    assert any(line.startswith("Starting FlowerTuneLlm strategy") for line in lines)


@pytest.mark.parametrize("block", re.findall(r"^( *)```py\n(.*?)```", README, re.M | re.S))
def test_the_code_of_the_readme_has_names_that_exist(block: tuple[str, str]) -> None:
    indent, text = block
    code = "\n".join(line.removeprefix(indent) for line in text.splitlines())
    compile(code.replace("return ", "reply = ") if "def " not in code else code, "README", "exec")
    imported = re.findall(r"^from fedlora_cli.integrations.flower import (.*)$", code, re.M)
    for name in (name for names in imported for name in names.split(", ")):
        assert isinstance(getattr(flower, name), (type, Callable))  # type: ignore[arg-type]


def test_the_readme_names_every_argument() -> None:
    import inspect

    given = set(inspect.signature(flower.FedLoRA.__init__).parameters) - {"self", "fedavg"}
    table = README.partition("## Options")[2].partition("## Resume")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == given
