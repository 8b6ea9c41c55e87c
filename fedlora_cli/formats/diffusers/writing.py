"""The weights file that diffusers loads, from an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapters.adapter import NewAdapter
from fedlora_cli.errors import InputError
from fedlora_cli.formats.diffusers.metadata import fields_for
from fedlora_cli.formats.diffusers.names import (
    ALPHA,
    ENDING_A,
    ENDING_B,
    IN_METADATA,
    IN_TENSORS,
    METADATA,
    NOWHERE,
)
from fedlora_cli.formats.shared import as_stored, metadata_of
from fedlora_cli.formats.single import NewFile, alpha_as_stored, as_header
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor


def new_file(adapter: NewAdapter, provenance: Mapping[str, Any]) -> NewFile:
    """The file, with the alphas in the same place as the clients' files; InputError if these have
    no alphas and an alpha is not the rank.
    """
    source = adapter.metadata.alpha_source
    header = metadata_of(provenance) | as_header(adapter.metadata)
    if source == IN_METADATA:
        fields = fields_for(adapter)
        header[METADATA] = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False)
    if source == NOWHERE:
        for name, factors in adapter.factors.items():
            if adapter.alphas[name] != factors.rank:
                found = f"alpha {adapter.alphas[name]:g} at rank {factors.rank}"
                cure = "leave out --alpha: the clients' files have none, so alpha is the rank"
                raise InputError(name, found, cure)

    def stored(name: str, factors: Factors) -> dict[str, Tensor]:
        B, A = as_stored(adapter.layouts[name], factors.B, factors.A)
        tensors = {name + ENDING_B: B, name + ENDING_A: A}
        if source == IN_TENSORS:
            tensors[name + ALPHA] = alpha_as_stored(adapter.alphas[name])
        return tensors

    return NewFile(adapter, header, stored)
