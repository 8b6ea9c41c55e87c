"""The tensors that are not factors: heads, biases, token rows, magnitudes, base weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fedlora_cli.adapters.adapter import FullTensor, Module, Role
from fedlora_cli.errors import FaultHandler, catching_faults, raise_fault
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import (
    LORA_BIAS,
    MAGNITUDE,
    OUTPUT,
    TOKENS,
    is_bias,
    is_embedding,
    meaning_of,
    owner_of,
    target_of,
    token_name,
    unwrapped,
)
from fedlora_cli.formats.peft.pairs import WeightsFile
from fedlora_cli.formats.peft.ties import same_weights

if TYPE_CHECKING:
    from torch import Tensor

#: The most embeddings that PEFT stores without wrapping them: the model's input and output.
_MOST_EMBEDDINGS = 2


def roles_of(
    file: WeightsFile,
    others: Mapping[str, TensorInfo],
    pairs: Collection[str],
    on_fault: FaultHandler,
) -> dict[str, Role]:
    """The roles of the tensors that are not factors.

    The config explains most of them; base weights and their copies are recognized by their names
    and values. An unexplained tensor is a fault.
    """
    config = file.config
    targets = {target_of(pair) for pair in pairs}
    roles: dict[str, Role] = {}
    rest: dict[str, TensorInfo] = {}
    for name, info in others.items():
        with catching_faults(on_fault):
            role = _role_by_config(file, name, pairs, targets)
            if role is None:
                rest[name] = info
            else:
                roles[name] = role
    tokens = [name for name, role in roles.items() if role == "token"]
    for name in _tied_rows(tokens, config):
        del roles[name]
    saved = {name: others[name] for name, role in roles.items() if role == "saved"}
    copies: set[str] = set()
    with catching_faults(on_fault):
        if rest and config.known and config.ensure_weight_tying:
            copies = _tied_copies(rest, saved)
    shapes = {name: info.shape for name, info in rest.items() if name not in copies}
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
                raise file.fault(f"{name}: {meaning_of(name)}", cure)
    return {name: roles[name] for name in others if name in roles}


def _role_by_config(
    file: WeightsFile, name: str, pairs: Collection[str], targets: Collection[str]
) -> Role | None:
    """The role that the config gives to a tensor; None without one. Raises InputError."""
    config = file.config
    if owner_of(name, config.modules_to_save) is not None:
        if name.endswith(TOKENS):
            found = f"{name}: trained tokens of a module in modules_to_save"
            raise file.fault(found, "train it one way; PEFT loads no adapter with both")
        return "saved"
    if name.endswith(TOKENS) and config.trainable_tokens:
        return "token"
    roles: tuple[tuple[str, bool, Role], ...] = (
        (MAGNITUDE, config.use_dora, "magnitude"),
        (LORA_BIAS, config.lora_bias, "lora_bias"),
    )
    for ending, wanted, role in roles:
        if wanted and name.endswith(ending):
            module = name.removesuffix(ending)
            if module not in pairs:
                raise file.fault(f"{name} without factors of {module}")
            return role
    return "bias" if is_bias(name, config.bias, targets) else None


def _tied_rows(names: Sequence[str], config: Config) -> list[str]:
    """The trained rows of an output layer that the model ties to its input embedding.

    If the vocabulary was resized, PEFT stores the rows of both, but loads only the rows of the
    embedding that the config names. Without a name, the config means the input embedding.
    """
    if not names:
        return []
    embeddings = {name: target_of(name.removesuffix(TOKENS)) for name in names}
    if "" in config.trainable_tokens:
        tied = [name for name, module in embeddings.items() if module.split(".")[-1] == OUTPUT]
    else:
        tied = [name for name, module in embeddings.items() if not config.token_indices(module)]
    return tied if len(tied) < len(names) else []


def _tied_copies(rest: dict[str, TensorInfo], saved: dict[str, TensorInfo]) -> set[str]:
    """The weights that the config does not name, but the model ties to a module saved in full."""
    weights = {name: info for name, info in (rest | saved).items() if name.endswith(".weight")}
    groups = (names for names in same_weights(weights) if not saved.keys().isdisjoint(names))
    return {name for names in groups for name in names if name in rest}


def _base_weights(shapes: Mapping[str, tuple[int, ...]], wrapped: Collection[str]) -> set[str]:
    """The weights of the base model among these unexplained tensors.

    PEFT stores the weights, and their biases, of embeddings and heads that it has `wrapped`; if the
    vocabulary was resized, also those of the model's input and output embeddings. The latter are
    two at most, lie outside the numbered layers and have any name. A later check of their values,
    which must be equal in all clients, shows that no client trained them. PEFT before 0.21 stores
    with an embedding every tensor whose name begins with that of the embedding.
    """
    matrices = {name: shape[0] for name, shape in shapes.items() if len(shape) > 1}
    rows = {unwrapped(name): count for name, count in matrices.items() if name.endswith(".weight")}
    known = {n for n in rows if _module(n) in wrapped or is_embedding(_module(n))}
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
    """Whether the name begins with an embedding's name and goes on without a dot.

    >>> _begins_like("word_embeddings_layernorm.bias", ("word_embeddings",))
    True
    >>> _begins_like("wte.bias", ("wte",)), _begins_like("wte.0.bias", ("wte",))
    (False, False)
    """
    rests = (name.removeprefix(stem) for stem in embeddings if name.startswith(stem))
    return not _is_numbered(name) and any(not rest.startswith(".") for rest in rests)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_numbered(name: str) -> bool:
    """Whether a tensor lies in a numbered layer."""
    return any(part.isdigit() for part in name.split("."))


def full_tensors(
    file: WeightsFile, name: str, role: Role, info: TensorInfo, modules: Mapping[str, Module]
) -> Iterator[tuple[str, FullTensor]]:
    """The full tensors in one tensor of the file, by name. Raises InputError.

    The names are those of the base model, since clients may have wrapped different modules.
    """
    if role == "token":
        yield from _token_rows(file, name, info)
        return
    owner = None
    if role == "saved":
        # No config names a copy that is tied to a module saved in full: its owner is its module.
        owner = owner_of(name, file.config.modules_to_save) or _module(name)
    if role in ("base", "bias"):
        name = unwrapped(name)
    scale = None
    if role == "lora_bias":
        scale = modules[name.removesuffix(LORA_BIAS)].scale
    yield name, FullTensor(info.shape, info.dtype, role, owner, info.read, scale)


def _token_rows(file: WeightsFile, name: str, info: TensorInfo) -> Iterator[tuple[str, FullTensor]]:
    """One tensor per trained token, so that clients may have trained different tokens.

    Despite the name of the stored tensor, its rows replace those of the embedding.
    """
    indices = file.config.token_indices(target_of(name.removesuffix(TOKENS)))
    if len(info.shape) != 2 or info.shape[0] != len(indices):
        found = f"{name} of shape {list(info.shape)} for {len(indices)} trainable_token_indices"
        raise file.fault(found)
    file.parts.take(len(indices), name, "rows of tokens")
    for row, index in enumerate(indices):
        read = partial(_read_row, info.part(row, 1))
        yield token_name(name, index), FullTensor(info.shape[1:], info.dtype, "token", None, read)


def _read_row(info: TensorInfo, on_fault: FaultHandler = raise_fault) -> Tensor:
    return info.read(on_fault)[0]
