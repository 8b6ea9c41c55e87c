"""What every route answers with, and how near to the truth it has to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError as NotSolved  # type: ignore[attr-defined]

from fedlora_cli.linalg import lowrank

#: How far an answer may be from the best approximation of its rank, relative to ‖ΔW‖_F, for an
#: output of that dtype: well below its rounding for 16 bits, and for float32 below the four
#: roundings (4.8e-7) that `--verify` allows.
TOLERANCES = {"float64": 1e-13, "float32": 4e-7, "float16": 5e-5, "bfloat16": 5e-4}

#: The smallest diagonal entry of a Cholesky factor, of columns of length one, at which they count
#: as near orthogonal: their condition squared then costs two digits of sixteen.
NEAR = 0.1


class Unresolved(ArithmeticError):
    """A route cannot hold its error bar on some input; `lowrank.orthogonalize` can. Says why."""


@contextmanager
def solvable() -> Iterator[None]:
    """What LAPACK cannot decompose is Unresolved too: in float32 it gives up on some matrices whose
    entries have underflowed.
    """
    try:
        yield
    except NotSolved as error:
        raise Unresolved(str(error)) from None


@dataclass(frozen=True, eq=False)
class Leading:
    """U diag(s) Vh, the best approximation of its rank to an update within `residual` of ΔW.

    `U` (out, k) and `Vh` (k, in) are orthonormal in float32 or float64, `s` (k,) descending in
    float64; k is less than what was asked for where the rest is rounding. The largest entry of
    every column of U is positive. `energy` is ‖ΔW‖_F² and `residual` is measured:
    sqrt(sum_i ‖ΔWᵀ u_i - s_i v_i‖² + ‖ΔW v_i - s_i u_i‖²), the second part zero but for rounding.
    So (U, s, Vh) are exact singular triplets of ΔW + E, ‖E‖_F <= `residual`: LAPACK's kind of
    promise. How far a direction moves under E depends on the gaps between singular values.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    energy: float
    residual: float

    @property
    def missed(self) -> float:
        """The energy that the directions leave out: ‖ΔW‖² - sum s²."""
        return max(self.energy - float(self.s.square().sum()), 0.0)


def nothing(shape: tuple[int, int], like: Tensor) -> Leading:
    """The leading directions of a zero update: none."""
    out_features, in_features = shape
    s = torch.zeros(0, dtype=torch.float64, device=like.device)
    return Leading(like.new_zeros(out_features, 0), s, like.new_zeros(0, in_features), 0.0, 0.0)


def oriented(U: Tensor, s: Tensor, V: Tensor, energy: float, residual: float) -> Leading:
    """The answer from U and V (in, k), its signs as `lowrank.Svd` has them."""
    sign = lowrank.signs(U)
    return Leading(U * sign, s, (V * sign).T, energy, residual)


def ritz(V: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of ΔW V Vᵀ, given an orthonormal V (in, p) and its image ΔW V (out, p).

    The small SVD is in float64, so that no digits are lost beyond those of the image.
    """
    Q, T = orthonormal(image)
    u, s, vh = torch.linalg.svd(T)
    return Q @ u.to(Q), s, V @ vh.T.to(V)


def orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """Q T = X (n, p), Q orthonormal in X's dtype, T (p, p) in float64; p <= n.

    By Cholesky of the Gram matrix in float64 where the columns are near orthogonal, else by QR
    first. Householder's QR alone leaves QᵀQ 2e-6 from I at 4096 × 64 in float32; what this leaves,
    4e-7, is the rounding of Q's entries. Raises Unresolved where X is not finite.
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
