"""Who has which examples, and who takes part: all of it from the seed, none of it lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_cli import UsageError
from fedlora_cli.simulation.options import Setting, Split
from fedlora_cli.simulation.split import client_name, deal, drawn, training_seed

RANKS = (4, 4, 8, 8, 16, 32)
LABELS = np.arange(600) % 10


@given(
    clients=st.integers(1, 12),
    examples=st.integers(12, 200),
    classes=st.integers(1, 12),
    dirichlet=st.floats(0.01, 100),
    wanted=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_example_has_one_client_and_every_client_an_example(
    clients: int, examples: int, classes: int, dirichlet: float, wanted: int | None, seed: int
) -> None:
    parts = deal(
        np.arange(examples) % classes, (4,) * clients, Split(dirichlet, classes=wanted), seed
    )

    assert len(parts) == clients
    assert all(part.size for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(examples))


def test_a_split_follows_from_its_seed() -> None:
    once, again, other = (deal(LABELS, RANKS, Split(), seed) for seed in (3, 3, 4))

    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(once, other, strict=True))


def skew(parts: tuple[np.ndarray, ...]) -> float:
    """The mean share that a client's most common class has among its examples."""
    return float(np.mean([np.bincount(LABELS[part]).max() / part.size for part in parts]))


def test_a_small_concentration_is_more_uneven() -> None:
    even, uneven = (deal(LABELS, RANKS, Split(dirichlet), 0) for dirichlet in (1e4, 0.05))

    assert skew(even) < 0.15
    assert skew(uneven) > 0.3
    assert max(part.size for part in even) - min(part.size for part in even) <= 20


def test_the_pathological_split_gives_that_many_classes() -> None:
    parts = deal(LABELS, RANKS, Split(classes=2), 0)

    assert {len(np.unique(LABELS[part])) for part in parts} == {2}


def test_holdings_give_the_high_ranks_more_or_fewer_examples() -> None:
    sizes = {
        power: [part.size for part in deal(LABELS, RANKS, Split(1e4, holdings=power), 0)]
        for power in (-1.0, 0.0, 1.0)
    }

    assert sizes[1.0] == sorted(sizes[1.0])
    assert sizes[1.0][-1] == pytest.approx(600 * 32 / 72, abs=10)
    assert sizes[-1.0] == sorted(sizes[-1.0], reverse=True)
    assert sizes[-1.0][0] > 4 * sizes[-1.0][-1]


def test_more_clients_than_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="5 training examples for 6 clients"):
        deal(LABELS[:5], RANKS, Split(), 0)


def test_the_draw_of_a_round_is_the_seeds_and_differs_by_round() -> None:
    setting = Setting(ranks=RANKS, participation=0.5)
    rounds = [drawn(setting, 0, number) for number in range(1, 20)]

    assert all(len(set(one)) == 3 for one in rounds)
    assert rounds == [drawn(setting, 0, number) for number in range(1, 20)]
    assert len(set(rounds)) > 5
    assert {k for one in rounds for k in one} == set(range(6))
    assert drawn(Setting(ranks=RANKS, participation=1.0), 0, 1) == tuple(range(6))
    assert len(drawn(Setting(ranks=RANKS, participation=0.01), 0, 1)) == 1


def test_every_client_trains_with_a_seed_of_its_own() -> None:
    seeds = {training_seed(s, t, k) for s in range(3) for t in range(4) for k in range(5)}

    assert len(seeds) == 60


def test_names_sort_by_position() -> None:
    names = [client_name(k, Setting()) for k in range(20)]

    assert names == sorted(names)
    assert names[0] == "client-01"
