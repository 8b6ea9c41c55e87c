"""The cost model chooses the fastest route in measurements, on every machine, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_cli.kernels.cost import BYTES, QUICK, SMALL, SPARE, WHOLE, choose
from fedlora_cli.kernels.routes import ROUTES

sides, ranks = st.integers(1, 16384), st.integers(1, 128)
dtypes = st.sampled_from(sorted(BYTES))


@pytest.mark.parametrize(
    ("shape", "total", "dtype", "route"),
    [
        ((4096, 4096), 600, "float32", "gram"),
        ((4096, 4096), 600, "bfloat16", "gram"),
        ((4096, 4096), 600, "float64", "qr"),
        ((4096, 4096), 900, "float32", "gram"),
        ((14336, 4096), 600, "bfloat16", "gram"),
        ((4096, 4096), 30000, "bfloat16", "dense"),
        ((4096, 4096), 4096, "float64", "dense"),
        ((1024, 4096), 1200, "float32", "dense"),
        ((4096, 4096), 1600, "bfloat16", "factored"),
        ((8192, 8192), 3000, "bfloat16", "factored"),
        ((64, 64), 16, "float32", "qr"),
    ],
    ids=str,
)
def test_the_route_is_the_fastest_in_measurements(shape, total, dtype, route) -> None:
    assert choose(shape, total, 64, dtype).route == route


@given(sides, sides, st.integers(1, 40000), ranks, dtypes)
def test_the_fastest_possible_route_is_chosen(rows, columns, total, rank, dtype) -> None:
    choice = choose((rows, columns), total, rank, dtype)

    assert [one.route for one in choice.estimates] == ["qr", "gram", "dense", "factored"]
    assert choice.chosen.possible is None
    possible = [one.seconds for one in choice.estimates if one.possible is None]
    quick = choice.route == "qr" and choice.chosen.seconds <= QUICK
    assert quick or choice.chosen.seconds == min(possible)
    for one in choice.estimates:
        assert min(one.seconds, one.bytes) > 0
    if total >= min(rows, columns):
        assert choice.route in ("qr", "dense")
    elif dtype == "float64":
        assert choice.route == "qr"
    assert choice == choose((rows, columns), total, rank, dtype)


@given(sides, sides, st.integers(1, 9000), ranks, dtypes, st.sampled_from([0, 1, 2, 3]))
def test_a_larger_module_costs_more(rows, columns, total, rank, dtype, grown) -> None:
    """Except across thresholds, where a route works in another way."""
    small = [rows, columns, total, rank]
    large = list(small)
    large[grown] *= 2
    before, after = (choose((r, c), total, rank, dtype) for r, c, total, rank in (small, large))
    crossed = (min(rows, columns) <= total) != (min(large[:2]) <= large[2])
    whole = [min(r, c) <= max(SMALL, rank + SPARE) for r, c, _, rank in (small, large)]
    for one, other in zip(before.estimates, after.estimates, strict=True):
        if one.route == "qr" and crossed:
            continue
        if one.route in ("dense", "factored") and whole != [False, False]:
            continue
        if one.route == "gram" and (total > WHOLE) != (large[2] > WHOLE):
            continue
        assert other.bytes >= one.bytes
        assert other.seconds >= one.seconds


def test_every_route_has_an_estimate() -> None:
    estimates = choose((64, 48), 16, 8, "float32").estimates

    assert {estimate.route for estimate in estimates} == set(ROUTES)


def test_a_dry_run_needs_no_torch() -> None:
    code = "import sys, fedlora_cli.kernels.cost; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
