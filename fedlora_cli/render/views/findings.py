"""The findings of a simulation in sentences: diverged runs, verdicts, and the lead."""

from __future__ import annotations

from typing import get_args

from fedlora_cli.render.view import Paragraph, Tone, count, wrapped
from fedlora_cli.render.views.arms import at_rate
from fedlora_cli.reports.diagnose import Verdict
from fedlora_cli.reports.simulate import SimulateReport

#: The tones of the verdicts, from good to bad.
_TONES: dict[str, Tone] = dict(
    zip(get_args(Verdict), ("good", "warning", "bad", "bad"), strict=True)
)


def findings(report: SimulateReport) -> list[Paragraph]:
    """The diverged runs, the verdicts from good to bad, and the best two arms."""
    return [*_divergences(report), *_verdicts(report), *_lead(report)]


def _divergences(report: SimulateReport) -> list[Paragraph]:
    lines = []
    for row in report.arms:
        if not row.diverged:
            continue
        first, last = min(row.diverged), max(row.diverged)
        when = f"in round {first}" if first == last else f"in rounds {first} to {last}"
        some = len(row.diverged) < row.runs
        runs = f"{len(row.diverged)} of {row.runs} runs" if some else "every run"
        rest = "; its numbers leave these runs out" if some else ""
        lines.append(wrapped(f"{row.arm}{at_rate(report, row)}: {runs} diverged {when}{rest}"))
    return [Paragraph("\n".join(lines), "warning")] if lines else []


def _verdicts(report: SimulateReport) -> list[Paragraph]:
    arms: dict[str, list[str]] = {verdict: [] for verdict in _TONES}
    for row in report.best:
        for verdict, names in arms.items():
            times = row.verdicts.count(verdict)
            if times:
                some = f" ({times} of {row.runs})" if times < row.runs else ""
                names.append(f"{row.arm}{some}")
    all_arms = [row.arm for row in report.best]
    return [
        Paragraph(
            wrapped(
                f"{verdict}: all {len(names)} arms"
                if names == all_arms and len(names) > 1
                else f"{verdict}: {', '.join(names)}"
            ),
            _TONES[verdict],
        )
        for verdict, names in arms.items()
        if names
    ]


def _lead(report: SimulateReport) -> list[Paragraph]:
    """The best two arms, and whether their difference is significant."""
    lead = report.lead
    if lead is None:
        return []
    where = "" if len(report.rates) > 1 else " at this one learning rate"
    best = f"{lead.first} is best{where}"
    seeds = count(lead.seeds, "seed")
    over = f"{seeds} and {report.test_examples} test examples"
    if lead.margin is None:
        text = f"{best}, {lead.second} is next; {seeds} cannot show whether this is more than noise"
    elif lead.points == 0:
        text = f"{lead.first} and {lead.second} are level, over {over}"
    elif lead.significant:
        text = (
            f"{best}, {100 * lead.points:.1f} points above {lead.second}, which is "
            f"next (± {100 * lead.margin:.1f}, the 95 % interval over {over})"
        )
    else:
        text = (
            f"{best} and {lead.second} next, but the difference is within the noise of {over}, "
            f"which reaches {100 * lead.margin:.1f} points"
        )
    return [Paragraph(wrapped(text), "good" if lead.significant else "plain")]
