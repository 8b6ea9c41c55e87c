"""The error of three aggregations of LoRA adapters of ranks 4, 8 and 16, as a table.

    python samples/nvflare/compare_hlora.py

- naive: NVFlare's default. The factors A and B are averaged apart, padded with zeros.
- HLoRA: as in NVFlare's example `examples/advanced/medgemma` (NVIDIA/NVFlare, pull request 4424):
  the best approximation of the mean of all B A. It does not look at alpha.
- fedlora: flexlora, the best approximation of the mean of all (alpha / r) B A.

The error is ‖update - mean‖ / ‖mean‖ in the Frobenius norm, over all modules. PEFT adds the update
to the weights; the mean is the sample-weighted mean of the clients' updates. The clients start
from the first rows of one A, as in the first round of a federation, and train B. The script needs
neither NVFlare nor a network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fedlora_cli import AggregateOptions, StateDict, aggregate_state_dicts, cut

RANKS = {"site-1": 4, "site-2": 8, "site-3": 16}
SAMPLES = {"site-1": 300, "site-2": 200, "site-3": 100}
SHAPES = {"q_proj": (96, 64), "v_proj": (32, 64), "down_proj": (64, 160)}
LARGEST = max(RANKS.values())
DRIFT = 0.03  # of A in one round of training, as a share of its entries

#: B and A of a module; the update of every module.
Pair = tuple[Tensor, Tensor]
Updates = dict[str, Tensor]


def make_clients(alpha: Callable[[int], float]) -> dict[str, StateDict]:
    """A client for each site, with the alpha of its rank."""
    noise = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise)

    first = {name: normal(LARGEST, columns) for name, (_, columns) in SHAPES.items()}
    clients = {}
    for site, rank in RANKS.items():
        tensors = {}
        for name, (rows, columns) in SHAPES.items():
            tensors[key(name, "A")] = first[name][:rank] + DRIFT * normal(rank, columns)
            # Updates of equal size: training corrects for the scaling.
            size = rank / alpha(rank) / rank**0.5
            tensors[key(name, "B")] = size * normal(rows, rank)
        clients[site] = StateDict(tensors, config(rank, alpha(rank)), SAMPLES[site])
    return clients


def config(rank: int, alpha: float) -> dict[str, object]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(SHAPES)}


def key(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def pairs_of(state: StateDict, module: str) -> Pair:
    return state.tensors[key(module, "B")].double(), state.tensors[key(module, "A")].double()


def naive(pairs: list[Pair], shares: list[float]) -> Pair:
    (rows, _), (_, columns) = pairs[0][0].shape, pairs[0][1].shape
    mean_b, mean_a = torch.zeros(rows, LARGEST).double(), torch.zeros(LARGEST, columns).double()
    for (b, a), share in zip(pairs, shares, strict=True):
        mean_b[:, : b.shape[1]] += share * b
        mean_a[: a.shape[0]] += share * a
    return mean_b, mean_a


def hlora(pairs: list[Pair], shares: list[float]) -> Pair:
    """sum_k p_k B_k A_k = L R = Q_L (R_L R_Rᵀ) Q_Rᵀ, truncated by the SVD of the small middle."""
    weighted = [
        (b * share**0.5, a * share**0.5) for (b, a), share in zip(pairs, shares, strict=True)
    ]
    left = torch.cat([b for b, _ in weighted], dim=1)
    right = torch.cat([a for _, a in weighted], dim=0)
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, :LARGEST], s[:LARGEST, None] * vh[:LARGEST] @ q_right.T


def best(update: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def error(updates: Updates, exact: Updates) -> float:
    distance = sum(float((updates[name] - exact[name]).square().sum()) for name in exact)
    return (distance / sum(float(update.square().sum()) for update in exact.values())) ** 0.5


def errors(alpha: Callable[[int], float]) -> dict[str, tuple[float, float]]:
    """By method: the error of the global adapter, and that of the rank-4 client's part of it
    against the best approximation of rank 4.
    """
    clients = make_clients(alpha)
    shares = [samples / sum(SAMPLES.values()) for samples in SAMPLES.values()]
    scaling, small = alpha(LARGEST) / LARGEST, min(RANKS.values())
    exact: Updates = {}
    found: dict[str, Updates] = {"naive": {}, "HLoRA": {}}
    parts: dict[str, Updates] = {"naive": {}, "HLoRA": {}}
    for module in SHAPES:
        pairs = [pairs_of(client, module) for client in clients.values()]
        terms = [
            share * client.scaling * b @ a
            for share, client, (b, a) in zip(shares, clients.values(), pairs, strict=True)
        ]
        exact[module] = torch.stack(terms).sum(0)
        for name, method in {"naive": naive, "HLoRA": hlora}.items():
            b, a = method(pairs, shares)
            found[name][module] = scaling * b @ a
            parts[name][module] = alpha(small) / small * b[:, :small] @ a[:small]
    merged, _ = aggregate_state_dicts(clients, AggregateOptions(method="flexlora", rank=LARGEST))
    part = cut(merged, small, alpha(small) / small)
    found["fedlora flexlora"] = applied(merged)
    parts["fedlora flexlora"] = applied(part)
    found["truncation alone"] = {name: best(update, LARGEST) for name, update in exact.items()}
    reference = {name: best(update, small) for name, update in exact.items()}
    parts["truncation alone"] = reference
    return {name: (error(found[name], exact), error(parts[name], reference)) for name in found}


def applied(state: StateDict) -> Updates:
    """The updates that PEFT adds to the weights."""
    pairs = {module: pairs_of(state, module) for module in SHAPES}
    return {module: state.scaling * b @ a for module, (b, a) in pairs.items()}


def main() -> None:
    usual, fixed = errors(lambda rank: 2.0 * rank), errors(lambda rank: 16.0)
    print("| error | alpha = 2 r | alpha = 16 for all | rank-4 client's part, alpha = 16 |")
    print("|---|--:|--:|--:|")
    for name in usual:
        print(f"| {name} | {usual[name][0]:.3f} | {fixed[name][0]:.3f} | {fixed[name][1]:.3f} |")


if __name__ == "__main__":
    main()
