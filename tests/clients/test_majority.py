"""No single client decides the dtype of what all get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import PREFIX, WEIGHTS, Spec, make

from fedlora_cli import AggregateOptions, AggregateReport, aggregate, read_clients
from fedlora_cli.adapters.dtypes import majority_dtype
from fedlora_cli.aggregation.plan import make_plan
from fedlora_cli.aggregation.routes import route_of
from fedlora_cli.kernels.cost import choose

HEAD = "score.weight"
KINDS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

#: Dtypes and samples of the clients, and what the global adapter is in.
COHORTS = {
    "one float64": ([("fp32", 1), ("fp32", 1), ("fp64", 1)], "float32"),
    "one float64 of 16 bits": ([("bf16", 9), ("bf16", 9), ("fp64", 9)], "bfloat16"),
    "one float32": ([("fp16", 1), ("fp16", 1), ("fp32", 1)], "float16"),
    "one of few samples": ([("bf16", 30), ("fp32", 29)], "bfloat16"),
    "one of most samples": ([("bf16", 10), ("bf16", 10), ("fp32", 21)], "float32"),
    "a tie takes what holds both": ([("bf16", 5), ("fp32", 5)], "float32"),
    "a tie of 16 bits": ([("bf16", 5), ("fp16", 5)], "float32"),
    "no dtype of most": ([("bf16", 2), ("fp16", 2), ("fp64", 1)], "float32"),
    "most in float64": ([("fp64", 3), ("fp32", 2)], "float64"),
}


def cohort(root: Path, clients: list[tuple[str, float]], **more: Any) -> list[str]:
    names = []
    for k, (kind, samples) in enumerate(clients):
        names.append(f"{k}-{kind}")
        head = {HEAD: torch.randn(3, 4).to(KINDS[kind])}
        spec = Spec(names[-1], 3, samples=samples, dtype=KINDS[kind], seed=k, tensors=head, **more)
        make(root, replace(spec, config={"modules_to_save": ["score"]}))
    return names


def written(folder: Path) -> set[str]:
    return {str(one.dtype).removeprefix("torch.") for one in load_file(folder / WEIGHTS).values()}


def outcome(root: Path, **options: Any) -> AggregateReport:
    return aggregate(
        [root / "round"], root / "out", AggregateOptions(jobs=1, verify=True, **options)
    )


@pytest.mark.parametrize("name", COHORTS)
def test_factors_and_heads_take_the_dtype_of_most_samples(name: str, tmp_path: Path) -> None:
    clients, dtype = COHORTS[name]
    names = cohort(tmp_path / "round", clients)

    report = outcome(tmp_path)

    assert report.dtype == dtype
    assert written(tmp_path / "out") == {dtype}
    told = [one for one in report.warnings if "the dtype of most samples" in one]
    for client, (kind, _) in zip(names, clients, strict=True):
        own = str(KINDS[kind]).removeprefix("torch.")
        said = [one for one in told if f" sent {own};" in one and client in one]
        assert len(said) == (own != dtype)
        assert all(f"the global adapter is {dtype}" in one for one in said)
        heads = [one for one in told if f"sent full tensors in {own}" in one and client in one]
        assert len(heads) == (own != dtype)


def test_dtype_overrules_the_clients_without_a_warning(tmp_path: Path) -> None:
    cohort(tmp_path / "round", [("fp32", 1), ("fp32", 1), ("fp64", 1)])

    report = outcome(tmp_path, dtype="float64")

    assert report.dtype == "float64"
    assert not any("; the global adapter is" in one for one in report.warnings)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert tensors[PREFIX + HEAD].dtype == torch.float32


def test_one_dtype_is_no_warning(tmp_path: Path) -> None:
    cohort(tmp_path / "round", [("bf16", 1), ("bf16", 2)])

    assert not any("the dtype of most samples" in one for one in outcome(tmp_path).warnings)


def test_a_module_of_a_client_in_another_dtype_changes_nothing(tmp_path: Path) -> None:
    """Nor does the number of modules: clients vote, not tensors."""
    cohort(tmp_path / "round", [("fp32", 1), ("fp32", 1)])
    many = {f"layers.{k}.k_proj": (4, 5) for k in range(9)}
    shapes = {**Spec("x", 1).shapes, **many}
    make(tmp_path / "round", Spec("wide", 3, dtype=torch.float64, shapes=shapes))

    assert outcome(tmp_path).dtype == "float32"


def test_a_single_float64_client_does_not_change_the_route(tmp_path: Path) -> None:
    shapes = {"m": (700, 640)}
    make(tmp_path / "round", Spec("wide", 60, dtype=torch.float64, shapes=shapes))
    for k in range(4):
        make(tmp_path / "round", Spec(f"c{k}", 60, seed=k, shapes=shapes))

    plan = make_plan(read_clients([tmp_path / "round"]).cohort, AggregateOptions())

    assert route_of(plan, "m").route == choose((700, 640), 300, 60, "float32").route
    assert choose((700, 640), 300, 60, "float32").route != "qr"
    assert choose((700, 640), 300, 60, "float64").route == "qr"


def test_without_samples_clients_count_alike() -> None:
    assert majority_dtype(["float16", "float16", "float64"], [0, 0, 0]) == "float16"
    assert majority_dtype(["float32"], [0.0]) == "float32"
