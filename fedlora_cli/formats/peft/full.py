"""What stands beside the factors in a file: heads, biases, token rows, magnitudes, base weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapter import FullTensor, Module, Role
from fedlora_cli.errors import InputError, Report, refuse
from fedlora_cli.files.entries import Entry
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import (
    LORA_BIAS,
    MAGNITUDE,
    TOKENS,
    is_base_weight,
    is_bias,
    meaning_of,
    owner_of,
    target_of,
    token_name,
)
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


def role_of(
    weights: Location, name: str, pairs: Collection[str], targets: Collection[str], config: Config
) -> Role:
    """What a tensor is beside these pairs of factors, which adapt the modules `targets`.

    What is not understood is refused by name.

    Raises InputError.
    """
    if owner_of(name, config.modules_to_save) is not None:
        if name.endswith(TOKENS):
            found = f"{name}: trained tokens of a module that modules_to_save names"
            raise InputError(weights, found, "train it one way; PEFT loads no adapter with both")
        return "saved"
    if name.endswith(TOKENS) and config.has_tokens:
        return "token"
    roles: tuple[tuple[str, bool, Role], ...] = (
        (MAGNITUDE, config.use_dora, "magnitude"),
        (LORA_BIAS, config.lora_bias, "lora_bias"),
    )
    for ending, wanted, role in roles:
        if wanted and name.endswith(ending):
            module = name.removesuffix(ending)
            if module not in pairs:
                found = f"{name}, but no factors of {module}"
                raise InputError(weights, found, "save the adapter again, whole")
            return role
    if is_bias(name, config.bias, targets):
        return "bias"
    if is_base_weight(name, pairs):
        return "base"
    if config.variants:
        raise config.variants[0]
    raise InputError(weights, f"{name}: {meaning_of(name)}", "not understood; train plain LoRA")


def full_tensors(
    weights: Location,
    name: str,
    role: Role,
    entry: Entry,
    modules: Mapping[str, Module],
    config: Config,
) -> Iterator[tuple[str, FullTensor]]:
    """What one such tensor holds, by name. Raises InputError."""
    if role == "token":
        yield from _token_rows(weights, name, entry, config)
        return
    owner = owner_of(name, config.modules_to_save)
    scale = None
    if role == "lora_bias":
        scale = modules[name.removesuffix(LORA_BIAS)].scale
    yield name, FullTensor(entry.shape, entry.dtype, role, owner, entry.read, scale)


def _token_rows(
    weights: Location, name: str, entry: Entry, config: Config
) -> Iterator[tuple[str, FullTensor]]:
    """Every trained token is a tensor of its own, so that clients may have trained different ones.

    Despite the name of the tensor, its rows replace those of the embedding.
    """
    indices = config.token_indices(target_of(name.removesuffix(TOKENS)))
    if len(entry.shape) != 2 or entry.shape[0] != len(indices):
        found = f"{name} of shape {list(entry.shape)} for {len(indices)} trainable_token_indices"
        raise InputError(weights, found, "save the adapter again, whole")
    for row, index in enumerate(indices):
        read = partial(_read_row, entry.part(row, 1))
        yield token_name(name, index), FullTensor(entry.shape[1:], entry.dtype, "token", None, read)


def _read_row(entry: Entry, report: Report = refuse) -> Tensor:
    return entry.read(report)[0]
