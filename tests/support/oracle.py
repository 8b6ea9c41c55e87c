"""The methods once more, dense, in float64, one loop each: slow, obvious, and independent."""

from __future__ import annotations

from typing import Any

import numpy as np

Client = tuple[np.ndarray, np.ndarray, float, float]  # B, A, scale, samples


def aggregate(method: str, clients: list[Client], previous: np.ndarray | None = None) -> np.ndarray:
    """The dense update that a method asks for, before any truncation.

    `previous` is the dense previous global update, with singular values all different.
    """
    total = sum(samples for *_, samples in clients)
    rank = max(A.shape[0] for _, A, _, _ in clients)
    shape = clients[0][0].shape[0], clients[0][1].shape[1]
    if method in ("flexlora", "flora", "ffa"):
        update: Any = sum(n / total * s * B @ A for B, A, s, n in clients)
        return update
    if method in ("raflora", "residual"):
        U, sigma, Vh = np.linalg.svd(np.zeros(shape) if previous is None else previous)
        result = np.zeros(shape)
        for i in range(min(shape)):
            holders = [(B[:, i], A[i], s, n) for B, A, s, n in clients if A.shape[0] > i]
            held = sum(n for *_, n in holders)
            whole = held if method == "raflora" else total
            for b, a, s, n in holders:
                result += n / whole * s * np.outer(b, a)
            left = 1 - (held / whole if whole else 0)
            result += left * sigma[i] * np.outer(U[:, i], Vh[i])
        return result
    norms = [np.linalg.norm(s * B @ A) for B, A, s, _ in clients]
    mean_B, mean_A = np.zeros((shape[0], rank)), np.zeros((rank, shape[1]))
    for i in range(rank):
        held = sum(n for _, A, _, n in clients if A.shape[0] > i)
        for (B, A, s, n), norm in zip(clients, norms, strict=True):
            if A.shape[0] > i:
                weights = {"fedavg": n / total, "hetlora": norm / sum(norms), "rbla": n / held}
                mean_B[:, i] += weights[method] * s**0.5 * B[:, i]
                mean_A[i] += weights[method] * s**0.5 * A[i]
    return mean_B @ mean_A
