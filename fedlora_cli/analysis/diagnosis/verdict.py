"""What is left of what the clients put beyond a rank, and what to call it.

Let h_t be the share of energy beyond the rank in the global adapter of round t, and e_t that in the
updates of the clients of that round which hold more than the rank. What is left is measured against
R_t, what these clients would bring if no aggregation had ever taken anything away:

    κ_t = min(1, h_t / R_t),   R_1 = e_1,   R_t = max(e_t, R_{t-1} · min(1, e_t / h_{t-1}))

That is at least what they do bring, and at least what it was before, less what the clients
themselves gave up since they received the last global adapter. Clients that grow concentrated by
themselves lower R_t as well, so that κ_t stays; an aggregation that shrinks what they bring does
not, however small it has become in the meantime.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.reports.diagnose import AT_RISK, COLLAPSED, Verdict

#: From good to bad.
VERDICTS: tuple[Verdict, ...] = ("healthy", "at risk", "collapsing", "collapsed")

#: A share of the energy below which there is nothing to keep: it is what rounding leaves.
NOTHING = 1e-6

#: Rounds within which a falling κ must reach `COLLAPSED` to be called collapsing.
HORIZON = 10

#: The factor of κ per round from which on it is recovering.
RISING = 1.1

#: The least factor of κ per round, and the least share of the first round's κ, that are steady.
STEADY = (0.9, 0.5)

#: The predicted factor of the energy per round at which even a sound adapter is at risk.
RATE_AT_RISK = 0.9


def kept(beyond: Sequence[float | None], brought: Sequence[float | None]) -> list[float | None]:
    """κ by round, from h_t = `beyond` and e_t = `brought`.

    Where nobody held more than the rank (e_t None), what was there is that of the round before.
    None where there is no energy, or nothing yet to compare with.

    >>> kept([0.5, 0.25, 0.05], [0.5, 0.5, 0.25])
    [1.0, 0.5, 0.1]
    >>> kept([0.3, 0.1, 0.01], [0.3, 0.1, 0.01])  # the clients themselves
    [1.0, 1.0, 1.0]
    """
    result: list[float | None] = []
    reference, before = 0.0, None
    for h, e in zip(beyond, brought, strict=True):
        brings = before if e is None else e
        if h is None or brings is None:
            result.append(None)
        else:
            own = 1.0 if not before else min(1.0, brings / before)
            reference = max(brings, reference * own)
            result.append(min(1.0, h / reference) if reference > NOTHING else 1.0)
        before = before if h is None else h
    return result


def judge(
    left: Sequence[float | None], rate: float | None, predicted_gamma: float | None, beyond: int
) -> tuple[Verdict, str]:
    """The verdict and its reason, from κ by round, its fitted factor per round and the predicted γ;
    `beyond` is the rank that all this is about.

    A collapse is a matter of rounds and of weights: at risk at most is one round alone, a κ that
    recovers, and one that is steady from the first round on while the weights keep what is there.
    Raises ValueError where the last κ is None.
    """
    known = [one for one in left if one is not None]
    if not known or left[-1] is None:
        raise ValueError("nothing tells what is left")
    now = known[-1]
    before = known[-2] if len(known) > 1 else now
    # A fit leaves out rounds in which nothing is left, and the last may be one.
    rising = now > 0 and (now > RISING * before if rate is None else rate > RISING)
    fading = predicted_gamma is None or predicted_gamma < RATE_AT_RISK
    holds = now >= STEADY[0] * before if rate is None else rate >= STEADY[0]
    lasts = now > 0 and now >= STEADY[1] * known[0]
    steady = len(known) > 1 and not fading and holds and lasts
    digits = 0 if now >= COLLAPSED else 2
    share = (
        f"{100 * now:.{digits}f} % of the energy share that clients put beyond rank {beyond} is "
        "left"
    )
    if now <= COLLAPSED and len(known) > 1 and not rising and not steady:
        return "collapsed", f"{share}; {100 * COLLAPSED:.0f} % or less is collapsed"
    if now > COLLAPSED and not steady and rate is not None and now * rate**HORIZON <= COLLAPSED:
        return "collapsing", (
            f"{share} and shrinks to {rate:.2f} of itself a round; within {HORIZON} rounds it is "
            f"below {100 * COLLAPSED:.0f} %"
        )
    if now <= AT_RISK:
        course = ""
        if rising:
            course = ", and it is recovering"
        elif steady:
            course = ", steadily: not the weights take it, unlike clients average out"
        return "at risk", f"{share}{course}; {100 * AT_RISK:.0f} % or less is at risk"
    if predicted_gamma is not None and fading:
        return "at risk", (
            f"{share}, but the weights multiply it by {predicted_gamma:.2g} each round; "
            f"below {RATE_AT_RISK} is at risk"
        )
    return "healthy", share
