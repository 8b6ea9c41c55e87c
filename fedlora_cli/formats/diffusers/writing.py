"""An adapter to a file that diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapters.adapter import NewAdapter, TensorWriter
from fedlora_cli.errors import InputError
from fedlora_cli.formats import single
from fedlora_cli.formats.diffusers.metadata import metadata_for
from fedlora_cli.formats.diffusers.names import (
    ALPHA,
    ENDING_A,
    ENDING_B,
    IN_METADATA,
    IN_TENSORS,
    METADATA,
    NOWHERE,
    WEIGHTS,
)
from fedlora_cli.formats.single import NewFile
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor


def writing(
    adapter: NewAdapter, folder: Path, provenance: Mapping[str, Any]
) -> AbstractContextManager[TensorWriter]:
    """The weights file in an existing folder; the block puts all that `adapter` describes.

    Raises OSError, and InputError and OutputError as `check_new` does.
    """
    return _new_file(adapter, provenance).writing(folder / WEIGHTS)


def check_new(adapter: NewAdapter, provenance: Mapping[str, Any]) -> None:
    """Whether the file that `writing` would write could be read again. Raises OutputError, and
    InputError where the clients have no alphas and one is not the rank.
    """
    _new_file(adapter, provenance).check()


def _new_file(adapter: NewAdapter, provenance: Mapping[str, Any]) -> NewFile:
    """Alphas stand where the clients have them. Raises InputError."""
    source = adapter.facts.alpha_source
    metadata = {
        "format": "pt",
        "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False),
        **single.facts_as_metadata(adapter.facts),
    }
    if source == IN_METADATA:
        metadata[METADATA] = json.dumps(
            metadata_for(adapter), indent=2, sort_keys=True, allow_nan=False
        )
    if source == NOWHERE:
        for name, factors in adapter.factors.items():
            if adapter.alphas[name] != factors.rank:
                found = f"alpha {adapter.alphas[name]:g} at rank {factors.rank}"
                cure = "leave out --alpha: the clients' files have none, so that it is the rank"
                raise InputError(name, found, cure)

    def stored(name: str, factors: Factors) -> dict[str, Tensor]:
        B, A = single.as_stored(adapter.layouts[name], factors)
        tensors = {name + ENDING_B: B, name + ENDING_A: A}
        if source == IN_TENSORS:
            tensors[name + ALPHA] = single.alpha_as_stored(adapter.alphas[name])
        return tensors

    return NewFile(adapter, metadata, stored)
