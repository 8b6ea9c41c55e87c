"""The first values of heads: those of the base model, or drawn where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.safetensors import Entry, read_header
from fedlora_cli.rounds.skeleton import Skeleton

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def head_tensors(
    skeleton: Skeleton, base: str, revision: str | None, seed: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of every head, and the heads that were drawn, as the model's class draws them.

    Of the base model's weights only these tensors are read. Raises InputError.
    """
    drawn = _drawn(skeleton, seed)
    fresh = set()
    result: dict[str, Tensor] = {}
    stored = _stored(base, revision, set(skeleton.heads))
    for name, (meta, owner) in skeleton.heads.items():
        entry = stored.get(name)
        if entry is None or entry.shape != tuple(meta.shape):
            fresh.add(owner)
        result[name] = drawn[name] if entry is None else entry.read()
    for name, (_, owner) in skeleton.heads.items():
        # A head is the base model's as a whole or not at all.
        if owner in fresh:
            result[name] = drawn[name]
    return result, tuple(sorted(fresh))


def _drawn(skeleton: Skeleton, seed: int) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner in sorted({owner for _, owner in skeleton.heads.values()}):
            head: Any = skeleton.model.get_submodule(owner).to_empty(device="cpu")
            for module in head.modules():
                skeleton.model._init_weights(module)
            result |= {f"{owner}.{name}": tensor for name, tensor in head.state_dict().items()}
    return result


def _stored(base: str, revision: str | None, wanted: set[str]) -> Mapping[str, Entry]:
    """Where the base model's own weights hold these tensors."""
    if not wanted:
        return {}
    index = _file(base, revision, _INDEX)
    if index is not None:
        places = read_object(index).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(index, "no weight_map in it", "download it again")
        files = {str(places[name]) for name in wanted & set(places)}
    else:
        files = {_WEIGHTS}
    found: dict[str, Entry] = {}
    for file in sorted(files):
        path = _file(base, revision, file)
        if path is not None:
            found |= {name: entry for name, entry in read_header(path).items() if name in wanted}
    pickled = [name for name in _PICKLES if index is None and not _file(base, revision, _WEIGHTS)
               and _file(base, revision, name)]  # fmt: skip
    if pickled:
        found_what = f"its weights are in {pickled[0]}, a pickle, which is never opened"
        raise InputError(base, found_what, "save the base model as safetensors")
    return found


def _file(base: str, revision: str | None, name: str) -> Path | None:
    """A file of the base model, downloaded where it is on the hub; None where there is none."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(
            base,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0][:160]
        raise InputError(base, f"{name} cannot be had ({first})", "check the name") from None
    return None if path is None else Path(path)
