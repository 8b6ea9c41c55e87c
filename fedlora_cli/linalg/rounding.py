"""Whether two tensors are the same numbers, each rounded to a dtype of its own."""

from __future__ import annotations

import torch
from torch import Tensor

#: From coarse to fine, where numbers are not tiny.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: The spacing of the smallest numbers of float16, which rounds what is smaller to 0. No base models
#: differ by so little, and other dtypes do not show that a number came through float16.
_TINY = 2.0**-24

#: Numbers that are compared at a time, so that no whole tensor is there in float64.
_CHUNK = 1 << 22


def precision(tensor: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every number of the tensor.

    A model that was loaded in bfloat16 and cast to float32 has the numbers of bfloat16.
    """
    for dtype in _DTYPES:
        if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether both may be roundings of the same numbers: of one precision, they are equal but for
    `_TINY`.
    """
    if one.shape != other.shape:
        return False
    precisions = {precision(one), precision(other)}
    error = sum(map(_relative_error, precisions)) if len(precisions) > 1 else 0.0
    a, b = one.flatten(), other.flatten()
    return all(
        _is_near(a[start : start + _CHUNK].double(), b[start : start + _CHUNK].double(), error)
        for start in range(0, a.numel(), _CHUNK)
    )


def _is_near(a: Tensor, b: Tensor, error: float) -> bool:
    return bool(((a - b).abs() <= error * torch.maximum(a.abs(), b.abs()) + _TINY).all())


def _relative_error(dtype: torch.dtype) -> float:
    """The most by which rounding to the dtype moves a number, relative to it."""
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
