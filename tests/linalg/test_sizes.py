"""Sizes of updates hold where pieces cancel, and tell faults from honest adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.adapters import CONFIG
from torch import nn

from fedlora_cli import read
from fedlora_cli.adapters.adapter import read_modules
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import CANCELLED, LARGEST, Sizes, fault, norm, sizes

PRECISIONS = (torch.float64, torch.float32)


def random(shape: tuple[int, int], rank: int, seed: int, scale: float = 1.0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    B, A = torch.randn(shape[0], rank, generator=rng), torch.randn(rank, shape[1], generator=rng)
    return Factors(B, A, scale)


def of(factors: Factors, start: int = 0) -> np.ndarray:
    """The dense update from a rank index on, in 64 bits of mantissa where the machine has them."""
    B, A = (one.double().numpy().astype(np.longdouble) for one in (factors.B, factors.A))
    dense: np.ndarray = np.longdouble(factors.scale) * (B[:, start:] @ A[start:])
    return dense


def length(dense: np.ndarray) -> float:
    return float(np.sqrt(np.square(dense).sum()))


def found_fault(one: Factors, precision: torch.dtype = torch.float64) -> str | None:
    error = fault("ann", "q_proj", sizes([one], precision=precision)[0])
    return None if error is None else error.found


# --- cancelling pieces ----------------------------------------------------------------------------


def pair(size: float, apart: float) -> Factors:
    """Columns b and -b, rows a and a + δ, δ this share of a."""
    one = random((9, 14), 1, seed=1)
    rest = random((9, 14), 1, seed=2)
    rows = torch.cat([one.A, one.A + apart * rest.A]).float()
    return Factors((torch.cat([one.B, -one.B], dim=1) * size).float(), rows)


@pytest.mark.parametrize("size", [1.0, 2.0**50, 2.0**110], ids=["1", "2^50", "2^110"])
@pytest.mark.parametrize("apart", [0.0, 1e-7, 1e-4, 1.0])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_norm_holds_where_columns_cancel(
    size: float, apart: float, precision: torch.dtype
) -> None:
    one = pair(size, apart)
    exact = length(of(one))

    [found] = sizes([one], precision=precision)

    close = 1e-2 if precision == torch.float32 else 1e-6
    assert found.norm == pytest.approx(exact, rel=close, abs=1e-12 * found.pieces)
    ratio = found.pieces / exact if exact else math.inf
    assert (found_fault(one, precision) is None) == (ratio <= CANCELLED)
    assert (ratio > CANCELLED) == (apart < 1e-6)


#: Updates of exactly zero made of huge pieces.
ZEROS = {
    "a pair": ([1, -1], [1, 1]),
    "three": ([1, 1, -2], [1, 1, 1]),
    "of different length": ([2.0**20, -1], [2.0**-20, 1]),
    "beside an honest column": ([1, -1, 0], [1, 1, 1]),
}


@pytest.mark.parametrize("name", ZEROS)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_zero_update_of_large_pieces_is_a_fault(name: str, precision: torch.dtype) -> None:
    columns, rows = (torch.tensor(one, dtype=torch.float32) for one in ZEROS[name])
    one = random((9, 14), 1, seed=3)
    cancelled = Factors(one.B * columns * 1e13, rows[:, None] * one.A)
    if name == "beside an honest column":
        cancelled.B[:, 2] = random((9, 14), 1, seed=4).B[:, 0]

    said = found_fault(cancelled, precision)

    assert said is not None
    assert said.startswith("the pieces of the update of q_proj cancel: their norms add up to ")


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(0, 99),
    st.lists(st.integers(-12, 12), min_size=7, max_size=7),
    st.sampled_from(PRECISIONS),
)
def test_sizes_are_those_of_the_dense_update(rows, columns, rank, seed, powers, precision) -> None:
    one = random((rows, columns), rank, seed, scale=0.3)
    lengths = torch.tensor([10.0**p for p in powers[:rank]])
    gauged = Factors(one.B * lengths, one.A, one.scale)
    starts = [0, 2, 3, 9]

    [found] = sizes([gauged], starts, precision)

    parts = [length(of(gauged, start)) for start in starts if start < rank]
    B, A = gauged.B.double().numpy(), gauged.A.double().numpy()
    pieces = 0.3 * float((np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=1)).sum())
    near = {"rel": 1e-6 if precision == torch.float64 else 1e-2, "abs": 1e-12 * pieces}
    assert found.norm == pytest.approx(parts[0], **near)
    assert found.part == pytest.approx(max(parts), **near)
    assert found.pieces == pytest.approx(pieces, rel=1e-5)


def test_reach_is_the_norm_but_where_parts_cancel() -> None:
    honest = sizes([random((30, 40), 8, seed=5)], [0, 2, 4])[0]
    one = random((30, 40), 8, seed=6)
    B, A = one.B.clone(), one.A.clone()
    B[:, 7], A[7] = -1e4 * B[:, 0], A[0]
    B[:, 0] *= 1e4
    split = Factors(B, A)

    assert honest.reach == honest.norm
    assert norm(split) < 200
    assert sizes([split], [0, 2, 4])[0].reach == pytest.approx(length(of(split, 2)) / 2, rel=1e-3)
    # Where all rank indices have one weight, nothing but the whole counts.
    assert sizes([split])[0].reach == norm(split)


def test_squares_that_underflow_are_seen() -> None:
    """Faults and norms by what is there, not by what is left of its square."""
    small = Factors(torch.full((5, 2), 1e-25), torch.full((2, 4), 1.0), 1e30)
    small.B[:, 1] *= -1
    for precision in PRECISIONS:
        assert found_fault(small, precision) is not None
    tiny = Factors(1e-170 * torch.ones(5, 1).double(), torch.ones(1, 4).double(), 1e300)
    assert norm(tiny) == math.inf
    assert norm(Factors(torch.full((5, 1), 1e-30), torch.ones(1, 4), 1e31)) == pytest.approx(
        10 * math.sqrt(20), rel=1e-6
    )


@pytest.mark.parametrize("exponent", [20, 100, 147])
def test_every_norm_up_to_the_largest_is_known(exponent: int) -> None:
    one = random((6, 5), 2, seed=7)
    large = Factors(
        one.B.double() * 10.0 ** (exponent / 2), one.A.double() * 10.0 ** (exponent / 2)
    )

    assert norm(large) == pytest.approx(norm(one) * 10.0**exponent, rel=1e-9)
    assert found_fault(large) is None
    beyond = Factors(large.B, large.A, LARGEST * 10.0 ** (2 - exponent))
    assert found_fault(beyond) == "the update of q_proj is larger than any number"


# --- honest adapters ------------------------------------------------------------------------------


def trained(steps: int, folder: Path, start: str | bool = True) -> list[Sizes]:
    """What a few steps of PEFT leave; `start` is its `init_lora_weights`."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 18))
    config = LoraConfig(r=8, target_modules=["0", "2"], init_lora_weights=start)  # type: ignore[arg-type]
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "start"))
    x, y = torch.randn(64, 24), torch.randn(64, 18)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    if start == "pissa":
        convert = {"path_initial_model_for_weight_conversion": str(folder / "start")}
        model.save_pretrained(str(folder / "end"), **convert)
    else:
        model.save_pretrained(str(folder / "end"))
    assert json.loads((folder / "end" / CONFIG).read_text())["r"] == (16 if start == "pissa" else 8)
    adapter = read(folder / "end")
    return sizes(list(read_modules(adapter, adapter.modules).values()))


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "pissa"], ids=str)
@pytest.mark.parametrize("steps", [1, 30])
def test_adapters_that_were_trained_are_no_fault(tmp_path: Path, start: str, steps: int) -> None:
    found = trained(steps, tmp_path, start)

    assert all(fault("ann", "0", one) is None for one in found)
    ratio = max(one.pieces / one.norm for one in found)
    assert ratio < (1000 if start in ("orthogonal", "pissa") else 10)


def test_updates_without_pieces_and_padded_ones_are_no_fault(tmp_path: Path) -> None:
    one = random((9, 14), 4, seed=8)
    zero = Factors(torch.zeros_like(one.B), one.A * 1e13)
    padded = lowrank.pad(one, 12, seed=1)

    for precision in PRECISIONS:
        assert sizes([zero], precision=precision)[0] == Sizes(0.0, 0.0, 0.0)
        assert found_fault(zero, precision) is None
        assert found_fault(padded, precision) is None
    assert norm(padded) == pytest.approx(norm(one))
    assert all(fault("ann", "0", one) is None for one in trained(0, tmp_path))


def test_parts_beyond_their_squares_are_a_fault() -> None:
    """The norm is in range, but not what the update becomes where its parts do not cancel."""
    found = fault("ann", "q_proj", Sizes(norm=1e150, part=1e155, pieces=1e155))

    assert found is not None
    assert found.found == "the update of q_proj is larger than any number"
    assert fault("ann", "q_proj", Sizes(norm=1e100, part=1e104, pieces=1e104)) is None
