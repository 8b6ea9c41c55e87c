"""κ, the share of the clients' energy beyond a rank that is left, and the verdict by κ.

Let h_t be the share of energy beyond the rank in the global adapter of round t, and e_t the share
in the updates of that round's clients with a higher rank. κ compares h_t with R_t, the share that
these clients would have if no aggregation had ever lost energy:

    κ_t = min(1, h_t / R_t),   R_1 = e_1,   R_t = max(e_t, R_{t-1} · min(1, e_t / h_{t-1}))

R_t is at least e_t, and at least R_{t-1} less the share that the clients themselves lost in their
training since the last global adapter. Training that concentrates the energy lowers R_t too, so κ_t
stays. An aggregation that loses energy does not lower R_t, so κ_t falls.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.reports.diagnose import Verdict

#: From good to bad.
VERDICTS: tuple[Verdict, ...] = ("healthy", "at risk", "collapsing", "collapsed")

#: κ at or below which nine tenths of the clients' energy is lost, or half of it.
COLLAPSED = 0.1
AT_RISK = 0.5

#: A share of the energy that is only rounding, so that no energy can be lost.
NOTHING = 1e-6

#: The verdict is collapsing if κ reaches `COLLAPSED` within this number of rounds.
HORIZON = 10

#: κ is recovering if its factor per round exceeds this.
RISING = 1.1

#: κ is steady with at least this factor per round and at least this share of the first round's κ.
STEADY = (0.9, 0.5)

#: A healthy adapter is at risk if the predicted factor of its energy per round is below this.
RATE_AT_RISK = 0.9


def kept(beyond: Sequence[float | None], brought: Sequence[float | None]) -> list[float | None]:
    """κ by round, from h_t = `beyond` and e_t = `brought`.

    In a round without clients above the rank (e_t None), h of the round before replaces e_t. κ is
    None without any energy, or without a round to compare with.

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
            training = 1.0 if not before else min(1.0, brings / before)
            reference = max(brings, reference * training)
            result.append(min(1.0, h / reference) if reference > NOTHING else 1.0)
        before = before if h is None else h
    return result


def judge(
    left: Sequence[float | None], rate: float | None, predicted_gamma: float | None, beyond: int
) -> tuple[Verdict, str]:
    """The verdict and its reason, from κ by round, its fitted factor per round and the predicted γ;
    `beyond` is the rank.

    Three cases are at risk at most: a single round, a κ that recovers, and a κ that is steady from
    the first round on while the weights keep the energy. Raises ValueError if the last κ is None.
    """
    known = [value for value in left if value is not None]
    if not known or left[-1] is None:
        raise ValueError("the last κ is unknown")
    now = known[-1]
    before = known[-2] if len(known) > 1 else now
    # The fit ignores rounds with κ = 0, and the last round may be one of them.
    rising = now > 0 and (now > RISING * before if rate is None else rate > RISING)
    fading = predicted_gamma is None or predicted_gamma < RATE_AT_RISK
    holds = now >= STEADY[0] * before if rate is None else rate >= STEADY[0]
    lasts = now > 0 and now >= STEADY[1] * known[0]
    steady = len(known) > 1 and not fading and holds and lasts
    digits = 0 if now >= COLLAPSED else 2
    share = f"{100 * now:.{digits}f} % of the clients' energy share beyond rank {beyond} is left"
    if now <= COLLAPSED and len(known) > 1 and not rising and not steady:
        return "collapsed", f"{share}; {100 * COLLAPSED:.0f} % or less is collapsed"
    if now > COLLAPSED and not steady and rate is not None and now * rate**HORIZON <= COLLAPSED:
        return "collapsing", (
            f"{share}, and each round multiplies it by {rate:.2f}; within {HORIZON} rounds it is "
            f"below {100 * COLLAPSED:.0f} %"
        )
    if now <= AT_RISK:
        course = ""
        if rising:
            course = ", and it is recovering"
        elif steady:
            course = ", and steady: dissimilar updates cancel out; the weights lose no energy"
        return "at risk", f"{share}{course}; {100 * AT_RISK:.0f} % or less is at risk"
    if predicted_gamma is not None and fading:
        return "at risk", (
            f"{share}, but the weights multiply it by {predicted_gamma:.2g} each round; "
            f"below {RATE_AT_RISK} is at risk"
        )
    return "healthy", share
