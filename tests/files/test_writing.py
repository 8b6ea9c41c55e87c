"""Safetensors files that are written tensor by tensor: the library's bytes, whatever the order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedlora_cli.files.writing import Declared, declare, write, writing

DTYPES = ["int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8"]

described = st.dictionaries(
    st.text("abz.é_", min_size=1, max_size=6),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3)),
    min_size=1,
    max_size=12,
)


def tensors_of(content: dict[str, tuple[str, list[int]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 100, shape, generator=generator).to(getattr(torch, dtype))
        for name, (dtype, shape) in content.items()
    }


@given(content=described, order=st.randoms(use_true_random=False))
def test_the_bytes_are_the_librarys_whatever_the_order(tmp_path_factory, content, order) -> None:
    folder = tmp_path_factory.mktemp("x")
    tensors = tensors_of(content)
    names = list(tensors)
    order.shuffle(names)

    save_file(tensors, folder / "library", metadata={"format": "pt"})
    declared = {name: declare(tensor.to("meta")) for name, tensor in tensors.items()}
    with writing(folder / "ours", declared, {"format": "pt"}) as put:
        for name in names:
            put(name, tensors[name])

    assert (folder / "ours").read_bytes() == (folder / "library").read_bytes()


def test_metadata_stand_in_the_order_of_their_names(tmp_path: Path) -> None:
    for number in range(8):
        metadata = {key: key for key in ("b", "a", "é")}
        write(tmp_path / str(number), {"x": torch.ones(2)}, metadata)

    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 1
    assert '"__metadata__":{"a":"a","b":"b","é":"é"}'.encode() in contents.pop()
    assert torch.equal(load_file(tmp_path / "0")["x"], torch.ones(2))


def test_views_and_transposed_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    parts = {"t": whole.T, "rows": whole[1:3], "column": whole[:, 2], "one": whole[0, 0]}

    write(tmp_path / "x", parts, {})

    found = load_file(tmp_path / "x")
    for name, tensor in parts.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (None, "were declared and not written"),
        (torch.ones(3), "is torch.float32"),
        (torch.ones(2, dtype=torch.float64), "is torch.float64"),
    ],
)
def test_what_was_declared_is_what_is_written(tmp_path: Path, tensor, why: str) -> None:
    def write_it() -> None:
        with writing(tmp_path / "x", {"a": Declared("float32", (2,))}, {}) as put:
            if tensor is not None:
                put("a", tensor)

    with pytest.raises(AssertionError, match=why):
        write_it()
