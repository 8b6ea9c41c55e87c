"""What is left of what the clients put beyond the shared rank, and what to call it.

With h = 1 - ρ, the share of energy beyond the shared rank: h_t of the global adapter of round t,
and e_t of the clients of that round that hold more than the shared rank, in their own updates. One
aggregation keeps a_t = h_t / e_t of it, at most 1. What is left after t rounds is

    κ_t = min(1, max(h_t / max(e_1 .. e_t), a_1 · .. · a_t)).

The first term is small when the global adapter holds less than these clients ever brought; the
second when the aggregations, not the training, took it away. Both must be small for a collapse:
clients that grow concentrated by themselves lower h_t but leave a_t near 1, and clients that train
anew each round what the aggregation took keep h_t up however small the product becomes.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.render.report.diagnose import Verdict

#: From good to bad.
VERDICTS: tuple[Verdict, ...] = ("healthy", "at risk", "collapsing", "collapsed")

#: κ at which it is collapsed: nine tenths of what the clients put there are lost.
COLLAPSED = 0.1

#: κ at which it is at risk.
AT_RISK = 0.5

#: Rounds within which a falling κ must reach `COLLAPSED` to be called collapsing.
HORIZON = 10

#: By how much κ must exceed that of the round before to be recovering.
RISING = 1.1

#: The predicted factor of the energy per round at which even a sound adapter is at risk.
RATE_AT_RISK = 0.9


def kept(beyond: Sequence[float | None], brought: Sequence[float | None]) -> list[float | None]:
    """κ by round, from h_t = `beyond` and e_t = `brought`.

    Where nobody held more than the shared rank (e_t None), what was there is that of the round
    before. None where there is no energy, or nothing yet to compare with.

    >>> kept([0.5, 0.25, 0.05], [0.5, 0.5, 0.5])
    [1.0, 0.5, 0.1]
    >>> kept([0.3, 0.1, 0.01], [0.3, 0.1, 0.01])  # the clients themselves
    [1.0, 1.0, 1.0]
    """
    result: list[float | None] = []
    most, product, before = 0.0, 1.0, None
    for h, e in zip(beyond, brought, strict=True):
        reference = before if e is None else e
        if h is None or reference is None:
            result.append(None)
        else:
            most = max(most, reference)
            product *= _fraction(h, reference)
            result.append(max(_fraction(h, most), product))
        before = before if h is None else h
    return result


def judge(
    left: Sequence[float | None], rate: float | None, predicted_gamma: float | None
) -> tuple[Verdict, str]:
    """The verdict and its reason, from κ by round, its fitted factor per round and the predicted γ.

    A collapse is a matter of rounds: one alone, or one in which κ recovers, is at risk at most.
    Raises ValueError where the last κ is None.
    """
    now, before = left[-1], left[-2] if len(left) > 1 else None
    if now is None:
        raise ValueError("nothing tells what is left")
    rising = before is not None and now > RISING * before
    digits = 0 if now >= COLLAPSED else 2
    share = (
        f"{100 * now:.{digits}f} % of the energy share that high-rank clients put beyond the "
        "shared rank is left"
    )
    if now <= COLLAPSED and before is not None and not rising:
        return "collapsed", f"{share}; {100 * COLLAPSED:.0f} % or less is collapsed"
    if rate is not None and not rising and now * rate**HORIZON <= COLLAPSED:
        return "collapsing", (
            f"{share} and shrinks to {rate:.2f} of itself a round; within {HORIZON} rounds it is "
            f"below {100 * COLLAPSED:.0f} %"
        )
    if now <= AT_RISK:
        course = ", and it is recovering" if rising else ""
        return "at risk", f"{share}{course}; {100 * AT_RISK:.0f} % or less is at risk"
    if predicted_gamma is not None and predicted_gamma < RATE_AT_RISK:
        return "at risk", (
            f"{share}, but the weights multiply it by {predicted_gamma:.2g} each round; "
            f"below {RATE_AT_RISK} is at risk"
        )
    return "healthy", share


def _fraction(part: float, whole: float) -> float:
    """part / whole, at most 1, and 1 where there was nothing to keep."""
    return min(1.0, part / whole) if whole > 0 else 1.0
