"""The modules that PEFT ties to the input embedding under `ensure_weight_tying`.

On a model that ties its output layer to its embedding, PEFT trains one update for both, stores it
under both names, and names only the embedding in the config. On other models the field has no
effect, so the contents of the file decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fedlora_cli.errors import InputError
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.names import EMBEDDINGS, is_embedding
from fedlora_cli.formats.peft.pairs import Pair

if TYPE_CHECKING:
    from torch import Tensor

#: The rows that are compared. A few rows may be zero in two embeddings; so many are not, unless
#: both are unused.
_COMPARED_ROWS = 64


def implied_targets(pairs: Mapping[str, Pair], config: Config) -> frozenset[str]:
    """The modules that PEFT adapts as tied to a targeted embedding. Raises InputError."""
    if not _ties_factors(config):
        return frozenset()
    named = {name for name in pairs if config.targets.match(name)}
    shapes = {_shapes(pairs[name]) for name in named if pairs[name].kind == "embedding"} - {None}
    return frozenset(name for name in pairs if name not in named and _shapes(pairs[name]) in shapes)


def tied_modules(
    pairs: Mapping[str, Pair], saved: Mapping[str, TensorInfo], config: Config
) -> tuple[tuple[str, str], ...]:
    """The modules that share the update of an embedding, with the embedding. Raises InputError."""
    if not config.ensure_weight_tying:
        return ()
    factors = _tied_factors(pairs) if _ties_factors(config) else ()
    weights = {name: info for name, info in saved.items() if name.endswith(".weight")}
    full = (
        (name.removesuffix(".weight"), first.removesuffix(".weight"))
        for first, *copies in same_weights(weights)
        for name in copies
    )
    return tuple(sorted({*factors, *full}))


def same_weights(weights: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Groups of names of weights whose first rows have equal values. Raises InputError."""
    alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in sorted(weights):
        info = weights[name]
        if len(info.shape) > 1 and all(info.shape):
            alike.setdefault((info.dtype, info.shape), []).append(name)
    for names in alike.values():
        same: dict[bytes, list[str]] = {}
        for name in names if len(names) > 1 else ():
            info = weights[name]
            first = info.part(0, min(info.shape[0], _COMPARED_ROWS))
            same.setdefault(_bytes(first.read(_pass)), []).append(name)
        yield from (group for group in same.values() if len(group) > 1)


def _ties_factors(config: Config) -> bool:
    """PEFT's rule: the targets include an embedding or output layer that PEFT knows by name."""
    if not config.ensure_weight_tying or any(map(is_embedding, config.modules_to_save)):
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return any(map(config.targets.names, EMBEDDINGS))
    return any(map(is_embedding, targets or ()))


def _tied_factors(pairs: Mapping[str, Pair]) -> Iterator[tuple[str, str]]:
    """The linear layers whose A is the transpose of an embedding's B, with the embedding."""
    embeddings = {name: pair for name, pair in pairs.items() if pair.kind == "embedding"}
    shapes = {_shapes(pair) for pair in embeddings.values()} - {None}
    linear = {n: p for n, p in pairs.items() if p.kind == "linear" and _shapes(p) in shapes}
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
    """The dtype and the shapes of B and A of an embedding; of a linear layer, those that a tied
    embedding would have.
    """
    if pair.sides.keys() != {"A", "B"}:
        return None
    B, A = pair.sides["B"], pair.sides["A"]
    if len(B.shape) != 2 or len(A.shape) != 2:
        return None
    if pair.kind == "linear":
        return A.dtype, A.shape[::-1], B.shape[::-1]
    return B.dtype, B.shape, A.shape


def _bytes(tensor: Tensor) -> bytes:
    """The values as bytes, row by row, for a comparison."""
    import torch

    flat: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return flat


def _pass(fault: InputError) -> None:
    """Ignore values that are not finite: they are a fault when the whole tensor is read."""
