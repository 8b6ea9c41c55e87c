"""Comparison of tensors that may have been rounded to different dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

#: From coarse to fine, for numbers that are not tiny.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: The smallest positive number of float16, which rounds anything smaller to 0. Other dtypes do not
#: show that a number was once a float16, and base models never differ by so little.
_TINY = 2.0**-24

#: Numbers compared at a time, so that no whole tensor is copied to float64.
_CHUNK = 1 << 22


def precision(tensor: Tensor) -> torch.dtype:
    """The coarsest dtype that represents every number of the tensor exactly.

    A model loaded in bfloat16 and cast to float32 has precision bfloat16.
    """
    for dtype in _DTYPES:
        if tensor.is_floating_point() and torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return dtype
    return tensor.dtype


def same_up_to_rounding(first: Tensor, second: Tensor) -> bool:
    """Whether both tensors may be roundings of the same numbers.

    Tensors of the same precision must be equal up to `_TINY`.
    """
    if first.shape != second.shape:
        return False
    precisions = {precision(first), precision(second)}
    error = 0.0
    if len(precisions) > 1:  # the relative errors of both roundings
        error = sum(torch.finfo(dtype).eps / 2 for dtype in precisions if dtype.is_floating_point)
    a, b = first.flatten(), second.flatten()
    return all(
        _is_near(a[start : start + _CHUNK].double(), b[start : start + _CHUNK].double(), error)
        for start in range(0, a.numel(), _CHUNK)
    )


def _is_near(a: Tensor, b: Tensor, error: float) -> bool:
    return bool(((a - b).abs() <= error * torch.maximum(a.abs(), b.abs()) + _TINY).all())
