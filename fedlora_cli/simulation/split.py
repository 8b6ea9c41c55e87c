"""The examples of each client and the clients of each round, drawn from the seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora_cli.errors import UsageError
from fedlora_cli.simulation.client_list import in_order
from fedlora_cli.simulation.options import Setting, Split
from fedlora_cli.simulation.task import Examples, IntArray
from fedlora_cli.text import shortened

#: Random streams: streams of the same seed are independent.
_SPLIT, _ROUND, _CLIENT = 1, 2, 3

#: Clients that an error names: their ranks are in this order.
_NAMED = 20


def parts_of(
    examples: Examples, setting: Setting, seed: int
) -> tuple[tuple[str, ...], tuple[IntArray, ...]]:
    """The clients' names, and the positions of the examples of each. Raises UsageError.

    The data decide both if they fix the client of each example; otherwise `deal` decides.
    """
    owners = examples.owners
    if owners is None:
        parts = deal(examples.labels, setting.ranks, setting.split, seed)
        return tuple(client_name(k, setting) for k in range(len(parts))), parts
    names = in_order(owners.names)
    if len(names) != len(setting.ranks):
        given = f"{len(setting.ranks)} ranks" if setting.ranks else "no ranks"
        found = f"{given} for {len(names)} clients ({shortened(names, _NAMED)})"
        raise UsageError("--ranks", found, "give one for each client, in this order")
    by_name = np.array(owners.names)
    return tuple(names), tuple(np.flatnonzero(by_name == name) for name in names)


def deal(labels: IntArray, ranks: Sequence[int], split: Split, seed: int) -> tuple[IntArray, ...]:
    """The positions of the examples of each client; no example is used twice. Raises UsageError.

    >>> labels = np.array([0, 1] * 10)
    >>> parts = deal(labels, (4, 8), Split(dirichlet=0.5), seed=0)
    >>> sorted(int(i) for part in parts for i in part) == list(range(20))
    True
    """
    if len(labels) < len(ranks):
        found = f"{len(labels)} training examples for {len(ranks)} clients"
        raise UsageError("--cohort", found, "give fewer clients, or more data")
    rng = np.random.default_rng([seed, _SPLIT])
    powers = np.array(ranks, dtype=np.float64) ** split.holdings
    shares = powers / powers.mean()
    held: list[list[IntArray]] = [[] for _ in ranks]
    classes = np.unique(labels)
    takers = _takers(len(classes), len(ranks), split.classes, rng)
    for column, label in enumerate(classes):
        positions = rng.permutation(np.flatnonzero(labels == label))
        allowed = takers[:, column]
        if split.classes is None:
            portions = rng.dirichlet(split.dirichlet * shares)
        else:
            portions = np.where(allowed, shares, 0.0) / shares[allowed].sum()
        cuts = (portions.cumsum()[:-1] * len(positions)).round().astype(int)
        for mine, part in zip(held, np.split(positions, cuts), strict=True):
            mine.append(part)
    parts = [np.sort(np.concatenate(mine)) for mine in held]
    # A client needs at least one example: the client with the most examples gives one.
    for k, part in enumerate(parts):
        if not part.size:
            richest = max(range(len(parts)), key=lambda j: parts[j].size)
            parts[k], parts[richest] = parts[richest][:1], parts[richest][1:]
    return tuple(parts)


def _takers(
    classes: int, clients: int, wanted: int | None, rng: np.random.Generator
) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Which client has which class, (clients, classes): all classes, or `wanted` for each client.

    Classes are dealt like cards, so that each class has about the same number of clients.
    """
    if wanted is None or wanted >= classes:
        return np.ones((clients, classes), dtype=np.bool_)
    deck: list[int] = []
    result = np.zeros((clients, classes), dtype=np.bool_)
    for k in range(clients):
        while result[k].sum() < wanted:
            fresh = [c for c in deck if not result[k, c]]
            if not fresh:
                deck += [int(c) for c in rng.permutation(classes)]
                continue
            result[k, fresh[0]] = True
            deck.remove(fresh[0])
    for column in np.flatnonzero(~result.any(axis=0)):  # classes without a client, if there are few
        result[int(rng.integers(clients)), column] = True
    return result


def drawn(setting: Setting, seed: int, number: int) -> tuple[int, ...]:
    """The positions of the clients of a round, the same for each arm."""
    rng = np.random.default_rng([seed, _ROUND, number])
    chosen = rng.choice(len(setting.ranks), setting.present, replace=False)
    return tuple(sorted(int(k) for k in chosen))


def training_seed(seed: int, number: int, client: int) -> int:
    """The seed for the training of a client in a round."""
    return int(np.random.SeedSequence([seed, _CLIENT, number, client]).generate_state(1)[0])


def client_name(position: int, setting: Setting) -> str:
    """A name that sorts by position, such as client-07.

    >>> client_name(6, Setting())
    'client-07'
    """
    return f"client-{position + 1:0{len(str(len(setting.ranks)))}}"
