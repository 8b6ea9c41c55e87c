"""The result of every route, its tolerances, and the helpers that routes share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError as NotSolved  # type: ignore[attr-defined]

from fedlora_cli.linalg import lowrank

#: Largest distance from the best approximation, relative to ‖ΔW‖_F, by the output's dtype. For 16
#: bits it is well below the rounding of the output; for float32 it is below the eight unit
#: roundoffs (4.8e-7) that `--verify` allows.
TOLERANCES = {"float64": 1e-13, "float32": 4e-7, "float16": 5e-5, "bfloat16": 5e-4}

#: Columns of length one are nearly orthogonal if the diagonal of their Cholesky factor is above
#: this. The squared condition number then costs two of sixteen digits.
NEAR = 0.1


class Unresolved(ArithmeticError):
    """The route cannot reach its tolerance on this input; the route `qr` can."""


@contextmanager
def solvable() -> Iterator[None]:
    """Raises Unresolved if LAPACK fails: in float32 it fails on some matrices with underflows."""
    try:
        yield
    except NotSolved as error:
        raise Unresolved(str(error)) from None


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading directions U diag(s) Vh of ΔW, with their measured residual.

    - `U` (out, k) and `Vh` (k, in): orthonormal, in float32 or float64. The largest entry of every
      column of U is positive. k is below the wanted rank if further directions are rounding.
    - `s` (k,): descending, in float64.
    - `energy`: ‖ΔW‖_F². `residual`: sqrt(sum_i ‖ΔWᵀ u_i - s_i v_i‖²); ΔW v_i = s_i u_i up to
      rounding.

    So (U, s, Vh) are exact singular triplets of some ΔW + E with ‖E‖_F <= `residual`, as LAPACK's
    are. How far E moves a direction depends on the gaps between singular values.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    energy: float
    residual: float


def nothing(shape: tuple[int, int], like: Tensor) -> Leading:
    """The result for a zero update, which has no directions."""
    out_features, in_features = shape
    s = torch.zeros(0, dtype=torch.float64, device=like.device)
    return Leading(like.new_zeros(out_features, 0), s, like.new_zeros(0, in_features), 0.0, 0.0)


def oriented(U: Tensor, s: Tensor, V: Tensor, energy: float, residual: float) -> Leading:
    """The result from U and V (in, k), with the signs of `lowrank.Svd`."""
    sign = lowrank.signs(U)
    return Leading(U * sign, s, (V * sign).T, energy, residual)


def ritz(V: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of ΔW V Vᵀ, from an orthonormal V (in, p) and its image ΔW V (out, p).

    The small SVD is in float64, so that only the image limits the precision.
    """
    Q, T = orthonormal(image)
    u, s, vh = torch.linalg.svd(T)
    return Q @ u.to(Q), s, V @ vh.T.to(V)


def orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q and T with Q T = X (n, p), Q orthonormal in X's dtype, T (p, p) in float64; p <= n.

    Uses Cholesky of the Gram matrix in float64 if the columns are nearly orthogonal, else QR first.
    For 4096 × 64 in float32, QᵀQ is 4e-7 from I, the rounding of Q's entries; by QR alone it is
    2e-6. Raises Unresolved if X is not finite.
    """
    double = X.double()
    lengths = torch.linalg.vector_norm(double, dim=0)
    if not bool(torch.isfinite(lengths).all()):
        raise Unresolved("products leave the range of their precision")
    inverse = torch.where(lengths > 0, 1 / lengths, 0.0)
    C, failed = torch.linalg.cholesky_ex((double.T @ double) * inverse * inverse[:, None])
    if failed or not bool((C.diagonal() > NEAR).all()):
        Q, T = torch.linalg.qr(X)
        Q, correction = orthonormal(Q)
        return Q, correction @ T.double()
    identity = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
    turned = torch.linalg.solve_triangular(C.T, identity, upper=True)
    return X @ (inverse[:, None] * turned).to(X), C.T * lengths
