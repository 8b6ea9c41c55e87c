"""The folder of rounds of a federation in Flower: resuming, momentum, the roster, uploads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from support.flower import RANKS, Calls, Clients, classifier, of_ranks, run, strategy

from fedlora_cli.errors import InputError
from fedlora_cli.integrations.federation import DEFAULTS
from fedlora_cli.integrations.flower import to_tensors


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def with_heads() -> Clients:
    return Clients({name: lambda rank=rank: classifier(rank) for name, rank in RANKS.items()})


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "raflora": (of_ranks, {"method": "raflora"}, None),
    "residual with momentum": (
        of_ranks,
        {"method": "residual", "options": replace(DEFAULTS, momentum=0.5)},
        None,
    ),
    "flora": (of_ranks, {"method": "flora", "keep_clients": True}, None),
    "heads in bfloat16": (with_heads, {"method": "flexlora"}, lambda: classifier(8)),
}


@pytest.mark.parametrize("case", CASES)
def test_two_and_two_rounds_are_four_rounds(case: str, tmp_path: Path) -> None:
    clients, options, initial = CASES[case]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    made = run(clients(), 4, initial and initial(), rounds=whole, **options)
    run(clients(), 2, initial and initial(), rounds=parts, **options)
    again = run(clients(), 2, initial and initial(), rounds=str(parts), **options)

    assert (made.round, again.round) == (4, 4)
    assert len(list(whole.iterdir())) == 4
    assert files(parts) == files(whole)
    kept = {name for name in files(whole) if "/clients/" in name}
    assert bool(kept) == options.get("keep_clients", False)


def test_memory_and_folder_make_the_same_adapter(tmp_path: Path) -> None:
    in_folder = run(of_ranks(), 2, rounds=tmp_path / "rounds")
    in_memory = run(of_ranks(), 2)

    for name, tensor in in_memory.federation.current.tensors.items():
        assert torch.equal(tensor, in_folder.federation.current.tensors[name])


def test_a_resumed_run_knows_the_ranks_and_the_numbers_of_its_rounds(tmp_path: Path) -> None:
    run(of_ranks(), 2, rounds=tmp_path / "rounds")
    grid = Calls(of_ranks().app(), RANKS)
    made, arrays = strategy(rounds=tmp_path / "rounds", ask_nodes=True)
    last = made.federation.current

    assert made.round == 2
    assert {name: member.rank for name, member in made.federation.roster.items()} == RANKS
    seen = []
    made.start(grid, arrays, num_rounds=1, evaluate_fn=lambda _, arrays: seen.append(arrays))
    assert all(torch.equal(value, last.tensors[k]) for k, value in to_tensors(seen[0]).items())
    [message] = grid.of_type("train", "ann")
    assert message.content["config"]["server-round"] == 3
    assert message.content["lora"]["rank"] == 4


def test_an_unfinished_round_is_done_again(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(of_ranks(), 2, rounds=whole)
    run(of_ranks(), 1, rounds=parts)
    (parts / "round-02/clients/ann").mkdir(parents=True)
    (parts / "round-02/clients/ann/adapter_config.json").write_text("{")
    run(of_ranks(), 1, rounds=parts)

    assert files(parts) == files(whole)


def test_a_changed_round_is_refused(tmp_path: Path) -> None:
    run(of_ranks(), 1, rounds=tmp_path / "rounds")
    weights = tmp_path / "rounds/round-01/global/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    with pytest.raises(InputError, match="changed since fedlora wrote it"):
        strategy(rounds=tmp_path / "rounds")
