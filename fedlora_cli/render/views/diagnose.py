"""The view of a diagnosis: of an adapter, of clients or of rounds, with the verdict last."""

from __future__ import annotations

from fedlora_cli.render.view import Tone, View, paragraphs
from fedlora_cli.render.views.adapter import adapter_blocks, adapter_summary
from fedlora_cli.render.views.clients import clients_blocks, clients_summary
from fedlora_cli.render.views.rounds import rounds_blocks, rounds_summary
from fedlora_cli.reports.diagnose import DiagnoseReport, Verdict

#: The tones of the verdicts, from good to bad.
TONES: dict[Verdict, Tone] = {
    "healthy": "good",
    "at risk": "warning",
    "collapsing": "bad",
    "collapsed": "bad",
}

#: The headline and the blocks, by subject.
_PARTS = {
    "adapter": (adapter_summary, adapter_blocks),
    "clients": (clients_summary, clients_blocks),
    "rounds": (rounds_summary, rounds_blocks),
}


def diagnose_view(report: DiagnoseReport, *, modules: bool) -> View:
    """The view of a diagnosis; with `modules`, every table has all its rows."""
    summary, blocks = _PARTS[report.subject]
    shared = "unknown" if report.shared_rank is None else report.shared_rank
    headline = f"{summary(report)}, shared rank {shared}"
    known = "no verdict:" if report.verdict is None else f"verdict: {report.verdict};"
    tone = "plain" if report.verdict is None else TONES[report.verdict]
    verdict = paragraphs([f"{known} {report.reason}"], tone)
    subject = report.adapters[0].name if report.subject == "adapter" else report.subject
    paths = [row.path for row in report.adapters]
    source = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    return View(subject, headline, (*blocks(report, whole=modules), *verdict), source)
