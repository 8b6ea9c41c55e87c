"""The table of routes: each decomposes a weighted sum of terms by the same call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora_cli.kernels import dense, factored, gram
from fedlora_cli.kernels.cost import BYTES
from fedlora_cli.kernels.dense import Term
from fedlora_cli.kernels.leading import Leading, Unresolved
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.linalg.spectrum import energy


@dataclass(frozen=True, eq=False)
class TermSum:
    """A weighted sum (out, in); `terms` starts a new pass over its terms.

    `compared` if the reference weights of a term may differ from its weights. Otherwise, the
    reference is the sum itself.
    """

    terms: Callable[[], Iterable[Term]]
    shape: tuple[int, int]
    device: str
    compared: bool


@dataclass(frozen=True, eq=False)
class Decomposed:
    """The leading directions of a sum, and the singular values of related updates.

    `reference_s` are the leading singular values under the reference weights, `spectra` those of
    each term that has reference weights.
    """

    leading: Leading
    reference_s: Tensor
    spectra: tuple[Tensor, ...]


#: Decomposes a sum at a rank, for an output in a dtype. Raises Unresolved.
Route = Callable[[TermSum, int, str], Decomposed]


def _gram(total: TermSum, rank: int, dtype: str) -> Decomposed:
    terms = list(total.terms())
    grams = gram.prepare([term.factors for term in terms], dtype)
    return _decomposed(
        total,
        terms,
        lambda weights: gram.leading(grams, weights, rank),
        lambda weights: gram.singular_values(grams, weights, rank),
        lambda k: _term_spectrum(grams, k),
    )


def _factored(total: TermSum, rank: int, dtype: str) -> Decomposed:
    terms = list(total.terms())
    concatenated = factored.prepare([term.factors for term in terms], dtype)
    return _decomposed(
        total,
        terms,
        lambda weights: factored.leading(concatenated, weights, rank, dtype),
        lambda weights: factored.leading(concatenated, weights, rank, dtype, near=math.inf).s,
        lambda k: _spectrum(terms[k].factors, dtype),
    )


def _qr(total: TermSum, rank: int, dtype: str) -> Decomposed:
    terms = list(total.terms())
    prepared = lowrank.orthogonalize([term.factors for term in terms])

    def leading(weights: Tensor) -> Leading:
        svd, s = lowrank.svd(prepared, weights, rank)
        return Leading(svd.U, svd.s, svd.Vh, energy(s.cpu().numpy()), residual=0.0)

    return _decomposed(
        total,
        terms,
        leading,
        lambda weights: lowrank.singular_values(prepared, weights)[:rank],
        lambda k: lowrank.spectrum(terms[k].factors),
    )


def _dense(total: TermSum, rank: int, dtype: str) -> Decomposed:
    # Sums in float32 are exact enough only for an output of 16 bits.
    if BYTES[dtype] == 2:
        with suppress(Unresolved):
            return _dense_in(torch.float32, total, rank, dtype)
    return _dense_in(torch.float64, total, rank, dtype)


def _dense_in(precision: torch.dtype, total: TermSum, rank: int, dtype: str) -> Decomposed:
    spectra: list[Tensor] = []

    def terms() -> Iterator[Term]:
        for term in total.terms():
            if term.reference is not None:
                spectra.append(_spectrum(term.factors, dtype))
            yield term

    matrix, reference = dense.accumulate(
        terms(), total.shape, precision, total.device, reference=total.compared
    )
    leading = dense.leading(matrix, rank, dtype)
    del matrix  # frees memory for the iteration on the second sum
    s = leading.s
    if reference is not None:
        s = dense.leading(reference, rank, dtype, near=math.inf).s
    return Decomposed(leading, s, tuple(spectra))


ROUTES: dict[str, Route] = {"qr": _qr, "gram": _gram, "dense": _dense, "factored": _factored}


def decomposed(route: str, total: TermSum, rank: int, dtype: str) -> tuple[Decomposed, bool]:
    """The result of the route, or of `qr` if the route fails; and whether it is that of `qr`."""
    if route != "qr":
        with suppress(Unresolved):
            return ROUTES[route](total, rank, dtype), False
    return ROUTES["qr"](total, rank, dtype), True


def _decomposed(
    total: TermSum,
    terms: Sequence[Term],
    leading: Callable[[Tensor], Leading],
    singular_values: Callable[[Tensor], Tensor],
    spectrum: Callable[[int], Tensor],
) -> Decomposed:
    weights = torch.cat([term.weights for term in terms])
    reference = torch.cat([term.reference_or_zeros for term in terms])
    result = leading(weights)
    same = not total.compared or torch.equal(reference, weights)
    return Decomposed(
        result,
        result.s if same else singular_values(reference),
        tuple(spectrum(k) for k, term in enumerate(terms) if term.reference is not None),
    )


def _spectrum(factors: Factors, dtype: str) -> Tensor:
    """The singular values of an update, from Gram matrices if an output in `dtype` allows that."""
    if dtype != "float64":
        with suppress(Unresolved):
            return _term_spectrum(gram.prepare([factors], dtype), 0)
    return lowrank.spectrum(factors)


def _term_spectrum(grams: gram.Grams, k: int) -> Tensor:
    with suppress(Unresolved):
        return gram.spectrum(grams, k)
    return lowrank.spectrum(grams.terms[k])
