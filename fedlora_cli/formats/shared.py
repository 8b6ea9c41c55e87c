"""Parts that all formats share: a stored pair of factors to a module and back, and metadata."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fedlora_cli.adapters.adapter import FactorLayout, Kind, Module
from fedlora_cli.adapters.dtypes import widest
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.linalg.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def module_of(
    name: str, B: TensorInfo, A: TensorInfo, alpha: float, scale: float, kind: Kind = "linear"
) -> Module:
    """The module of one pair of factors: a convolution if A has a kernel, else of this kind."""
    layout = FactorLayout(kind, name)
    if len(A.shape) > 2:
        layout = FactorLayout("convolution", name, sides=A.shape[1:])
    return Module(
        shape=(B.shape[0], math.prod(A.shape[1:])),
        rank=A.shape[0],
        alpha=alpha,
        scale=scale,
        dtype=widest([B.dtype, A.dtype]),
        layout=layout,
        infos=(B, A),
        build=partial(_factors_of, scale),
    )


def _factors_of(scale: float, tensors: Sequence[Tensor]) -> Factors:
    B, A = tensors
    return Factors(B.flatten(1), A.flatten(1), scale)


def as_stored(layout: FactorLayout, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """B and A in the shapes of the file: those of a convolution have a kernel."""
    return (
        B.reshape(*B.shape, *(1 for _ in layout.sides[1:])),
        A.reshape(A.shape[0], *(layout.sides or A.shape[1:])),
    )


def metadata_of(provenance: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of every weights file that fedlora writes."""
    return {"format": "pt", "fedlora": json.dumps(provenance, sort_keys=True, allow_nan=False)}


def most_common(values: Mapping[Any, T]) -> T:
    """The most frequent value; of several, the one whose key comes first."""
    return Counter(values[key] for key in sorted(values)).most_common(1)[0][0]


def as_json_number(value: float) -> int | float:
    """An int if the value is whole, as people write alpha."""
    return int(value) if value == int(value) else value
