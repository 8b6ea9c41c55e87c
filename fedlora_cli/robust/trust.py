"""How far each client is trusted, so that a few of them cannot turn the average.

A rule gives multipliers (K,) in [0, 1] for the clients' samples, from their squared relative
distances (K, K) (`fedlora_cli.robust.distances.relative`) and their samples (K,). Distances compare
only what two clients share. A module or ranks that no other client has are not compared: trust is
bounded by the norm as well (`held_back`), and a weight by `fedlora_cli.methods.weights.capped`.
"""

from __future__ import annotations

from statistics import median_low

import numpy as np

from fedlora_cli.methods.weights import FloatArray

#: The clip that "auto" means, in medians of the norms: an honest client that trained twice as far
#: as the median is left alone, and nobody counts for more than two that did as the median did.
CLIP = 2.0

#: ν, the smallest distance that Weiszfeld divides by. In typical distances between two clients, as
#: all distances here, an honest one is 1/√2 from the mean of many: nearer than ½ is at the median.
SMOOTHING = 0.5

#: Beyond this a client is far, and how far no longer moves where the median is sought. Pairs of
#: different rank have different levels, and a huge update is not as huge at each of them.
FAR = 3.0

#: A client that is trusted less, compared with the one that is trusted most, is left out: float32
#: would not keep what it adds, and a module that it has alone would become too small to be written.
FAINT = 1e-6

#: Weiszfeld stops where the sum of distances changes by no more than this part of it ...
TOLERANCE = 1e-6

#: ... or after as many steps.
ITERATIONS = 32


def multi_krum(distances: FloatArray, samples: FloatArray, f: int) -> FloatArray:
    """1 for the n - f clients with the lowest scores, 0 for the others.

    The score is the sum of the n - f - 2 smallest squared distances to others; of equal scores the
    client that comes first is taken. Raises ValueError unless f >= 0 and n >= 2 f + 3. Source:
    Blanchard et al., NeurIPS 2017, with m = n - f.

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
    """min_j max(ν, d_j) / max(ν, d_k), d_k the distance of client k to the geometric median.

    Samples times trust are then the weights of the median, argmin_v sum_k n_k ‖x_k - v‖. Smoothed
    Weiszfeld from the mean: d_k² = sum_j w_j D_kj - ½ sum_ij w_i w_j D_ij, next w_k ∝ n_k / max(ν,
    d_k). Distances count up to FAR; whoever has a median distance c FAR to all, c > 1, has its
    trust divided by c. Source: RFA, arXiv:1912.13445.

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
        # Distances at levels of their own are of no one space, and may leave less than nothing.
        away = np.sqrt(np.maximum(to_all - weights @ to_all / 2, 0.0))
        smoothed = np.maximum(away, SMOOTHING)
        weights = shares / smoothed / (shares / smoothed).sum()
        total = float(shares @ away)
        if abs(before - total) <= TOLERANCE * total:
            break
        before = total
    trust: FloatArray = smoothed.min() / smoothed
    return trust / np.maximum(np.sqrt(np.median(distances, axis=1)) / FAR, 1.0)


def held_back(trust: FloatArray, norms: FloatArray) -> FloatArray:
    """Trust (K,), but of the largest no more than FAR medians of the norms / norm, and 0 where that
    is less than FAINT of it.

    So trust times norm is bounded for every norm. The median is the lower one of the norms above 0:
    the mean of the middle two would do as the larger of them says, which may be an attacker's.

    >>> held_back(np.array([1.0, 0.5, 1.0, 1.0]), np.array([1.0, 1.0, 30.0, 3e150]))
    array([1. , 0.5, 0.1, 0. ])
    """
    nonzero = norms[norms > 0].tolist()
    limit = FAR * median_low(nonzero) if nonzero else 0.0
    most = trust.max(initial=0.0)
    held = np.minimum(trust, most * clip_factors(norms, limit))
    return np.where(held < FAINT * most, 0.0, held)


def clip_limit(norms: FloatArray) -> float:
    """What "auto" clips at: CLIP times the median of the norms above 0, 0 without any.

    >>> clip_limit(np.array([0.0, 1.0, 2.0, 30.0]))
    4.0
    """
    nonzero = norms[norms > 0]
    return CLIP * float(np.median(nonzero)) if nonzero.size else 0.0


def clip_factors(norms: FloatArray, limit: float) -> FloatArray:
    """min(1, limit / ‖ΔW_k‖), what every update is multiplied by; 1 for a zero update. Shape (K,).

    >>> clip_factors(np.array([0.0, 1.0, 4.0]), limit=2.0)
    array([1. , 1. , 0.5])
    """
    return np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
