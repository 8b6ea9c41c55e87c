"""The PEFT folder of a global adapter, which every PEFT-compatible tool reads the same way."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora_cli.adapters.adapter import FactorLayout, NewAdapter, TensorWriter
from fedlora_cli.errors import OutputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.files.writing import Declared, check_header, declare, write_text
from fedlora_cli.files.writing import writing as write_tensors
from fedlora_cli.formats.peft.config import MAX_BYTES, config_of
from fedlora_cli.formats.peft.experts import joined
from fedlora_cli.formats.peft.loading import check_loading
from fedlora_cli.formats.peft.names import (
    CONFIG,
    ENDINGS,
    PREFIX,
    TOKENS,
    WEIGHTS,
    token_of,
    wrapped,
)
from fedlora_cli.formats.peft.new_config import config_for
from fedlora_cli.formats.shared import as_stored, metadata_of
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def writing(
    adapter: NewAdapter, folder: Location, provenance: Mapping[str, Any]
) -> Iterator[TensorWriter]:
    """Write config and weights into an existing folder; the block writes every module and tensor.

    Configs have patterns only if ranks or alphas differ: some servers ignore patterns. `provenance`
    goes into the metadata of the weights, because PEFT would warn about it in the config. Raises
    OSError, and before anything is written InputError and OutputError as `check_new` does.
    """
    new = _planned(adapter, provenance)
    adapter, ties = new.adapter, new.ties
    content = (*adapter.factors, *adapter.tensors)
    counts = Counter(_stored_in(adapter, ties.get(name, name)) for name in content)
    with write_tensors(folder / WEIGHTS, new.declared, new.metadata) as write:
        waiting: dict[str, dict[str, Factors | Tensor]] = {}

        def put(name: str, content: Factors | Tensor) -> None:
            stored = _stored_in(adapter, ties.get(name, name))
            parts = waiting.setdefault(stored, {})
            parts[name] = content
            if len(parts) == counts[stored]:
                for key, tensor in _stored(adapter, waiting.pop(stored), ties, new.keys).items():
                    write(key, tensor)

        yield put
    write_text(folder / CONFIG, new.config)


def check_new(adapter: NewAdapter, provenance: Mapping[str, Any]) -> None:
    """Raise InputError unless PEFT loads every tensor that `writing` would write, and OutputError
    if the files are too large to be read again.
    """
    new = _planned(adapter, provenance)
    check_header(new.declared, new.metadata)


@dataclass(frozen=True)
class _NewFolder:
    """The text of a config, and the tensors and metadata of its weights; `ties` and `keys` are the
    results of `_ties` and `_tensor_keys`.
    """

    adapter: NewAdapter
    ties: Mapping[str, str]
    keys: Mapping[str, str]
    config: str
    declared: Mapping[str, Declared]
    metadata: Mapping[str, str]


def _planned(adapter: NewAdapter, provenance: Mapping[str, Any]) -> _NewFolder:
    """The folder to be written. Raises InputError and OutputError as `check_new` does."""
    ties = _ties(adapter)
    adapter = _with_equal_ranks(adapter, ties)
    keys = _tensor_keys(adapter)
    fields = config_for(adapter)
    config = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if len(config) > MAX_BYTES:
        found = f"it would have {len(config)} bytes, more than {MAX_BYTES}"
        raise OutputError(CONFIG, found, "adapt fewer modules, or give all one rank and alpha")
    stored = _stored(adapter, {**adapter.factors, **adapter.tensors}, ties, keys)
    declared = {name: declare(tensor) for name, tensor in stored.items()}
    check_loading(fields, {name: tensor.shape for name, tensor in declared.items()})
    config_of(Path(CONFIG), fields)  # the reader's limits apply to the written config, too
    return _NewFolder(adapter, ties, keys, config, declared, metadata_of(provenance))


def _stored_in(adapter: NewAdapter, name: str) -> str:
    """The pair or tensor of the file: experts share a pair, tokens a tensor."""
    if name in adapter.layouts:
        return adapter.layouts[name].pair
    token = token_of(name)
    return name if token is None else token[0]


def _ties(adapter: NewAdapter) -> dict[str, str]:
    """The modules that have the factors of an embedding, with the embedding."""
    known = adapter.factors.keys()
    return {name: source for name, source in adapter.metadata.tied if {name, source} <= known}


def _with_equal_ranks(adapter: NewAdapter, ties: Mapping[str, str]) -> NewAdapter:
    """The adapter with the rank and alpha of the embedding in all modules tied to it."""
    factors = {name: adapter.factors[source].transposed for name, source in ties.items()}
    alphas = {name: adapter.alphas[source] for name, source in ties.items()}
    return replace(
        adapter, factors={**adapter.factors, **factors}, alphas={**adapter.alphas, **alphas}
    )


def _tensor_keys(adapter: NewAdapter) -> dict[str, str]:
    """The names of the full tensors in the file, by their names in the adapter."""
    pairs = {layout.pair for layout in adapter.layouts.values()}
    tokens = {token[0].removesuffix(TOKENS) for token in map(token_of, adapter.tensors) if token}
    return {name: wrapped(name, pairs, tokens) for name in adapter.tensors}


def _stored(
    adapter: NewAdapter,
    content: Mapping[str, Factors | Tensor],
    ties: Mapping[str, str],
    keys: Mapping[str, str],
) -> dict[str, Tensor]:
    """The tensors of the file for these modules and tensors, by key.

    Experts of a pair and rows of tokens are joined; modules tied to an embedding get its factors.
    So `content` must have all experts of a pair, all rows, and the embeddings of ties.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Factors]] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, part in content.items():
        if isinstance(part, Factors):
            layout = adapter.layouts[name]
            source = content[ties[name]] if name in ties else None
            factors = source.transposed if isinstance(source, Factors) else part
            if layout.kind == "experts":
                stored = factors.transposed if layout.turned else factors
                experts.setdefault(layout.pair, {})[layout.expert] = stored
            else:
                tensors |= _pair(layout, factors.B, factors.A)
        elif (token := token_of(name)) is not None:
            rows.setdefault(token[0], {})[token[1]] = part
        else:
            tensors[keys[name]] = part
    for pair, parts in experts.items():
        ordered = [parts[number] for number in sorted(parts)]
        B, A = joined([factors.B for factors in ordered], [factors.A for factors in ordered])
        tensors |= _pair(FactorLayout("experts", pair), B, A)
    for name, tokens in rows.items():
        tensors[name] = torch.stack([tokens[index] for index in sorted(tokens)])
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def _pair(layout: FactorLayout, B: Tensor, A: Tensor) -> dict[str, Tensor]:
    """The two factors under their names in the file."""
    names = (f"{layout.pair}{ending}" for ending in ENDINGS[layout.kind])
    return dict(zip(names, as_stored(layout, B, A), strict=True))


def check(folder: Location) -> None:
    """Raise InputError unless PEFT loads every tensor of the folder."""
    shapes = {name: info.shape for name, info in read_header(folder / WEIGHTS).items()}
    check_loading(read_object(folder / CONFIG), shapes)
