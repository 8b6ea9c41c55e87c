"""Ways to spoil a client's folder: every one takes the folder and returns nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.adapters import PREFIX

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = f"{PREFIX}layers.0.q_proj"
Q_A, Q_B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"

Damage = Callable[[Path], None]


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def replace_tensor(key: str, tensor: torch.Tensor) -> Damage:
    return lambda folder: set_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def rename_tensor(old: str, new: str) -> Damage:
    return lambda folder: set_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Change the header of the weights, and nothing else."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        raw = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return apply


def entry(**fields: Any) -> Damage:
    """Change what the header says of one tensor."""
    return header(lambda entries: entries[Q_A].update(fields))


def raw_header(text: str | bytes, data: int = 0, *, length: int | None = None) -> Damage:
    """Weights of this header and that many bytes of tensors; its length may be a lie."""
    raw = text if isinstance(text, bytes) else text.encode()
    return raw_weights(
        struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)
    )


def described(
    dtype: str = "F32", shape: str = "[1]", offsets: str = "[0, 4]", more: str = ""
) -> str:
    """What a header says of a tensor, as text."""
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def sparse(size: int, header_length: int | None = None) -> Damage:
    """Weights of that many bytes, which take none on the disk."""

    def apply(folder: Path) -> None:
        if header_length is not None:
            raw_weights(struct.pack("<Q", header_length) + b"{")(folder)
        os.truncate(folder / WEIGHTS, size)

    return apply


def raw_weights(content: bytes) -> Damage:
    return lambda folder: void((folder / WEIGHTS).write_bytes(content))


def raw_config(content: str) -> Damage:
    return lambda folder: void((folder / CONFIG).write_text(content))


def config(**fields: Any) -> Damage:
    return lambda folder: set_config(folder, **fields)


def cut(count: int) -> Damage:
    return lambda folder: raw_weights((folder / WEIGHTS).read_bytes()[:-count])(folder)


def add(count: int) -> Damage:
    return lambda folder: raw_weights((folder / WEIGHTS).read_bytes() + bytes(count))(folder)


def put(name: str, content: str) -> Damage:
    return lambda folder: void((folder / name).write_text(content))


def void(_: object) -> None:
    """Forget a value."""


def special(kind: int) -> Damage:
    """Weights that are a pipe or a socket."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        os.mknod(folder / WEIGHTS, kind | 0o600)

    return apply


fifo, a_socket = special(stat.S_IFIFO), special(stat.S_IFSOCK)


def a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def linked(name: str, target: str) -> Damage:
    """A file that is a link to somewhere else."""

    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return apply


def hard_linked(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.link(folder.with_name("good") / WEIGHTS, folder / WEIGHTS)


def outside(folder: Path) -> None:
    """The client's folder is a link to one that is not among the clients."""
    place = folder.parents[1] / "elsewhere"
    folder.rename(place)
    folder.symlink_to(place)


def twin(one: str, other: str) -> Damage:
    """Two clients whose names are hardly two."""

    def apply(folder: Path) -> None:
        shutil.copytree(folder, folder.with_name(one))
        if folder.name != other:
            folder.rename(folder.with_name(other))

    return apply


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def twice(text: str) -> str:
    """A config in which the rank stands twice."""
    return '{"peft_type": "LORA", "r": 3, "r": 64' + text + "}"


def move_away(folder: Path) -> None:
    shutil.rmtree(folder)


def with_value(value: float) -> Damage:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"][1, 2] = value

    return lambda folder: set_tensors(folder, change)
