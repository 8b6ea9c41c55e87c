"""The findings of a simulation in sentences: diverged runs, verdicts, and the lead."""

from __future__ import annotations

from fedlora_cli.render.view import Paragraph, paragraphs
from fedlora_cli.render.views.arms import at_rate
from fedlora_cli.render.views.diagnose import TONES
from fedlora_cli.render.wording import count
from fedlora_cli.reports.simulate import SimulateReport


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
        lines.append(f"{row.arm}{at_rate(report, row)}: {runs} diverged {when}{rest}")
    return paragraphs(lines, "warning")


def _verdicts(report: SimulateReport) -> list[Paragraph]:
    blocks: list[Paragraph] = []
    for verdict, tone in TONES.items():
        names = []
        for row in report.best:
            times = row.verdicts.count(verdict)
            if times:
                some = f" ({times} of {row.runs})" if times < row.runs else ""
                names.append(f"{row.arm}{some}")
        every = len(names) > 1 and names == [row.arm for row in report.best]
        shown = f"all {len(names)} arms" if every else ", ".join(names)
        blocks += paragraphs([f"{verdict}: {shown}"] if names else [], tone)
    return blocks


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
    return paragraphs([text], "good" if lead.significant else "plain")
