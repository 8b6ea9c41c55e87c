"""Fuzzing the reader of safetensors: what it accepts, the library accepts with the same meaning.

pip install '.[fuzz]' && python tests/fuzz/headers.py -max_total_time=60
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedlora_cli.files", "json"]):
    from fedlora_cli.errors import InputError
    from fedlora_cli.files.safetensors import read_header

from safetensors import deserialize
from tally import Tally

NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}

#: Tokens that one of a valid header is replaced by, or that are put before it.
TOKENS = (
    *'{}[],:"',
    *("0", "1", "4", "24", "-1", "1.0", "1e0", "00", "true", "null", "NaN", str(2**63), str(2**64)),
    *('"a"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"BOOL"', '"f32"'),
    *(" ", "\n", "\0", "\ufeff", '"\\u0061"', '"\\ud800"', '"\x1b"', '""', '"x":'),
)
PIECES = re.compile(r'"[^"]*"|[0-9]+|.', re.DOTALL)

#: What the fuzzer begins with: composed files, and files as they stand.
SEEDS = (
    bytes(range(64)),
    bytes(range(255, 127, -1)),
    b"\xff" + struct.pack("<Q", 54) + b'{"s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} .',
    b"\xff" + struct.pack("<Q", 2) + b"{}",
)


def file_of(data: bytes) -> bytes:
    """A file as it stands, after a first byte of 255; else one that is composed."""
    return data[1:] if data[:1] == b"\xff" else composed(atheris.FuzzedDataProvider(data))


def composed(choices: atheris.FuzzedDataProvider) -> bytes:
    """A valid file, of whose header a few tokens are changed, or none."""
    header, end = {}, 0
    if choices.ConsumeBool():
        header["__metadata__"] = {"format": "pt"}
    for number in range(choices.ConsumeIntInRange(0, 3)):
        dtype = choices.PickValueInList(list(WIDTHS))
        sides = range(choices.ConsumeIntInRange(0, 3))
        shape = [choices.ConsumeIntInRange(1, 3) for _ in sides]
        begin, end = end, end + math.prod(shape) * WIDTHS[dtype]
        key = choices.PickValueInList(["a", "b", "c.d"]) + str(number)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    tokens = PIECES.findall(json.dumps(header))
    for _ in range(choices.ConsumeIntInRange(0, 3)):
        place = choices.ConsumeIntInRange(0, len(tokens) - 1)
        token = choices.PickValueInList([*TOKENS, *tokens])
        tokens[place] = token if choices.ConsumeBool() else token + tokens[place]
    text = "".join(tokens).encode() + b" " * choices.ConsumeIntInRange(0, 8)
    return struct.pack("<Q", len(text)) + text + bytes(end)


def main(folder: Path) -> None:
    tally, path = Tally(), folder / "x.safetensors"

    def check(data: bytes) -> None:
        content = file_of(data)
        path.write_bytes(content)
        try:
            entries = read_header(path)
        except InputError:
            tally.count(accepted=False)
            return
        theirs = {name: (one["dtype"], one["shape"]) for name, one in deserialize(content)}
        ours = {key: (NAMES[one.dtype], list(one.shape)) for key, one in entries.items()}
        assert ours == theirs, (ours, theirs)
        tally.count(accepted=True)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        (corpus / f"{number}").write_bytes(seed)
    words = Path(__file__).with_name("headers.dict")
    atheris.Setup([*sys.argv, str(corpus), f"-dict={words}", "-max_len=512"], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="fedlora-fuzz-")))
