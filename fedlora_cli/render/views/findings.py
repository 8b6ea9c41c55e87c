"""What a simulation found out in words: who diverged, who collapsed, who is ahead beyond noise."""

from __future__ import annotations

import math
import statistics
from typing import get_args

from fedlora_cli.render.view import Paragraph, Tone, count, wrapped
from fedlora_cli.render.views.arms import at_rate
from fedlora_cli.reports.diagnose import Verdict
from fedlora_cli.reports.simulate import ArmRow, SimulateReport

#: From good to bad, and how it reads.
_TONES: dict[str, Tone] = dict(
    zip(get_args(Verdict), ("good", "warning", "bad", "bad"), strict=True)
)

#: Fewer tell nothing of their spread.
_LEAST_SEEDS = 3

#: The normal deviate, and Student's t by degrees of freedom from 1: 5 % lie beyond, on both sides.
_NORMAL = 1.96
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
    # What diverges in some runs is behind what never does, whatever the others came to.
    ordered = sorted(known, key=lambda row: (len(row.diverged), -(row.accuracy.mean or 0)))
    first, second = ordered[:2]
    lead, margin, seeds = difference(first, second, report.test_examples)
    where = "" if len(report.rates) > 1 else " at this one learning rate"
    over = f"{count(seeds, 'seed')} and {report.test_examples} test examples"
    if margin is None:
        text = (
            f"{first.arm} is best{where} and {second.arm} next; with {count(seeds, 'seed')} nobody "
            "can tell whether they differ by more than noise"
        )
    elif lead == 0:
        text = f"{first.arm} and {second.arm} are level, over {over}"
    elif lead > margin:
        text = (
            f"{first.arm} is best{where}, {100 * lead:.1f} points above {second.arm}, which is "
            f"next (± {100 * margin:.1f}, the 95 % interval over {over})"
        )
        return [Paragraph(wrapped(text), "good")]
    else:
        text = (
            f"{first.arm} is best{where} and {second.arm} next, but the difference is within the "
            f"noise of {over}, which reaches to {100 * margin:.1f} points"
        )
    return [Paragraph(wrapped(text))]


def difference(first: ArmRow, second: ArmRow, examples: int) -> tuple[float, float | None, int]:
    """How far the first is ahead, what chance alone exceeds in 5 of 100 cases only, None where
    nobody knows, and the number of seeds that both rest on.

    Seed by seed where both ended: a seed deals out the same training examples to both, and what it
    does to both is no noise between them. All seeds share the test examples, and no number of seeds
    makes up for few of those: the margin is at least that of two shares of so many.
    """
    pairs = [
        (a, b)
        for a, b in zip(first.by_seed, second.by_seed, strict=False)
        if a is not None and b is not None
    ]
    if len(pairs) < _LEAST_SEEDS:
        return (first.accuracy.mean or 0) - (second.accuracy.mean or 0), None, len(pairs)
    differences = [a - b for a, b in pairs]
    error = statistics.stdev(differences) / math.sqrt(len(pairs))
    shares = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    sampled = math.sqrt(sum(share * (1 - share) for share in shares) / examples)
    margin = max(_student(len(pairs) - 1) * error, _NORMAL * sampled)
    return statistics.fmean(differences), margin, len(pairs)


def _student(freedom: int) -> float:
    """Student's t at 95 %.

    >>> _student(2), round(_student(30), 2)
    (4.3, 2.04)
    """
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.5 / freedom
