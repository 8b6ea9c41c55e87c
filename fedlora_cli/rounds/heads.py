"""The initial values of heads: from the base model, or drawn at random."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.formats.skeleton import Skeleton
from fedlora_cli.linalg.casting import seed_of
from fedlora_cli.text import first_line

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def head_tensors(
    skeleton: Skeleton, base: str, revision: str | None, seed: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of every head, and the heads that were drawn as the model's class draws them.

    Only these tensors of the base model are read. If the base model lacks a tensor of a head, the
    whole head is drawn. Raises InputError.
    """
    sources = _sources(skeleton)
    stored = _stored(base, revision, {name for names in sources.values() for name in names})
    result: dict[str, Tensor] = {}
    drawn = []
    for owner in sorted({owner for _, owner in skeleton.heads.values()}):
        head = {name: meta for name, (meta, one) in skeleton.heads.items() if one == owner}
        tensors = {name: _info(stored, sources[name], meta) for name, meta in head.items()}
        present = {name: info for name, info in tensors.items() if info is not None}
        if len(present) == len(head):
            result |= {name: info.read() for name, info in present.items()}
        else:
            result |= _drawn(skeleton.model, owner, seed)
            drawn.append(owner)
    return result, tuple(drawn)


def _sources(skeleton: Skeleton) -> dict[str, tuple[str, ...]]:
    """The possible names of each head tensor in the base model's files.

    The base model may be saved without its outermost module, or with one more. An output layer that
    is tied to the embeddings is stored under their name.
    """
    prefix = f"{skeleton.model.base_model_prefix}."
    tied = _tied(skeleton.model)
    sources = {}
    for name in skeleton.heads:
        names = [name, tied[name]] if name in tied else [name]
        names += [one.removeprefix(prefix) for one in names] + [prefix + one for one in names]
        sources[name] = tuple(dict.fromkeys(names))
    return sources


def _tied(model: Any) -> dict[str, str]:
    """The name of the output layer's weight with that of the embeddings, if they are tied."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return {}
    output = model.get_output_embeddings()
    if output is None:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    return {f"{names[id(output)]}.weight": f"{names[id(model.get_input_embeddings())]}.weight"}


def _info(
    stored: Mapping[str, TensorInfo], names: Collection[str], meta: Tensor
) -> TensorInfo | None:
    info = next((stored[name] for name in names if name in stored), None)
    return info if info is not None and info.shape == tuple(meta.shape) else None


def _drawn(model: Any, owner: str, seed: int) -> dict[str, Tensor]:
    """A head as its layers and its class initialize it; tensors without a rule are zero."""
    head = model.get_submodule(owner).to_empty(device="cpu").float()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed_of(owner, seed))
        for tensor in (*head.parameters(), *head.buffers()):
            tensor.zero_()
        for module in head.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            model._init_weights(module)
    return {f"{owner}.{name}": tensor for name, tensor in head.state_dict().items()}


def _stored(base: str, revision: str | None, wanted: Collection[str]) -> Mapping[str, TensorInfo]:
    """The headers of these tensors in the base model's weights. Raises InputError."""
    if not wanted:
        return {}
    weights, index = (_file(base, revision, name) for name in (_WEIGHTS, _INDEX))
    if weights is not None:
        return _wanted(weights, wanted)
    if index is not None:
        stored: dict[str, TensorInfo] = {}
        for shard in _shards(index, wanted):
            path = _file(base, revision, shard)
            if path is None:
                raise InputError(index, f"it names the missing file {shard}", "download it")
            stored |= _wanted(path, wanted)
        return stored
    pickle = next((name for name in _PICKLES if _file(base, revision, name)), None)
    if pickle is not None:
        found = f"its weights are in {pickle}, a pickle, which fedlora never opens"
        raise InputError(base, found, "save the base model as safetensors")
    if not Path(base).is_dir():
        raise InputError(base, f"{_WEIGHTS} cannot be downloaded", "download the model beforehand")
    return {}


def _shards(index: Path, wanted: Collection[str]) -> list[str]:
    """The shards of the base model that contain these tensors. Raises InputError."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise InputError(index, "no weight_map in it", "download it again")
    shards = {places[name] for name in wanted if name in places}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            found = f"weight_map names {shard!r:.80}"
            raise InputError(index, found, "it must name files in the same folder")
    return sorted(shards)


def _wanted(path: Path, wanted: Collection[str]) -> dict[str, TensorInfo]:
    """The headers of these tensors; faults of other tensors are ignored."""

    def on_fault(fault: InputError) -> None:
        if any(name in fault.found for name in wanted):
            raise fault

    return {name: entry for name, entry in read_header(path, on_fault).items() if name in wanted}


def _file(base: str, revision: str | None, name: str) -> Path | None:
    """The path of a base model's file, downloaded from the hub if needed; None without the file."""
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
        found = f"{name} cannot be downloaded ({first_line(error)})"
        raise InputError(base, found, "check the name") from None
    return None if path is None else Path(path)
