"""The view of a diagnosis: of an adapter, of clients or of rounds, with the verdict last."""

from __future__ import annotations

from fedlora_cli.render.view import Paragraph, Tone, View, wrapped
from fedlora_cli.render.views.adapter import adapter_blocks, adapter_summary
from fedlora_cli.render.views.clients import clients_blocks, clients_summary
from fedlora_cli.render.views.rounds import rounds_blocks, rounds_summary
from fedlora_cli.reports.diagnose import DiagnoseReport, Verdict

_TONES: dict[Verdict | None, Tone] = {
    "healthy": "good",
    "at risk": "warning",
    "collapsing": "bad",
    "collapsed": "bad",
    None: "plain",
}


def diagnose_view(report: DiagnoseReport, *, modules: bool) -> View:
    """The view of a diagnosis; with `modules`, every table has all its rows."""
    if report.subject == "clients":
        summary, blocks = clients_summary(report), clients_blocks(report, whole=modules)
    elif report.subject == "rounds":
        summary, blocks = rounds_summary(report), rounds_blocks(report, whole=modules)
    else:
        summary, blocks = adapter_summary(report), adapter_blocks(report, whole=modules)
    known = "no verdict:" if report.verdict is None else f"verdict: {report.verdict};"
    verdict = Paragraph(wrapped(f"{known} {report.reason}"), _TONES[report.verdict])
    subject = report.adapters[0].name if report.subject == "adapter" else report.subject
    paths = [row.path for row in report.adapters]
    source = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    return View(subject, summary, (*blocks, verdict), source)
