"""What stands beside the factors in a file: heads, biases, token rows, magnitudes, base weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import FullTensor, Module, Role
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import (
    EMBEDDINGS,
    LORA_BIAS,
    MAGNITUDE,
    OUTPUT,
    TOKENS,
    is_bias,
    meaning_of,
    owner_of,
    target_of,
    token_name,
    unwrapped,
)
from fedlora_cli.formats.peft.parts import Parts
from fedlora_cli.formats.peft.ties import same_weights
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor


#: PEFT stores the model's input and output embeddings, where it stores any that it does not wrap.
_MOST_EMBEDDINGS = 2


def roles_of(
    weights: Location,
    others: Mapping[str, TensorInfo],
    pairs: Collection[str],
    config: Config,
    on_fault: FaultHandler,
) -> dict[str, Role]:
    """What each tensor is that is no factor, beside these pairs of factors.

    First what the config explains, then base weights and copies of them by their place in the
    file. What is not understood goes to `on_fault` by name.
    """
    targets = {target_of(pair) for pair in pairs}
    roles: dict[str, Role] = {}
    rest: dict[str, TensorInfo] = {}
    for name, entry in others.items():
        with catching_faults(on_fault):
            role = _told_by_config(weights, name, pairs, targets, config)
            if role is None:
                rest[name] = entry
            else:
                roles[name] = role
    tokens = [name for name, role in roles.items() if role == "token"]
    for name in _tied_rows(tokens, config):
        del roles[name]
    wholes = {name: others[name] for name, role in roles.items() if role == "saved"}
    copies: set[str] = set()
    with catching_faults(on_fault):
        if rest and config.known and config.ensure_weight_tying:
            copies = _tied_copies(rest, wholes)
    shapes = {name: entry.shape for name, entry in rest.items() if name not in copies}
    base = _base_weights(shapes, {*pairs, *(name.removesuffix(TOKENS) for name in tokens)})
    for name in rest:
        with catching_faults(on_fault):
            if name in copies:
                roles[name] = "saved"
            elif name in base:
                roles[name] = "base"
            elif config.variants:
                raise config.variants[0]
            else:
                cure = "not understood; train plain LoRA"
                raise InputError(weights, f"{name}: {meaning_of(name)}", cure)
    return {name: roles[name] for name in others if name in roles}


def _told_by_config(
    weights: Location, name: str, pairs: Collection[str], targets: Collection[str], config: Config
) -> Role | None:
    """The role that the config gives to a tensor of this name. Raises InputError."""
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
    return "bias" if is_bias(name, config.bias, targets) else None


def _tied_rows(names: Sequence[str], config: Config) -> list[str]:
    """The trained rows of an output layer that are those of the input embedding, to which the model
    ties it: PEFT stores both where the vocabulary was resized, but loads only those that the config
    names. A config that names no embedding means that of the input.
    """
    if not names:
        return []
    embeddings = {name: target_of(name.removesuffix(TOKENS)) for name in names}
    if "" in config.trainable_tokens:
        tied = [name for name, one in embeddings.items() if one.split(".")[-1] == OUTPUT]
    else:
        tied = [name for name, one in embeddings.items() if not config.token_indices(one)]
    return tied if len(tied) < len(names) else []


def _tied_copies(rest: dict[str, TensorInfo], wholes: dict[str, TensorInfo]) -> set[str]:
    """The weights that PEFT stores beside a module saved in full because the model ties them to it.
    The config does not name them.
    """
    weights = {name: one for name, one in (rest | wholes).items() if name.endswith(".weight")}
    together = (names for names in same_weights(weights) if not wholes.keys().isdisjoint(names))
    return {name for names in together for name in names if name in rest}


def _base_weights(shapes: Mapping[str, tuple[int, ...]], wrapped: Collection[str]) -> set[str]:
    """Those of these tensors, which nothing else explains, that are weights of the base model.

    PEFT stores the weights, and a bias beside them, of embeddings and heads that it has `wrapped`,
    and where the vocabulary was resized those of the model's input and output embeddings. These
    have any name; they lie outside the numbered layers and are two at most. That no client trained
    them is checked by their values, which must be the same everywhere. PEFT before 0.21 stores with
    an embedding every tensor whose name begins with that of the embedding.
    """
    matrices = {name: shape[0] for name, shape in shapes.items() if len(shape) > 1}
    rows = {unwrapped(name): count for name, count in matrices.items() if name.endswith(".weight")}
    known = {name for name in rows if _module(name) in wrapped or _is_known(name)}
    other = {name for name in rows.keys() & matrices.keys() - known if not _is_numbered(name)}
    base = known | (other if len(other) <= _MOST_EMBEDDINGS else set())
    biases = {f"{_module(name)}.bias": (rows[name],) for name in base}
    stems = tuple(map(_module, base & shapes.keys()))
    return {
        name
        for name, shape in shapes.items()
        if unwrapped(name) in base
        or biases.get(unwrapped(name)) == shape
        or _begins_like(name, stems)
    }


def _begins_like(name: str, embeddings: tuple[str, ...]) -> bool:
    """Whether a tensor's module is named like one of these embeddings, and longer.

    >>> _begins_like("word_embeddings_layernorm.bias", ("word_embeddings",))
    True
    >>> _begins_like("wte.bias", ("wte",)), _begins_like("wte.0.bias", ("wte",))
    (False, False)
    """
    longer = (name.removeprefix(one) for one in embeddings if name.startswith(one))
    return not _is_numbered(name) and any(not rest.startswith(".") for rest in longer)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_known(name: str) -> bool:
    return _module(name).split(".")[-1] in EMBEDDINGS


def _is_numbered(name: str) -> bool:
    """Whether a tensor lies in a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def full_tensors(
    weights: Location,
    name: str,
    role: Role,
    entry: TensorInfo,
    modules: Mapping[str, Module],
    config: Config,
    parts: Parts,
) -> Iterator[tuple[str, FullTensor]]:
    """What one such tensor holds, by name: the base model's own where PEFT wraps the module, for
    clients may have wrapped different ones. Raises InputError.
    """
    if role == "token":
        yield from _token_rows(weights, name, entry, config, parts)
        return
    owner = None
    if role == "saved":
        # A copy that is tied to a module saved in full is named by no config, and owns itself.
        owner = owner_of(name, config.modules_to_save) or _module(name)
    if role in ("base", "bias"):
        name = unwrapped(name)
    scale = None
    if role == "lora_bias":
        scale = modules[name.removesuffix(LORA_BIAS)].scale
    yield name, FullTensor(entry.shape, entry.dtype, role, owner, entry.read, scale)


def _token_rows(
    weights: Location, name: str, entry: TensorInfo, config: Config, parts: Parts
) -> Iterator[tuple[str, FullTensor]]:
    """Every trained token is a tensor of its own, so that clients may have trained different ones.

    Despite the name of the tensor, its rows replace those of the embedding.
    """
    indices = config.token_indices(target_of(name.removesuffix(TOKENS)))
    if len(entry.shape) != 2 or entry.shape[0] != len(indices):
        found = f"{name} of shape {list(entry.shape)} for {len(indices)} trainable_token_indices"
        raise InputError(weights, found, "save the adapter again, whole")
    parts.take(len(indices), name, "rows of tokens")
    for row, index in enumerate(indices):
        read = partial(_read_row, entry.part(row, 1))
        yield token_name(name, index), FullTensor(entry.shape[1:], entry.dtype, "token", None, read)


def _read_row(entry: TensorInfo, on_fault: FaultHandler = raise_fault) -> Tensor:
    return entry.read(on_fault)[0]
