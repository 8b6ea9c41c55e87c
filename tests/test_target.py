"""`--target`: what a server could not load is refused before the work."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from makers import Spec, make
from typer.testing import CliRunner

from fedlora_cli import InputError, Options, UsageError, aggregate
from fedlora_cli.adapter import Facts, FullTensor, Kind, Layout, Role
from fedlora_cli.aggregation.options import Target
from fedlora_cli.cli import app
from fedlora_cli.formats.peft.serving import TARGETS, Output, obstacles

Q, LAYER = "model.layers.0.self_attn.q_proj", "model.layers.0"


@dataclass(frozen=True)
class Case:
    """An output, and by target a word of the obstacle that it meets; of others it meets none."""

    refused: dict[str, str]
    rank: int | None = 16
    layouts: tuple[Layout, ...] = (Layout("linear", Q),)
    tensors: dict[str, Role] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    format: str = "peft"


def layout(kind: Kind, name: str) -> tuple[Layout, ...]:
    return Layout("linear", Q), Layout(kind, name)


def served(what: str, *targets: str) -> dict[str, str]:
    return dict.fromkeys(targets, what)


EXPERTS = f"{LAYER}.mlp.experts"
SERVERS = ("vllm", "sglang", "llama.cpp")
CASES = {
    "plain": Case({}),
    "rank 300": Case({}, rank=300),
    "rank 512": Case({}, rank=512),
    "rank 513": Case({"vllm": "rank 513 (its largest --max-lora-rank is 512)"}, rank=513),
    "a rank to be decided": Case({}, rank=None),
    "embedding": Case({}, layouts=layout("embedding", "model.embed_tokens")),
    "base weights of an embedding": Case(
        {}, tensors={"model.embed_tokens.base_layer.weight": "base"}
    ),
    "base weights of lm_head": Case({}, tensors={"lm_head.base_layer.weight": "base"}),
    "resized vocabulary": Case(
        served("weights of the base model (lm_head.weight)", "vllm", "llama.cpp"),
        tensors={"lm_head.weight": "base"},
    ),
    "heads": Case(
        served("modules that are saved in full (score.weight)", *SERVERS),
        tensors={"score.weight": "saved"},
    ),
    "norms": Case(
        served("modules that are saved in full", "vllm", "sglang"),
        tensors={f"{LAYER}.input_layernorm.weight": "saved", "model.norm.weight": "saved"},
    ),
    "DoRA": Case(
        served("DoRA", *SERVERS),
        tensors={f"{Q}.lora_magnitude_vector": "magnitude"},
        facts=Facts(dora=True),
    ),
    "biases": Case(
        served("trained biases", *SERVERS),
        tensors={f"{Q}.base_layer.bias": "bias"},
        facts=Facts(bias="lora_only"),
    ),
    "biases on lora_B": Case(
        served("biases on lora_B", *SERVERS),
        tensors={f"{Q}.lora_B.bias": "lora_bias"},
        facts=Facts(lora_bias=True),
    ),
    "tokens": Case(
        served("trained tokens", *SERVERS),
        tensors={"model.embed_tokens.token_adapter.trainable_tokens_delta[3]": "token"},
    ),
    "convolution": Case(
        served("factors of convolutions", *SERVERS), layouts=layout("convolution", "patch.conv")
    ),
    "both pairs of experts": Case(
        served("factors of fused experts", "sglang", "llama.cpp"),
        layouts=(Layout("experts", EXPERTS), Layout("experts", f"{EXPERTS}.base_layer")),
    ),
    "one pair of experts": Case(
        {"vllm": "experts with only one of"}
        | served("factors of fused experts", "sglang", "llama.cpp"),
        layouts=layout("experts", EXPERTS),
    ),
    "activated LoRA": Case(
        served("activated LoRA", "vllm", "sglang"), facts=Facts(invocation_tokens=(1, 2))
    ),
    "replicated layers": Case(
        served("replicated layers", *SERVERS), facts=Facts(layer_replication=((0, 2), (1, 3)))
    ),
    "Conv1D": Case({"llama.cpp": "factors of GPT-2's Conv1D"}, facts=Facts(fan_in_fan_out=True)),
    "kohya": Case(served("adapters in the format kohya", *TARGETS), format="kohya"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_server_loads_what_its_sources_say(case: Case, target: str) -> None:
    tensors = {
        name: FullTensor((4,), "float32", role, None, lambda report=None: torch.zeros(4))
        for name, role in case.tensors.items()
    }
    found = obstacles(
        target, Output(case.format, case.rank, None, case.layouts, tensors, case.facts)
    )

    assert len(found) == (target in case.refused)
    for one in found:
        assert case.refused[target] in one.found
        assert one.cure


def test_the_targets_are_those_of_the_option() -> None:
    assert tuple(TARGETS) == get_args(Target)


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    """Two clients, one of which has more directions than any engine takes."""
    shapes = {Q: (600, 620)}
    make(tmp_path / "round", Spec("ann", rank=2, shapes=shapes))
    make(tmp_path / "round", Spec("bob", rank=590, shapes=shapes))
    return tmp_path / "round"


def with_head(root: Path) -> Path:
    made = {"tensors": {"score.weight": torch.ones(2, 4)}, "config": {"modules_to_save": ["score"]}}
    kept: dict[str, Any] = made
    for name, rank in (("ann", 2), ("bob", 590)):
        make(root / "heads", Spec(name, rank=rank, shapes={Q: (600, 620)}, **kept))
    return root / "heads"


def test_a_rank_is_the_fault_of_the_option_that_decides_it(clients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"^--target: vllm cannot load rank 590 .*; give --rank 512 or less"
    ):
        aggregate(clients, out, Options(target="vllm", dry_run=True))
    with pytest.raises(
        UsageError, match=r"^--rank: vllm cannot load rank 550 .*; give --rank 512 or less"
    ):
        aggregate(clients, out, Options(target="vllm", rank=550))
    with pytest.raises(UsageError, match=r"^--energy: vllm cannot load rank 5\d\d "):
        aggregate(clients, out, Options(target="vllm", method="flexlora", energy=1.0))
    assert [path.name for path in tmp_path.iterdir()] == ["round"]
    with pytest.raises(UsageError, match="--target: tgi is not known; choose one of peft, vllm"):
        aggregate(clients, out, Options(target="tgi"))  # type: ignore[arg-type]


def test_all_that_stands_in_the_way_is_one_line(tmp_path: Path) -> None:
    folder, out = with_head(tmp_path), tmp_path / "out"

    message = (
        "--target: vllm cannot load rank 590 (its largest --max-lora-rank is 512), "
        "modules that are saved in full (score.weight); "
        "give --rank 512 or less, train without modules_to_save"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        aggregate(folder, out, Options(target="vllm", rank=590))
    assert not out.exists()


def test_the_command_refuses_and_otherwise_changes_no_byte(clients: Path, tmp_path: Path) -> None:
    def run(out: str, *options: str) -> Any:
        command = ["aggregate", str(clients / "ann"), "-o", str(tmp_path / out), *options]
        return CliRunner().invoke(app, command, prog_name="fedlora")

    assert run("bad", "--target", "ollama").exit_code == 2
    wide = CliRunner().invoke(
        app, ["aggregate", str(clients), "-o", str(tmp_path / "bad"), "--target", "vllm"]
    )
    assert (wide.exit_code, wide.stdout) == (3, "")
    assert not (tmp_path / "bad").exists()

    plain, targeted = run("plain"), run("targeted", "--target", "vllm")
    assert (plain.exit_code, targeted.exit_code) == (0, 0)
    assert "--target vllm" in targeted.stderr
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "fedlora.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "targeted" / name
        ).read_bytes()
