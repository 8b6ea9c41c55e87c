"""Checks of the updates that functions of methods from outside return."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlora_cli.errors import MethodError
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.sizes import LARGEST, norm
from fedlora_cli.methods.method import Method

Shape = tuple[int, ...]


def merged_update(method: Method, module: str, made: object, shape: tuple[int, int]) -> Factors:
    """The result of a merge as Factors in float64 with scale 1; a tensor, times an identity.

    Raises MethodError for another type or shape, and for values that are not finite.
    """
    if isinstance(made, Tensor):
        return _with_identity(_checked(method, f"update of {module}", made, shape))
    return _factors(method, module, made, shape, "Factors or a tensor")


def compressed_update(
    method: Method, module: str, made: object, shape: tuple[int, int], rank: int
) -> Factors:
    """The result of a compression as Factors in float64 with scale 1.

    Raises MethodError as `merged_update`, and for a rank above `rank`.
    """
    update = _factors(method, module, made, shape, "Factors")
    if update.rank > rank:
        raise _error(method, f"rank {update.rank} for {module} instead of {rank} or less")
    return update


def _factors(
    method: Method, module: str, made: object, shape: tuple[int, int], wanted: str
) -> Factors:
    if not isinstance(made, Factors):
        raise _error(method, f"{type(made).__name__} for {module} instead of {wanted}")
    rank = made.A.shape[0] if isinstance(made.A, Tensor) and made.A.ndim else 0
    B = _checked(method, f"B of {module}", made.B, (shape[0], rank))
    A = _checked(method, f"A of {module}", made.A, (rank, shape[1]))
    if not (isinstance(made.scale, float | int) and math.isfinite(made.scale)):
        raise _error(method, f"the scale {str(made.scale)[:40]} for {module}")
    if rank == 0:  # the zero update, at the smallest rank
        return Factors(B.new_zeros(shape[0], 1), A.new_zeros(1, shape[1]))
    update = Factors(B * made.scale, A)
    if not norm(update) <= LARGEST:  # true for NaN
        raise _error(method, f"an update of {module} that is not finite")
    return update


def _checked(method: Method, name: str, values: object, shape: Shape) -> Tensor:
    """The tensor in float64. Raises MethodError."""
    if not (isinstance(values, Tensor) and values.layout is torch.strided):
        raise _error(method, f"the {name} as {type(values).__name__}, which is no dense tensor")
    if tuple(values.shape) != shape:
        raise _error(method, f"the {name} of shape {tuple(values.shape)} instead of {shape}")
    if not values.is_floating_point():
        raise _error(method, f"the {name} in {values.dtype} instead of floating-point numbers")
    double = values.detach().double()
    if not float(torch.linalg.vector_norm(double)) <= LARGEST:  # true for NaN
        raise _error(method, f"the {name} with a NaN, an infinity or an overflow")
    return double


def _error(method: Method, found: str) -> MethodError:
    return MethodError(method.title, f"it returned {found}", "correct the method")


def _with_identity(update: Tensor) -> Factors:
    """The update as its product with an identity, at the rank of its smaller side."""
    rows, columns = update.shape
    eye = torch.eye(min(rows, columns), dtype=update.dtype, device=update.device)
    return Factors(eye, update) if rows <= columns else Factors(update, eye)
