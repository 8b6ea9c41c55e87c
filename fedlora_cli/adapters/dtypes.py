"""The dtypes of factors, and which of them holds which without loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def widest(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds all of these without loss of range or precision.

    >>> widest(["bfloat16", "bfloat16"]), widest(["bfloat16", "float16"])
    ('bfloat16', 'float32')
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "float64" if "float64" in distinct else "float32"


#: The dtypes of factors, from narrow to wide.
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def majority_dtype(dtypes: Sequence[str], samples: Sequence[float]) -> str:
    """The narrowest dtype that holds the factors of clients with most of the samples without loss.

    A minority of clients cannot change it. If two dtypes have half of the samples each, the result
    holds both. `dtypes` and `samples` have one value per client; if all samples are 0, the clients
    count equally.

    >>> majority_dtype(["float32", "float32", "float64"], [1, 1, 1])
    'float32'
    >>> [majority_dtype(["bfloat16", "float32"], samples) for samples in ([1, 1], [3, 1])]
    ['float32', 'bfloat16']
    """
    votes = samples if any(samples) else [1.0] * len(dtypes)
    pairs = [*zip(dtypes, votes, strict=True)]
    for dtype in _DTYPES:
        covered = sum(vote for sent, vote in pairs if widest((sent, dtype)) == dtype)
        if 2 * covered > sum(votes):
            return dtype
    return widest(dtypes)
