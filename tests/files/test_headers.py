"""The reader of safetensors: whatever it accepts, the library accepts with the same meaning."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlora_cli import InputError
from fedlora_cli.files import safetensors, untrusted
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.files.untrusted import Untrusted

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}

#: Tokens that one of a valid header is replaced by, or that are put before it.
TOKENS = (
    *'{}[],:"',
    *("0", "1", "4", "24", "-1", "1.0", "1e0", "00", "true", "null", "NaN", str(2**63), str(2**64)),
    *("-0", "-0.0", "0.0", "-0e0", "0E1", "+0", "-00", "- 0", "0x0"),
    *('"a"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"BOOL"', '"f32"'),
    *(" ", "\n", "\0", "\ufeff", '"\\u0061"', '"\\ud800"', '"\x1b"', '""', '"x":'),
)
PIECES = re.compile(r'"[^"]*"|[0-9]+|.', re.DOTALL)

entries = st.tuples(
    st.sampled_from(list(WIDTHS)), st.lists(st.integers(1, 3), max_size=3), st.booleans()
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file, of whose header a few tokens are changed, or none."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for number, (dtype, shape, dotted) in enumerate(draw(st.lists(entries, max_size=3))):
        begin, end = end, end + math.prod(shape) * WIDTHS[dtype]
        key = f"a.{number}" if dotted else f"b{number}"
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    tokens = PIECES.findall(json.dumps(header))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(tokens) - 1))
        token = draw(st.sampled_from([*TOKENS, *tokens]))
        tokens[place] = token + tokens[place] if draw(st.booleans()) else token
    text = "".join(tokens).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n % 251 for n in range(end))


def agrees(path: Path) -> bool:
    """Whether the file is accepted, and then with the library's names, shapes, dtypes and bytes."""
    try:
        tensors = {key: entry.read(lambda _: None) for key, entry in read_header(path).items()}
    except InputError:
        return False
    with safe_open(path, "pt") as file:
        theirs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert sorted(theirs) == list(tensors)
    for key, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (theirs[key].shape, theirs[key].dtype)
        assert torch.equal(*(one.flatten().view(torch.uint8) for one in (tensor, theirs[key])))
    return True


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=files())
def test_what_is_accepted_here_is_accepted_by_the_library(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    agrees(tmp_path / "x")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_of_which_any_bytes_are_changed_too(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(a_good_file(tmp_path / "good"))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        byte = data.draw(st.sampled_from(b'0123456789{}[]",: FBI\x00\xff'))
        action = data.draw(st.sampled_from(["change", "insert", "delete"]))
        content[position : position + (action != "insert")] = (
            b"" if action == "delete" else bytes([byte])
        )
    (tmp_path / "x").write_bytes(content)
    agrees(tmp_path / "x")


def a_good_file(path: Path) -> bytes:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors | {"c": torch.tensor(3)}, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_a_good_file_is_accepted(tmp_path: Path) -> None:
    a_good_file(tmp_path / "x")
    assert agrees(tmp_path / "x")


#: A header with one number left out, and that number: an offset, the other, a side.
PLACES = [
    ('{"x":{"dtype":"F32","shape":[1],"data_offsets":[@,4]}}', "0"),
    ('{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,@]}}', "4"),
    ('{"x":{"dtype":"F32","shape":[@],"data_offsets":[0,4]}}', "1"),
]


@pytest.mark.parametrize(("header", "number"), PLACES)
@pytest.mark.parametrize("spelled", ["-0", "-0.0", "{}.0", "{}e0", "{}E-0", "0{}", "-{}", "+{}"])
def test_a_number_in_a_spelling_that_the_library_refuses_is_refused(
    header: str, number: str, spelled: str, tmp_path: Path
) -> None:
    def write(text: str) -> Path:
        content = header.replace("@", text).encode()
        (tmp_path / text).write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
        return tmp_path / text

    assert agrees(write(number))
    other = write(spelled.format(number))
    assert not agrees(other)
    with pytest.raises(SafetensorError, match="Error while deserializing header"):
        safe_open(other, "pt")


def test_rows_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 3, 2)
    save_file({"x": whole, "s": torch.tensor(1.0)}, tmp_path / "x")
    found = read_header(tmp_path / "x")

    assert torch.equal(found["x"].part(1, 2).read(), whole[1:3])
    assert torch.equal(found["x"].part(1, 3).part(2, 1).read(), whole[3:])
    assert torch.equal(found["x"].part(0, 4).read(), whole)
    for first, count in ((-1, 1), (0, 5), (4, 1), (0, 0)):
        with pytest.raises(ValueError, match="rows"):
            found["x"].part(first, count)
    with pytest.raises(ValueError, match="of shape"):
        found["s"].part(0, 1)


def test_rows_that_are_not_finite_are_told_by_their_place(tmp_path: Path) -> None:
    whole = torch.ones(4, 3)
    whole[2, 1] = torch.nan
    save_file({"x": whole}, tmp_path / "x")
    entry = read_header(tmp_path / "x")["x"]

    assert torch.equal(entry.part(0, 2).read(), whole[:2])
    with pytest.raises(InputError, match=r"x\[1:3\] holds 1 NaN .*, the first at position 4"):
        entry.part(1, 2).read()


def test_a_tensor_larger_than_the_memory_is_not_begun(tmp_path: Path, monkeypatch) -> None:
    a_good_file(tmp_path / "x")
    monkeypatch.setattr("fedlora_cli.files.entries._memory", lambda: 23)
    found = read_header(tmp_path / "x")

    assert found["b"].read().shape == (2,)
    with pytest.raises(InputError, match="a has 24 bytes, more than there is memory"):
        found["a"].read()


def test_the_most_tensors_are_accepted(tmp_path: Path, monkeypatch) -> None:
    """One more is not, which the table of bad input shows for the real limits."""
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 4)
    a_good_file(tmp_path / "x")
    assert len(read_header(tmp_path / "x")) == 3

    monkeypatch.setattr(safetensors, "MAX_TENSORS", 2)
    with pytest.raises(InputError, match="more than 2 tensors"):
        read_header(tmp_path / "x")


def test_a_key_that_stands_twice_is_refused_though_the_library_takes_it(tmp_path: Path) -> None:
    one = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"x":{one.replace("F32", "I32")},"x":{one}}}'.encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))

    with safe_open(tmp_path / "x", "pt") as file:
        assert list(file.keys()) == ["x"]
    with pytest.raises(InputError, match="the key 'x' appears twice"):
        read_header(tmp_path / "x")


def test_a_file_that_is_not_one_is_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x10" + bytes(30))

    with pytest.raises(InputError):
        read_header(tmp_path / "x")
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x", "pt")


def test_headers_alone_are_read_at_first(tmp_path: Path) -> None:
    """A file of one gigabyte, nearly all of it a hole, is described at once."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [16, 2**24], "data_offsets": [0, 2**30]}})
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + 2**30)

    assert read_header(tmp_path / "x")["x"].shape == (16, 2**24)


@pytest.mark.parametrize("when", ["open", "fill"])
def test_what_a_broken_disk_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    a_good_file(tmp_path / "x")

    def fail(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(*((untrusted.os, "open") if when == "open" else (Untrusted, "fill")), fail)
    with pytest.raises(InputError, match=r"x: cannot be read \(stale file handle\); check"):
        read_header(tmp_path / "x")
