"""Adapters as Flower's records: arrays by name, and the card of an adapter beside them.

The card is a ConfigRecord with the name of the client, the rank, the scaling and the LoRA config as
JSON text. Records from the other side of a network are untrusted.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import parse_object
from fedlora_cli.rounds.state_dict import StateDict

#: The card's name in messages and replies.
CARD = "lora"

#: Limit for the config in a card, in bytes; adapters with a rank for each module have 100 kB.
MAX_CONFIG = 1024 * 1024

#: Dtypes that numpy lacks travel as integers of the same bits; the array names the dtype.
_BITS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8, "float8_e5m2": torch.uint8}

_NUMPY = "numpy.ndarray"
_KINDS = "fiub"  # floats, integers and booleans; numpy's other kinds are no tensors


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays of the same names, bfloat16 included.

    >>> record = to_record({"head": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)})
    >>> record["head"].dtype, to_tensors(record)["head"]
    ('bfloat16', tensor([1., 2.], dtype=torch.bfloat16))
    """
    return ArrayRecord({name: _array(tensor) for name, tensor in tensors.items()})


def to_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """The arrays as tensors of the same names. Raises InputError."""
    return {name: tensor.clone() for name, tensor in views(record).items()}


def views(record: ArrayRecord) -> dict[str, Tensor]:
    """`to_tensors` without a copy: the tensors share the record's memory and must not change."""
    return {name: _view(name, array) for name, array in record.items()}


def card(state: StateDict, **more: str | bool) -> ConfigRecord:
    """The card of an adapter. The base model's path stays on this machine."""
    config = {**state.config, "base_model_name_or_path": None}
    text = json.dumps(config, sort_keys=True)
    return ConfigRecord({"rank": state.rank, "scaling": state.scaling, "config": text, **more})


def config_in(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The LoRA config in a card. Raises InputError."""
    text = record.get("config")
    if not isinstance(text, str):
        raise InputError(where, "no LoRA config in the card", "reply with adapter_records")
    content = text.encode("utf-8", "surrogatepass")
    if len(content) > MAX_CONFIG:
        found = f"a LoRA config of {len(content)} bytes, more than {MAX_CONFIG}"
        raise InputError(where, found, "check this client")
    return parse_object(content, where)


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _BITS:
        return Array(tensor.numpy())
    array = Array(tensor.view(_BITS[dtype]).numpy())
    return Array(dtype=dtype, shape=array.shape, stype=array.stype, data=array.data)


def _view(name: str, array: Array) -> Tensor:
    """A tensor over the bytes that `numpy.save` wrote. Raises InputError."""
    if array.stype != _NUMPY:
        raise InputError(name, f"serialized as {array.stype}", "send tensors by to_record")
    try:
        stream = io.BytesIO(array.data)
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("not version 1.0 of numpy's format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.kind not in _KINDS or not dtype.isnative:
            raise ValueError(f"its dtype is {dtype}")
        if len(array.data) - stream.tell() != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(array.data)} bytes for {dtype} of shape {shape}")
        values = np.frombuffer(array.data, dtype, offset=stream.tell())
        values = values.reshape(shape, order="F" if fortran else "C")
        with warnings.catch_warnings():  # the bytes are not writable
            warnings.simplefilter("ignore", UserWarning)
            tensor = torch.from_numpy(values)
        bits = _BITS.get(array.dtype)
        if bits not in (None, tensor.dtype):
            raise ValueError(f"{dtype} as {array.dtype}")
        return tensor if bits is None else tensor.view(getattr(torch, array.dtype))
    except (ValueError, TypeError, OverflowError, EOFError) as error:
        raise InputError(name, f"no array ({error})", "send tensors by to_record") from None
