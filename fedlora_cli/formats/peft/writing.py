"""A global adapter to a PEFT folder that every PEFT-compatible tool reads the same way."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora_cli.adapters.adapter import (
    AdapterMetadata,
    FactorLayout,
    NewAdapter,
    Selection,
    TensorWriter,
)
from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.files.safetensors import read_header
from fedlora_cli.files.writing import Declared, check_header, declare
from fedlora_cli.files.writing import writing as write_tensors
from fedlora_cli.formats.peft.config import MAX_BYTES, NEW_EXPERTS, config_of
from fedlora_cli.formats.peft.experts import joined
from fedlora_cli.formats.peft.loading import check_loading
from fedlora_cli.formats.peft.names import (
    CONFIG,
    ENDINGS,
    PREFIX,
    TOKENS,
    WEIGHTS,
    target_of,
    token_of,
    wrapped,
)
from fedlora_cli.formats.peft.selection import modules_to_save, patterns, selection, token_indices
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


@contextmanager
def writing(
    adapter: NewAdapter, folder: Path, provenance: Mapping[str, Any]
) -> Iterator[TensorWriter]:
    """Config and weights in an existing folder; the block puts all that `adapter` describes.

    The modules have the names of the clients' configs where these select exactly them, and there
    are patterns only where ranks or alphas differ: what serving engines ignore cannot be misread.
    `provenance` goes into the metadata, not into the config, where PEFT would warn about it. Raises
    OSError, and before anything is written InputError and OutputError as `check_new` does.
    """
    new = _planned(adapter, provenance)
    adapter, ties = new.adapter, new.ties
    content = (*adapter.factors, *adapter.tensors)
    together = Counter(_stored_as(adapter, ties.get(name, name)) for name in content)
    with write_tensors(folder / WEIGHTS, new.declared, new.metadata) as write:
        waiting: dict[str, dict[str, Factors | Tensor]] = {}

        def put(name: str, content: Factors | Tensor) -> None:
            stored = _stored_as(adapter, ties.get(name, name))
            parts = waiting.setdefault(stored, {})
            parts[name] = content
            if len(parts) == together[stored]:
                for key, tensor in _stored(adapter, waiting.pop(stored), ties, new.keys).items():
                    write(key, tensor)

        yield put
    (folder / CONFIG).write_text(new.config, encoding="utf-8")


def check_new(adapter: NewAdapter, provenance: Mapping[str, Any]) -> None:
    """Whether PEFT loads all that `writing` would write, and fedlora can read it again.

    Raises InputError, and OutputError where it is too large.
    """
    new = _planned(adapter, provenance)
    check_header(new.declared, new.metadata)


@dataclass(frozen=True)
class _NewFolder:
    """The text of a config, and the tensors and metadata of the weights beside it. `ties` and
    `keys` are what `_ties` and `_tensor_keys` return.
    """

    adapter: NewAdapter
    ties: Mapping[str, str]
    keys: Mapping[str, str]
    config: str
    declared: Mapping[str, Declared]
    metadata: Mapping[str, str]


def _planned(adapter: NewAdapter, provenance: Mapping[str, Any]) -> _NewFolder:
    """Raises InputError where PEFT would not load all of it, and OutputError where no reader would
    take the config.
    """
    ties = _ties(adapter)
    adapter = _with_equal_ranks(adapter, ties)
    keys = _tensor_keys(adapter)
    fields = _config(adapter)
    config = json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if len(config) > MAX_BYTES:
        found = f"it would have {len(config)} bytes, more than {MAX_BYTES}"
        raise OutputError(CONFIG, found, "adapt fewer modules, or give all one rank and alpha")
    stored = _stored(adapter, {**adapter.factors, **adapter.tensors}, ties, keys)
    declared = {name: declare(one) for name, one in stored.items()}
    check_loading(CONFIG, fields, {name: one.shape for name, one in declared.items()})
    config_of(Path(CONFIG), fields)  # its limits hold for what is written, too
    metadata = {"format": "pt", "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False)}
    return _NewFolder(adapter, ties, keys, config, declared, metadata)


def _stored_as(adapter: NewAdapter, name: str) -> str:
    """What of the file a module or tensor is a part of: experts share a pair, tokens a tensor."""
    if name in adapter.layouts:
        return adapter.layouts[name].pair
    token = token_of(name)
    return name if token is None else token[0]


def _ties(adapter: NewAdapter) -> dict[str, str]:
    """The modules whose factors are those of an embedding, with the embedding."""
    factors = adapter.factors
    return {one: other for one, other in adapter.facts.tied if one in factors and other in factors}


def _with_equal_ranks(adapter: NewAdapter, ties: Mapping[str, str]) -> NewAdapter:
    """The same with the rank and the alpha of the embedding in the modules that are tied to it."""
    factors = {one: adapter.factors[other].transposed for one, other in ties.items()}
    alphas = {one: adapter.alphas[other] for one, other in ties.items()}
    return replace(
        adapter, factors={**adapter.factors, **factors}, alphas={**adapter.alphas, **alphas}
    )


def _tensor_keys(adapter: NewAdapter) -> dict[str, str]:
    """The names under which the file has the full tensors, by their own names."""
    pairs = {layout.pair for layout in adapter.layouts.values()}
    tokens = {token[0].removesuffix(TOKENS) for token in map(token_of, adapter.tensors) if token}
    return {name: wrapped(name, pairs, tokens) for name in adapter.tensors}


def _stored(
    adapter: NewAdapter,
    content: Mapping[str, Factors | Tensor],
    ties: Mapping[str, str],
    keys: Mapping[str, str],
) -> dict[str, Tensor]:
    """Modules and tensors as the file has them: experts of a pair are joined, and rows of tokens;
    what is tied to an embedding has its factors.

    What is joined or tied must be there whole.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Factors]] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for name, one in content.items():
        if isinstance(one, Factors):
            layout = adapter.layouts[name]
            source = content[ties[name]] if name in ties else None
            if isinstance(source, Factors):
                one = source.transposed
            if layout.kind == "experts":
                stored = one.transposed if layout.turned else one
                experts.setdefault(layout.pair, {})[layout.expert] = stored
            else:
                _add(tensors, layout, one.B, one.A)
        elif (token := token_of(name)) is not None:
            rows.setdefault(token[0], {})[token[1]] = one
        else:
            tensors[keys[name]] = one
    for pair, parts in experts.items():
        ordered = [parts[number] for number in sorted(parts)]
        B, A = joined([one.B for one in ordered], [one.A for one in ordered])
        _add(tensors, FactorLayout("experts", pair), B, A)
    for name, tokens in rows.items():
        tensors[name] = torch.stack([tokens[index] for index in sorted(tokens)])
    return {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}


def _add(tensors: dict[str, Tensor], layout: FactorLayout, B: Tensor, A: Tensor) -> None:
    """The two factors under their names, with the sides that a convolution gives them."""
    ending_B, ending_A = ENDINGS[layout.kind]
    kernel = layout.sides[1:]
    tensors[f"{layout.pair}{ending_B}"] = B.reshape(*B.shape, *(1 for _ in kernel))
    tensors[f"{layout.pair}{ending_A}"] = A.reshape(A.shape[0], *(layout.sides or A.shape[1:]))


def config_names(
    layouts: Collection[FactorLayout],
    tensors: Collection[str],
    owners: Collection[str],
    facts: AdapterMetadata,
) -> tuple[Selection, list[str]]:
    """What selects the modules, and `modules_to_save`, of an adapter with these factors and full
    tensors; `owners` are the modules that are saved in full.
    """
    targets = {target_of(layout.pair) for layout in layouts if layout.kind != "experts"}
    known = _known(layouts, tensors)
    return (
        selection(targets, known, facts.selections),
        modules_to_save(owners, known, facts.saved_names),
    )


def _known(layouts: Collection[FactorLayout], tensors: Collection[str]) -> set[str]:
    """The modules of the base model that the names of factors and full tensors tell."""
    owners = {target_of(name.rpartition(".")[0]) for name in tensors}
    return owners | {target_of(layout.pair) for layout in layouts}


def _field(value: str | tuple[T, ...]) -> str | list[T] | None:
    """Names or an expression as JSON has them; null where there are none."""
    return value if isinstance(value, str) else list(value) or None


def _config(adapter: NewAdapter) -> dict[str, Any]:
    """What PEFT needs to apply scale · B A, and nothing that came from a client unread."""
    rank, ranks = patterns(_by_target(adapter, {n: one.rank for n, one in adapter.factors.items()}))
    alpha, alphas = patterns(
        _by_target(adapter, {n: _number(a) for n, a in adapter.alphas.items()})
    )
    facts = adapter.facts
    layouts = adapter.layouts.values()
    selected, saved = config_names(layouts, adapter.tensors, adapter.modules_to_save, facts)
    config: dict[str, Any] = {
        "alpha_pattern": alphas,
        "base_model_name_or_path": facts.base_model,
        "bias": facts.bias,
        "exclude_modules": _field(selected.exclude),
        "fan_in_fan_out": facts.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": _field(selected.layers_pattern),
        "layers_to_transform": _field(selected.layers),
        "lora_alpha": alpha,
        "lora_dropout": facts.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": ranks,
        "revision": facts.revision,
        "target_modules": _field(selected.modules) or [],
        "task_type": facts.task_type,
        "use_dora": facts.dora,
        "use_rslora": facts.rslora,
    }
    tokens: dict[str, list[int]] = {}
    for name in adapter.tensors:
        token = token_of(name)
        if token is not None:
            embedding = target_of(token[0].removesuffix(TOKENS))
            tokens.setdefault(embedding, []).append(token[1])
    written = {*adapter.factors, *adapter.modules_to_save}
    # Older versions of PEFT do not know these fields, so they are written where they say something.
    rare = {
        "auto_mapping": _auto_mapping(facts),
        "lora_bias": facts.lora_bias,
        "ensure_weight_tying": any(written.issuperset(tie) for tie in facts.tied),
        "target_parameters": list(facts.target_parameters),
        "trainable_token_indices": token_indices(
            tokens, _known(layouts, adapter.tensors), facts.token_names
        ),
        "layer_replication": [list(one) for one in facts.layer_replication],
        "alora_invocation_tokens": list(facts.invocation_tokens),
        "peft_version": _experts_version(layouts, facts),
    }
    return config | {name: value for name, value in rare.items() if value}


def _auto_mapping(facts: AdapterMetadata) -> dict[str, str] | None:
    """What tells AutoPeftModel which class to load, where no task does."""
    if facts.task_type is not None or facts.model_class is None:
        return None
    library, _, model_class = facts.model_class.rpartition(".")
    return {"base_model_class": model_class, "parent_library": library}


def _by_target(adapter: NewAdapter, values: Mapping[str, T]) -> dict[tuple[str, ...], T]:
    """The value of every module that the config can give one, by the parts of its name: all in it
    must have the same.

    Raises InputError.
    """
    result: dict[tuple[str, ...], T] = {}
    for name in sorted(adapter.factors):
        layout = adapter.layouts[name]
        target = tuple(map(re.escape, target_of(layout.pair).split(".")))
        if layout.kind == "experts":
            # Whichever of its parameters, where all of them are alike.
            parameter = re.escape(layout.parameter) or "[^.]+"
            target = (*target[:-1], rf"{target[-1]}\.{parameter}")
        if result.setdefault(target, values[name]) != values[name]:
            found = "PEFT has one rank and one alpha for it and what is nested in it"
            raise InputError(name, found, "give all of it one rank")
    return result


def _experts_version(layouts: Iterable[FactorLayout], facts: AdapterMetadata) -> str | None:
    """`peft_version` where it tells how experts are stored: the first that stores them so."""
    has_experts = any(layout.kind == "experts" for layout in layouts)
    return NEW_EXPERTS if has_experts and not facts.old_experts else None


def _number(value: float) -> int | float:
    """A whole number as one, as people write alpha."""
    return int(value) if value == int(value) else value


def check(folder: Path) -> None:
    """Whether PEFT loads all that the folder holds. Raises InputError."""
    shapes = {name: one.shape for name, one in read_header(folder / WEIGHTS).items()}
    check_loading(CONFIG, read_object(folder / CONFIG), shapes)
