"""Weights that must be refused: what is done to the client `bad`, and what the one line says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from support.damage import (
    Q_A,
    WEIGHTS,
    Damage,
    a_folder,
    a_socket,
    add,
    cut,
    described,
    entry,
    fifo,
    hard_linked,
    header,
    linked,
    outside,
    pickle_only,
    put,
    raw_header,
    raw_weights,
    rename_tensor,
    replace_tensor,
    sparse,
    void,
)

MiB = 1024 * 1024
ONE = described()


def told(metadata: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.update(__metadata__=metadata)


CONTAINERS: dict[str, tuple[Damage, str]] = {
    "empty": (raw_weights(b""), "only 0 bytes long; upload it again"),
    "seven bytes": (raw_weights(b"\1" * 7), "only 7 bytes long"),
    "truncated header": (raw_header("{}", length=500), "a header of 500 bytes"),
    "endless header": (raw_header("{}", length=2**64 - 1), "upload it again"),
    "a header of 100 MB": (sparse(100_000_100, 100_000_001), f"bytes, more than {32 * MiB}"),
    "a header of 33 MiB": (sparse(34 * MiB, 33 * MiB), f"bytes, more than {32 * MiB}"),
    "a million tensors": (
        raw_header("{" + ",".join(f'"{n}":0' for n in range(150_001)) + "}"),
        "more than 150000 tensors",
    ),
    "half a million lists": (
        raw_header('{"x":[' + "[]," * 500_000 + "1]}"),
        "more than 150000 tensors",
    ),
    "tensors behind text": (
        raw_header('{"__metadata__":{"a":"\\\\\\""},"x":[' + "[]," * 500_000 + '"\\\\"]}'),
        "more than 150000 tensors",
    ),
    "a million texts": (
        raw_header('{"x":[' + '"",' * 1_300_000 + '""]}'),
        "more than 150000 tensors",
    ),
    "header is null": (raw_header("null"), "a header that is not JSON"),
    "header is a list": (raw_header("[]"), "a header that is not JSON"),
    "header is broken": (raw_header('{"x":'), "not valid JSON"),
    "header not UTF-8": (raw_header(b'{"\xff":' + ONE.encode() + b"}", 4), "not Unicode text"),
    "header with a mark": (raw_header("\ufeff{}"), "a header that is not JSON"),
    "header after a blank": (raw_header(" {}"), "a header that is not JSON"),
    "header before NUL": (raw_header('{"x":' + ONE + "}\0\0", 4), "is padded with NUL bytes"),
    "header nested deep": (raw_header('{"x":' + "[" * 200_000), "nested too deeply"),
    "bytes added": (add(3), "it is truncated or has bytes added"),
    "an archive added": (
        lambda f: raw_weights((f / WEIGHTS).read_bytes() + b"PK\x05\x06" + bytes(18))(f),
        "it is truncated or has bytes added",
    ),
    "truncated data": (cut(4), "it is truncated or has bytes added"),
    "all data gone": (cut(400), "it is truncated or has bytes added"),
    "a hole": (raw_header(f'{{"x":{described(offsets="[4, 8]")}}}', 8), "a gap or overlap"),
    "an overlap": (entry(data_offsets=[4, 244]), "a gap or overlap"),
    "one range twice": (raw_header(f'{{"x":{ONE},"y":{ONE}}}', 4), "a gap or overlap before y"),
    "a negative offset": (entry(data_offsets=[-240, 0]), "offsets [-240, 0]"),
    "reversed offsets": (entry(data_offsets=[240, 0]), "claims bytes 240 to 0"),
    "offsets with a point": (entry(data_offsets=[0.0, 240.0]), "offsets [0.0, 240.0]"),
    "an offset of 1e26": (entry(data_offsets=[0, 10**26]), "offsets [0, 1000"),
    "three offsets": (entry(data_offsets=[0, 0, 240]), "offsets [0, 0, 240]"),
    "true as a side": (entry(shape=[True, 60]), "has shape [True, 60]"),
    "more numbers than bytes": (entry(shape=[2**24] * 5), "claims bytes"),
    "sides beyond all memory": (entry(shape=[2**33, 2**33]), "has shape [8589934592"),
    "a lying shape": (entry(shape=[20, 3, 2]), "the header does not match"),
    "a giant of nothing": (
        entry(shape=[2**40, 0], data_offsets=[0, 0]),
        "has shape [1099511627776",
    ),
    "nothing times giants": (entry(shape=[0, 2**63, 2**63]), "has shape [0, 9223372036854775808"),
    "no rows": (entry(shape=[0, 20], data_offsets=[0, 0]), "gather the shards"),
    "a side of 4000 digits": (entry(shape=[10**4000, 1]), "has shape [1000"),
    "a hundred sides": (
        replace_tensor(Q_A, torch.ones([1] * 100)),
        "has shape [1, 1, 1, 1, 1, 1, 1, 1, 1]",
    ),
    "a scalar factor": (replace_tensor(Q_A, torch.tensor(1.0)), "has shape []"),
    "a tensor twice": (
        raw_header(f'{{"x":{described("I32")},"x":{ONE}}}', 4),
        "the key 'x' appears twice",
    ),
    "metadata twice": (
        raw_header(f'{{"__metadata__":{{"a":"1","a":"2"}},"x":{ONE}}}', 4),
        "the key 'a' appears twice",
    ),
    "metadata of numbers": (
        header(lambda h: h.update(__metadata__={"a": 1})),
        "is not text to text",
    ),
    "nested metadata": (header(lambda h: h.update(__metadata__={"a": {}})), "is not text to text"),
    "metadata is a list": (header(lambda h: h.update(__metadata__=[])), "is not text to text"),
    "an extra field": (entry(x=1), "not described"),
    "a field missing": (header(lambda h: void(h[Q_A].pop("dtype"))), "not described"),
    "a tensor is a list": (header(lambda h: h.update({Q_A: []})), "not described"),
    **{
        f"dtype {dtype}": (entry(dtype=dtype), f"has dtype {dtype}")
        for dtype in ("F8", "f32", "BOOL", "F8_E4M3", "F4", "C64", "U64")
    },
    "dtype is a list": (entry(dtype=["F32"]), "has dtype ['F32']"),
    **{
        f"a tensor named {name[:12]!r}": (rename_tensor(Q_A, name), "a tensor named ")
        for name in (
            *("\x1b[2J", "a\0b", "a\nb", "\u202eabc", "[link=file:///etc/passwd]x", "a b", "é"),
            *("../../../etc/passwd", "/etc/passwd", "", "x" * MiB),
        )
    },
    "half a surrogate pair in a name": (raw_header(f'{{"\\ud800":{ONE}}}', 4), "not Unicode text"),
    "a FIFO": (fifo, "not a regular file"),
    "a socket": (a_socket, "cannot be read (no such device or address)"),
    "a folder": (a_folder, "not a regular file"),
    "one TiB of nothing": (sparse(2**40), "1099511627776 bytes, more than"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "safetensors: cannot be read (no such"),
    "a pickle": (pickle_only, "adapter_model.bin: a pickle, which is never opened"),
    "a pickle under the wrong name": (raw_weights(b"PK\x03\x04" + bytes(100)), "a pickle, not"),
    "a bare pickle": (raw_weights(b"\x80\x04" + bytes(100)), "a pickle, not"),
    "a Git LFS pointer": (
        raw_weights(b"version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer, not the file; run git lfs pull",
    ),
    "a web page": (raw_weights(b"<!doctype html><html></html>"), "a web page, not safetensors"),
    "shards": (
        lambda f: (
            (f / WEIGHTS).rename(f / "adapter_model-00001-of-00001.safetensors"),
            put(f"{WEIGHTS}.index.json", '{"weight_map": {"x": "../../../etc/passwd"}}')(f),
        ),
        "safetensors: cannot be read (no such",
    ),
}

LINKS: dict[str, tuple[Damage, str]] = {
    **{
        f"weights that are {target}": (
            linked(WEIGHTS, target),
            "a link that leads out of the folder",
        )
        for target in ("/dev/zero", "/dev/stdin", "/etc/passwd", "/proc/self/mem")
    },
    "a sample count from elsewhere": (
        linked("fedlora.json", "/etc/hostname"),
        "fedlora.json: a link that leads out of the folder",
    ),
    "weights of another file system": (
        linked(WEIGHTS, "../../../../../../../../../../etc/passwd"),
        "put the file itself there",
    ),
    "weights that are a link to themselves": (linked(WEIGHTS, WEIGHTS), "cannot be read ("),
    "weights that are a broken link": (linked(WEIGHTS, "gone"), "cannot be read (no such"),
    "weights of another client": (linked(WEIGHTS, f"../good/{WEIGHTS}"), "the same file as"),
    "a hard link to another client's": (hard_linked, "the same file as"),
    "a folder from elsewhere": (outside, "a link that leads out of the folder"),
}
