"""What PEFT ties to the input embedding under `ensure_weight_tying`, told by what a file holds.

On a model that ties its output layer to its embedding, PEFT gives both one update, stores it under
both names, and names only the embedding in the config. On other models the field does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fedlora_cli.errors import InputError
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import EMBEDDINGS
from fedlora_cli.formats.peft.pairs import Pair

if TYPE_CHECKING:
    from torch import Tensor

#: The first rows may be zero in any two embeddings; so many never are, unless both are unused.
_COMPARED_ROWS = 64


def implied_targets(pairs: Mapping[str, Pair], config: Config) -> frozenset[str]:
    """The modules that PEFT adapts because they are tied to an embedding that the config names.

    Raises InputError.
    """
    if not _ties_factors(config):
        return frozenset()
    named = {name for name in pairs if config.targets.match(name)}
    shapes = {_shapes(pairs[name]) for name in named if pairs[name].kind == "embedding"} - {None}
    return frozenset(name for name in pairs if name not in named and _shapes(pairs[name]) in shapes)


def tied_modules(
    pairs: Mapping[str, Pair], saved: Mapping[str, TensorInfo], config: Config
) -> tuple[tuple[str, str], ...]:
    """The modules whose update is that of an embedding, with the embedding. Raises InputError."""
    if not config.ensure_weight_tying:
        return ()
    factors = _tied_factors(pairs) if _ties_factors(config) else ()
    weights = {name: one for name, one in saved.items() if name.endswith(".weight")}
    whole = (
        (name.removesuffix(".weight"), first.removesuffix(".weight"))
        for first, *copies in same_weights(weights)
        for name in copies
    )
    return tuple(sorted({*factors, *whole}))


def same_weights(weights: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """The names of weights that are the same numbers, together; of those, the first rows tell.

    Raises InputError.
    """
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in sorted(weights):
        entry = weights[name]
        if len(entry.shape) > 1 and all(entry.shape):
            alike.setdefault((entry.dtype, entry.shape), []).append(name)
    for names in alike.values():
        same: dict[bytes, list[str]] = {}
        for name in names if len(names) > 1 else ():
            entry = weights[name]
            first = entry.part(0, min(entry.shape[0], _COMPARED_ROWS))
            same.setdefault(_bytes(first.read(_pass)), []).append(name)
        yield from (found for found in same.values() if len(found) > 1)


def _ties_factors(config: Config) -> bool:
    """PEFT's rule: a name of an embedding or output layer that it knows is among the targets."""
    if not config.ensure_weight_tying or any(map(_is_known, config.modules_to_save)):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return any(map(config.targets.names, EMBEDDINGS))
    return any(map(_is_known, targets or ()))


def _is_known(name: str) -> bool:
    return name.split(".")[-1] in EMBEDDINGS


def _tied_factors(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, str]]:
    """The linear layers whose factors are the transposes of an embedding's. A factor tells."""
    embeddings = {name: one for name, one in pairs.items() if one.kind == "embedding"}
    shapes = {_shapes(one) for one in embeddings.values()} - {None}
    linear = {n: one for n, one in pairs.items() if one.kind == "linear" and _shapes(one) in shapes}
    if not linear:
        return
    sources = {
        _bytes(embeddings[name].sides["B"].read(_pass).T): name
        for name in sorted(embeddings, reverse=True)
        if _shapes(embeddings[name]) in shapes
    }
    for name, pair in linear.items():
        embedding = sources.get(_bytes(pair.sides["A"].read(_pass)))
        if embedding is not None and _shapes(pair) == _shapes(embeddings[embedding]):
            yield name, embedding


def _shapes(pair: Pair) -> tuple[object, ...] | None:
    """The shapes of B and A of an embedding, or of what a linear layer has that is tied to one."""
    if pair.sides.keys() != {"A", "B"}:
        return None
    B, A = pair.sides["B"], pair.sides["A"]
    if len(B.shape) != 2 or len(A.shape) != 2:
        return None
    if pair.kind == "linear":
        return A.dtype, A.shape[::-1], B.shape[::-1]
    return B.dtype, B.shape, A.shape


def _bytes(tensor: Tensor) -> bytes:
    """Its numbers in rows, to be compared."""
    import torch

    flat: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return flat


def _pass(fault: InputError) -> None:
    """Values that are not finite are refused when the whole tensor is read."""
