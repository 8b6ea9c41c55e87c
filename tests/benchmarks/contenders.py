"""Ways to aggregate one module, timed on the same files in turn. Prints JSON: seconds by contender.

    python tests/benchmarks/contenders.py COHORT --module layers.0.proj --rank 64 gram fedlora

Each is what that project does, written out where it is a few lines of torch; PEFT is PEFT itself.
All times are of arithmetic on factors that have been read and are float32 already, but for
`fedlora`, which takes them as the files hold them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from fedlora_cli.execution import engine
from fedlora_cli.kernels import cost, factored
from fedlora_cli.kernels import dense as dense_kernel
from fedlora_cli.kernels import gram as gram_kernel
from fedlora_cli.kernels.leading import Leading, Unresolved
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors

#: What is timed. Those that aggregate give two matrices whose product is the update.
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class Work:
    """One module of all clients: factors as stored, shares of samples p_k, the rank wanted."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    scales: tuple[float, ...]
    shares: tuple[float, ...]
    rank: int

    @cached_property
    def floats(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The factors in float32."""
        return tuple((B.float(), A.float()) for B, A in self.pairs)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """s_k p_k."""
        return tuple(s * p for s, p in zip(self.scales, self.shares, strict=True))


def gram(work: Work) -> Run:
    """The floor: the two Gram products of the stacked factors in float32, nothing else."""
    L = torch.cat([B for B, _ in work.floats], dim=1)
    R = torch.cat([A for _, A in work.floats])
    return lambda: (L.T @ L, R @ R.T)


def accumulation(work: Work) -> Run:
    """The other floor, for more directions than the module has: the sum as one product."""
    L = torch.cat([B for B, _ in work.floats], dim=1)
    R = torch.cat([A for _, A in work.floats])
    return lambda: (L @ R,)


def dense(work: Work) -> Run:
    """FlexLoRA (arXiv:2402.11505): form the sum of the updates, decompose it."""
    floats, weights = work.floats, work.weights

    def run() -> tuple[Tensor, Tensor]:
        update = torch.zeros(floats[0][0].shape[0], floats[0][1].shape[1])
        for (B, A), weight in zip(floats, weights, strict=True):
            update += weight * (B @ A)
        U, s, Vh = torch.linalg.svd(update, full_matrices=False)
        return U[:, : work.rank] * s[: work.rank], Vh[: work.rank]

    return run


def stacked_qr(work: Work) -> Run:
    """HLoRA as NVFlare's medgemma example has it: QR of both stacks, SVD of the core, float32."""
    floats, weights = work.floats, work.weights

    def run() -> tuple[Tensor, Tensor]:
        roots = [weight**0.5 for weight in weights]
        pairs = zip(floats, roots, strict=True)
        scaled = [(root * B, root * A) for (B, A), root in pairs]
        QL, RL = torch.linalg.qr(torch.cat([B for B, _ in scaled], dim=1))
        QR, RR = torch.linalg.qr(torch.cat([A for _, A in scaled]).T)
        U, s, Vh = torch.linalg.svd(RL @ RR.T, full_matrices=False)
        return QL @ U[:, : work.rank], s[: work.rank, None] * (Vh[: work.rank] @ QR.T)

    return run


def fedlora(work: Work) -> Run:
    """The leading directions of the weighted sum for an output in float32, by the route that the
    command takes, from the factors as the files hold them.
    """
    factors = zip(work.pairs, work.scales, strict=True)
    terms = [Factors(B, A, scale) for (B, A), scale in factors]
    pieces = [
        torch.full((term.rank,), share, dtype=torch.float64)
        for term, share in zip(terms, work.shares, strict=True)
    ]
    weights, shape = torch.cat(pieces), terms[0].shape
    total = sum(term.rank for term in terms)
    route = cost.choose(shape, total, work.rank, "float32").route

    def by_qr() -> lowrank.Svd:
        return lowrank.svd(lowrank.orthogonalize(terms), weights, work.rank)[0]

    def by_dense() -> Leading:
        stream = (dense_kernel.Term(*pair) for pair in zip(terms, pieces, strict=True))
        update, _ = dense_kernel.accumulate(stream, shape, torch.float64)
        return dense_kernel.leading(update, work.rank, "float32")

    def by_gram() -> Leading:
        return gram_kernel.leading(gram_kernel.prepare(terms, "float32"), weights, work.rank)

    def by_factored() -> Leading:
        prepared = factored.prepare(terms, "float32")
        return factored.leading(prepared, weights, work.rank, "float32")

    routes: dict[str, Callable[[], lowrank.Svd | Leading]]
    routes = {"qr": by_qr, "dense": by_dense, "gram": by_gram, "factored": by_factored}

    def run() -> tuple[Tensor, ...]:
        try:
            found = routes[route]()
        except Unresolved:
            found = by_qr()
        return found.U * found.s, found.Vh

    return run


def peft(work: Work, kind: str) -> Run:
    """PEFT's `add_weighted_adapter` on a model that is one linear layer, the adapters loaded."""
    from peft import LoraConfig, get_peft_model

    out, columns = work.pairs[0][0].shape[0], work.pairs[0][1].shape[1]
    base = torch.nn.Sequential()
    with torch.no_grad():
        base.add_module("proj", torch.nn.Linear(columns, out, bias=False))
    model: Any = None
    names = [f"client{k}" for k in range(len(work.pairs))]
    for name, (B, A), scale in zip(names, work.floats, work.scales, strict=True):
        rank = A.shape[0]
        alpha = scale * rank
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"])  # type: ignore[arg-type]
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.proj
        layer.lora_A[name].weight.data.copy_(A)
        layer.lora_B[name].weight.data.copy_(B)
    wanted = work.rank if kind == "svd" else None

    def run() -> tuple[Tensor, Tensor]:
        shares = list(work.shares)
        model.add_weighted_adapter(names, shares, "merged", combination_type=kind, svd_rank=wanted)
        layer = model.base_model.model.proj
        made = layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data
        model.delete_adapter("merged")
        return made

    return run


#: By the name on the command line. Called with the work, it gives what is to be timed.
CONTENDERS: dict[str, Callable[[Work], Run]] = {
    "fedlora": fedlora,
    "gram": gram,
    "accumulation": accumulation,
    "dense": dense,
    "stacked-qr": stacked_qr,
    "peft-svd": lambda work: peft(work, "svd"),
    "peft-cat": lambda work: peft(work, "cat"),
}


def read(cohort: Path, module: str, rank: int, clients: int = 0) -> Work:
    """One module of all clients, or of the first so many; `name*experts`: the first of so many."""
    name, _, experts = module.partition("*")
    step = int(experts or 1)
    pairs, scales, samples = [], [], []
    for folder in sorted(cohort.iterdir())[: clients or None]:
        config = json.loads((folder / "adapter_config.json").read_text())
        samples.append(json.loads((folder / "fedlora.json").read_text())["samples"])
        scales.append(config["lora_alpha"] / config["r"])
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            A, B = (file.get_tensor(f"base_model.model.{name}.lora_{side}.weight") for side in "AB")
        pairs.append((B[:, ::step].contiguous(), A[: A.shape[0] // step].contiguous()))
    shares = tuple(count / sum(samples) for count in samples)
    return Work(tuple(pairs), tuple(scales), shares, rank)


def timed(work: Work, names: Sequence[str], repeat: int) -> dict[str, list[float]]:
    """Seconds of each, in turn, so that all of them see the machine as it changes.

    Seconds of the clock, or of all cores together where that is less: on a machine that others use,
    threads wait for the one of them that was put aside, which is nobody's slowness.
    """
    runs = {name: CONTENDERS[name](work) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeat):
        for name, run in runs.items():
            began, worked = time.perf_counter(), time.process_time()
            run()
            taken = time.perf_counter() - began, time.process_time() - worked
            seconds[name].append(min(taken))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("names", nargs="+", choices=CONTENDERS, metavar="CONTENDER")
    parser.add_argument(
        "--module",
        action="append",
        required=True,
        help="full name, *128 after it for experts; or many",
    )
    parser.add_argument("--clients", type=int, default=0, help="the first so many; all")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.empty(engine.KEPT, dtype=torch.uint8)  # as the command does; it is good for all of them
    found = {}
    for module in chosen.module:
        work = read(chosen.cohort, module, chosen.rank, chosen.clients)
        with torch.no_grad():
            found[module] = timed(work, chosen.names, chosen.repeat)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
