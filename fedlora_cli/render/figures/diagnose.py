"""The figure of a diagnosis: of one adapter, of a cohort of clients, of a series of rounds."""

from __future__ import annotations

from matplotlib.figure import Figure

from fedlora_cli.render.figures.adapter import adapter_figure
from fedlora_cli.render.figures.canvas import literal, look
from fedlora_cli.render.figures.clients import clients_figure
from fedlora_cli.render.figures.rounds import rounds_figure
from fedlora_cli.render.wording import rho
from fedlora_cli.reports.diagnose import DiagnoseReport

_FIGURES = {"adapter": adapter_figure, "clients": clients_figure, "rounds": rounds_figure}


@look()
def diagnose_figure(report: DiagnoseReport) -> Figure:
    """The figure for the subject of the report."""
    return _FIGURES[report.subject](report, _title(report))


def _title(report: DiagnoseReport) -> str:
    """The subject, the verdict and ρ."""
    count = len(report.adapters)
    subject = literal(report.adapters[0].name, 50) if report.adapters else "nothing"
    if report.subject != "adapter":
        noun = report.subject.removesuffix("s") if count == 1 else report.subject
        subject = f"{count} {noun}"
    parts = [subject if report.verdict is None else f"{subject}: {report.verdict}"]
    if report.energy_ratio is not None and report.shared_rank is not None:
        parts.append(f"ρ = {rho(report.energy_ratio)} at the shared rank {report.shared_rank}")
    return ", ".join(parts)
