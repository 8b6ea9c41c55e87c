"""What a simulation found out in words: who diverged, who collapsed, who is ahead beyond noise."""

from __future__ import annotations

import math
import statistics
from typing import get_args

from fedlora_cli.render.report.diagnose import Verdict
from fedlora_cli.render.report.simulate import ArmRow, SimulateReport
from fedlora_cli.render.view import Paragraph, Tone, count, wrapped
from fedlora_cli.render.views.arms import at_rate

#: From good to bad, and how it reads.
_TONES: dict[str, Tone] = dict(
    zip(get_args(Verdict), ("good", "warning", "bad", "bad"), strict=True)
)

#: Student's t with 5 % beyond it on both sides together, by degrees of freedom from 1.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def findings(report: SimulateReport) -> list[Paragraph]:
    """What diverged, the verdicts from good to bad, and the best two arms."""
    return [*_divergences(report), *_verdicts(report), *_lead(report)]


def _divergences(report: SimulateReport) -> list[Paragraph]:
    lines = []
    for row in report.arms:
        if not row.diverged:
            continue
        first, last = min(row.diverged), max(row.diverged)
        when = f"in round {first}" if first == last else f"in rounds {first} to {last}"
        some = len(row.diverged) < row.runs
        who = f"{len(row.diverged)} of {row.runs} diverged" if some else "diverged"
        rest = "; the numbers are those of the others" if some else ""
        lines.append(wrapped(f"{row.arm}{at_rate(report, row)}: {who} {when}{rest}"))
    return [Paragraph("\n".join(lines), "warning")] if lines else []


def _verdicts(report: SimulateReport) -> list[Paragraph]:
    found: dict[str, list[str]] = {verdict: [] for verdict in _TONES}
    for row in report.best:
        for verdict, names in found.items():
            times = row.verdicts.count(verdict)
            if times:
                some = f" ({times} of {row.runs})" if times < row.runs else ""
                names.append(f"{row.arm}{some}")
    everyone = [row.arm for row in report.best]
    return [
        Paragraph(wrapped(f"{verdict}: {_listed(names, everyone)}"), _TONES[verdict])
        for verdict, names in found.items()
        if names
    ]


def _listed(names: list[str], everyone: list[str]) -> str:
    return f"all {len(names)} arms" if names == everyone and len(names) > 1 else ", ".join(names)


def _lead(report: SimulateReport) -> list[Paragraph]:
    """The best two arms, and what their difference is worth."""
    known = [row for row in report.best if row.accuracy.mean is not None]
    if len(known) < 2:
        return []
    first, second = sorted(known, key=lambda row: -(row.accuracy.mean or 0))[:2]
    lead, margin = difference(first, second)
    seeds = count(min(map(_counted, (first, second))), "seed")
    if margin is None:
        text = (
            f"{first.arm} is best and {second.arm} next; with {seeds} nobody can tell whether they "
            "differ by more than noise"
        )
    elif lead > margin:
        text = (
            f"{first.arm} is best, {100 * lead:.1f} points above {second.arm}, which is next "
            f"(± {100 * margin:.1f}, the 95 % interval over {seeds})"
        )
        return [Paragraph(wrapped(text), "good")]
    else:
        text = (
            f"{first.arm} is best and {second.arm} next, but the difference is within the noise of "
            f"{seeds}, which reaches to {100 * margin:.1f} points"
        )
    return [Paragraph(wrapped(text))]


def difference(first: ArmRow, second: ArmRow) -> tuple[float, float | None]:
    """How far the first is ahead, and what chance alone exceeds in 5 of 100 cases only; None where
    nobody knows.

    Seed by seed, where that is known: a seed deals out the same examples to both, and what it does
    to both is no noise between them. Else from the standard errors of the two means.
    """
    pairs = [
        a - b
        for a, b in zip(first.by_seed, second.by_seed, strict=False)
        if a is not None and b is not None
    ]
    if len(pairs) > 1:
        error = statistics.stdev(pairs) / math.sqrt(len(pairs))
        return statistics.fmean(pairs), _student(len(pairs) - 1) * error
    lead = (first.accuracy.mean or 0) - (second.accuracy.mean or 0)
    squares = [
        row.accuracy.sd**2 / _counted(row) for row in (first, second) if row.accuracy.sd is not None
    ]
    if len(squares) < 2:
        return lead, None
    freedom = _counted(first) + _counted(second) - 2
    return lead, _student(freedom) * math.sqrt(sum(squares))


def _counted(row: ArmRow) -> int:
    """The runs that its means are of."""
    return row.runs - len(row.diverged)


def _student(freedom: int) -> float:
    """Student's t at 95 %.

    >>> _student(2), round(_student(30), 2)
    (4.3, 2.04)
    """
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
