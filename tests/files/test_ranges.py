"""Tensors are read in few ranges, modules in groups that lie side by side."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.adapters import Spec, make

from fedlora_cli import AggregateOptions, InputError, aggregate, read
from fedlora_cli.adapters import batches as groups
from fedlora_cli.adapters.adapter import read_modules
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.files import entries, untrusted
from fedlora_cli.files.safetensors import read_header

SHAPES = {f"layers.{number}.q": (8, 8) for number in range(40)}


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File, start and length of every range that is read for tensors."""
    seen: list[tuple[str, int, int]] = []
    plain = untrusted.Untrusted.fill

    def fill(file: untrusted.Untrusted, start: int, buffer: bytearray) -> None:
        seen.append((str(file.path), start, len(buffer)))
        plain(file, start, buffer)

    monkeypatch.setattr(untrusted.Untrusted, "fill", fill)
    return seen


@given(picked=st.lists(st.integers(0, 9), min_size=1, max_size=14))
def test_any_tensors_in_any_order_are_those_of_the_file(tmp_path_factory, picked) -> None:
    path = tmp_path_factory.mktemp("x") / "x"
    tensors = {str(n): torch.full((n + 1, 3), float(n)).bfloat16() for n in range(10)}
    save_file(tensors, path)
    header = read_header(path)

    found = entries.read_entries([header[str(n)] for n in picked])

    for n, tensor in zip(picked, found, strict=True):
        assert torch.equal(tensor, tensors[str(n)])


def test_neighbours_are_one_range_and_a_gap_makes_two(tmp_path: Path, ranges, monkeypatch) -> None:
    save_file({name: torch.ones(4) for name in "abcdef"}, tmp_path / "x")
    header = read_header(tmp_path / "x")
    start = header["a"].start

    def read_as(names: str) -> list[tuple[int, int]]:
        ranges.clear()
        entries.read_entries([header[name] for name in names])
        return [(first - start, length) for _, first, length in ranges]

    assert read_as("cabcb") == [(0, 48)]
    assert read_as("fab") == [(0, 32), (80, 16)]
    monkeypatch.setattr(entries, "_MAX_RANGE", 32)
    assert read_as("abcde") == [(0, 32), (32, 32), (64, 16)]


def test_parts_of_a_tensor_and_the_whole_are_one_range(tmp_path: Path, ranges) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    save_file({"x": whole}, tmp_path / "x")
    entry = read_header(tmp_path / "x")["x"]
    ranges.clear()

    found = entries.read_entries([entry.part(2, 2), entry, entry.part(0, 1)])

    assert len(ranges) == 1
    assert [tensor.tolist() for tensor in found] == [
        whole[2:].tolist(),
        whole.tolist(),
        whole[:1].tolist(),
    ]


def test_values_that_are_not_finite_are_told_in_the_order_asked_for(tmp_path: Path) -> None:
    bad = {"a": torch.tensor([torch.inf, 1.0]), "b": torch.tensor([1.0, torch.nan])}
    save_file({**bad, "c": torch.full((2,), 3e38)}, tmp_path / "x")
    header = read_header(tmp_path / "x")
    faults: list[InputError] = []

    entries.read_entries([header[name] for name in "cba"], faults.append)

    assert [fault.found.split()[0] for fault in faults] == ["b", "a"]  # the sum of c overflows


def test_one_range_of_every_client_brings_a_group(tmp_path: Path, ranges) -> None:
    for k in range(3):
        make(tmp_path / "round", Spec(f"c{k}", rank=2, shapes=SHAPES, seed=k))
    adapters = [read(folder) for folder in sorted((tmp_path / "round").iterdir())]
    number = len(grouped(adapters, adapters[0].modules))
    ranges.clear()

    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(rank=2, jobs=1))

    for one in adapters:
        own = [found for found in ranges if found[0] == str(one.weights_file)][-number:]
        lengths = [entry.length for m in one.modules.values() for entry in m.infos]
        assert sum(length for _, _, length in own) == sum(lengths)
        assert all(start + length == after for (_, start, length), (_, after, _) in pairwise(own))


def test_groups_hold_all_modules_once_in_order_and_are_enough_for_all_cores(tmp_path: Path) -> None:
    one = read(make(tmp_path, Spec("a", rank=2, shapes=SHAPES)).folder)

    found = grouped([one], reversed(one.modules))

    assert [name for group in found for name in group] == sorted(SHAPES)
    assert 16 <= len(found) < len(SHAPES)


def test_a_group_is_no_larger_than_its_limit_unless_it_is_one_module(
    tmp_path: Path, monkeypatch
) -> None:
    shapes = {**SHAPES, "layers.1.wide": (640, 640)}
    one = read(make(tmp_path, Spec("a", rank=2, shapes=shapes)).folder)
    monkeypatch.setattr(groups, "MAX_GROUP", 300)  # a narrow module has 128 bytes

    found = grouped([one], one.modules)

    assert ("layers.1.wide",) in found
    assert {len(group) for group in found if "layers.1.wide" not in group} <= {1, 2}


def test_modules_read_together_are_those_read_alone(tmp_path: Path) -> None:
    one = read(make(tmp_path, Spec("a", rank=2, shapes=SHAPES)).folder)

    found = read_modules(one, ["layers.7.q", "layers.3.q", "no such module"])

    assert list(found) == ["layers.7.q", "layers.3.q"]
    for name, factors in found.items():
        alone = one.modules[name].read()
        assert torch.equal(factors.B, alone.B)
        assert torch.equal(factors.A, alone.A)
        assert factors.scale == alone.scale
