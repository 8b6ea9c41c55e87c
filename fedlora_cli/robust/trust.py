"""The trust in each client, so that a few attackers cannot turn the average.

A rule maps squared relative distances (K, K) (`fedlora_cli.robust.distances.relative`) and samples
(K,) to trust (K,) in [0, 1], which multiplies the samples. Distances cover only the modules and
ranks that two clients share. For the rest, `bounded_trust` limits trust by the norm, and
`fedlora_cli.methods.weights.capped` limits a weight.
"""

from __future__ import annotations

import numpy as np

from fedlora_cli.methods.weights import FloatArray
from fedlora_cli.robust.median import lower_median

#: The limit of `--clip-norm auto`, in medians of the norms: an honest client that trained twice as
#: far as the median is not clipped, and no client counts for more than two median clients.
CLIP = 2.0

#: ν, the smallest distance that Weiszfeld divides by, in typical distances between two clients. An
#: honest client is at 1/√2 from the mean of many; below ½ it counts as at the median.
SMOOTHING = 0.5

#: Distances count up to this limit in the search for the median, so that a huge update does not
#: move it. At different ranks a huge update has different distances.
FAR = 3.0

#: Smallest trust, relative to the largest; a client below is left out. Float32 would lose its
#: update, and a module that only this client adapts would become too small to be written.
FAINT = 1e-6

#: Weiszfeld stops once the sum of distances changes by at most this share of it.
TOLERANCE = 1e-6

#: Largest number of Weiszfeld steps.
ITERATIONS = 32


def multi_krum(distances: FloatArray, samples: FloatArray, f: int) -> FloatArray:
    """Trust 1 for the n - f clients with the lowest scores, 0 for the others.

    The score is the sum of the n - f - 2 smallest squared distances to other clients. If scores are
    equal, the earlier client is taken. Raises ValueError unless f >= 0 and n >= 2 f + 3.
    Source: Blanchard et al., NeurIPS 2017, with m = n - f.

    >>> at = np.array([0.0, 1.0, 2.0, 3.0, 100.0])
    >>> multi_krum(np.square(np.subtract.outer(at, at)), np.ones(5), f=1)
    array([1., 1., 1., 1., 0.])
    """
    n = len(samples)
    if f < 0 or n < 2 * f + 3:
        raise ValueError(f"Multi-Krum needs f >= 0 and n >= 2 f + 3, found f = {f} and n = {n}")
    to_others = np.sort(distances[~np.eye(n, dtype=bool)].reshape(n, n - 1), axis=1)
    scores = to_others[:, : n - f - 2].sum(axis=1)
    trust = np.zeros(n)
    trust[np.argsort(scores, kind="stable")[: n - f]] = 1.0
    return trust


def geometric_median(distances: FloatArray, samples: FloatArray) -> FloatArray:
    """Trust min_j max(ν, d_j) / max(ν, d_k), d_k the distance of client k to the geometric median.

    Samples times trust are the weights of the median, argmin_v sum_k n_k ‖x_k - v‖. Smoothed
    Weiszfeld steps start at the mean: d_k² = sum_j w_j D_kj - ½ sum_ij w_i w_j D_ij, and the next
    w_k ∝ n_k / max(ν, d_k). Distances count up to FAR. The trust of a client whose median distance
    to all clients is c · FAR, c > 1, is divided by c. Source: RFA, arXiv:1912.13445.

    >>> alike = 1.0 - np.eye(4)
    >>> alike[3, :3] = alike[:3, 3] = 1e4
    >>> geometric_median(alike, np.array([10.0, 10.0, 10.0, 10.0])).round(3)
    array([1.   , 1.   , 1.   , 0.007])
    """
    near = np.minimum(distances, FAR**2)
    voters = samples if samples.any() else np.ones(len(samples))
    shares = voters / voters.sum()
    weights, before = shares, np.inf
    for _ in range(ITERATIONS):
        to_all = near @ weights
        # Each pair has its own level, so the distances are not Euclidean and may go below 0.
        away = np.sqrt(np.maximum(to_all - weights @ to_all / 2, 0.0))
        smoothed = np.maximum(away, SMOOTHING)
        weights = shares / smoothed / (shares / smoothed).sum()
        total = float(shares @ away)
        if abs(before - total) <= TOLERANCE * total:
            break
        before = total
    trust: FloatArray = smoothed.min() / smoothed
    return trust / np.maximum(np.sqrt(np.median(distances, axis=1)) / FAR, 1.0)


def bounded_trust(trust: FloatArray, norms: FloatArray) -> FloatArray:
    """Trust (K,), limited so that trust times norm is bounded for every norm.

    The limit is the largest trust · FAR · median norm / norm. Below FAINT times the largest trust,
    the result is 0.

    >>> bounded_trust(np.array([1.0, 0.5, 1.0, 1.0]), np.array([1.0, 1.0, 30.0, 3e150]))
    array([1. , 0.5, 0.1, 0. ])
    """
    most = trust.max(initial=0.0)
    bounded = np.minimum(trust, most * clip_factors(norms, FAR * lower_median(norms)))
    return np.where(bounded < FAINT * most, 0.0, bounded)


def clip_limit(norms: FloatArray) -> float:
    """The limit of `--clip-norm auto`: CLIP times the median of the norms above 0; 0 without any.

    >>> clip_limit(np.array([0.0, 1.0, 2.0, 30.0]))
    4.0
    """
    nonzero = norms[norms > 0]
    return CLIP * float(np.median(nonzero)) if nonzero.size else 0.0


def clip_factors(norms: FloatArray, limit: float) -> FloatArray:
    """The factors min(1, limit / ‖ΔW_k‖) for the updates; 1 for a zero update. Shape (K,).

    >>> clip_factors(np.array([0.0, 1.0, 4.0]), limit=2.0)
    array([1. , 1. , 0.5])
    """
    return np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
