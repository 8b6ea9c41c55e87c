"""The view of a comparison: the table of methods, and the distances between their updates."""

from __future__ import annotations

from fedlora_cli.render.view import Fields, Table, View, matrix, paragraphs, table
from fedlora_cli.render.wording import count, number, ranks_text, rho, share
from fedlora_cli.reports.compare import CompareReport, MethodRow


def compare_view(report: CompareReport) -> View:
    """The table of methods, the matrix of their distances, and why other methods cannot run."""
    able = [(m, row) for m, row in enumerate(report.methods) if row.refused is None]
    refused = [f"{row.name} cannot run: {row.refused}" for row in report.methods if row.refused]
    distributions = report.distributions or {}
    installed = [f"{name} is installed by {origin}" for name, origin in distributions.items()]
    return View(
        "compare",
        f"{count(len(report.ranks), 'client')} of {ranks_text(report.ranks)}, "
        f"{count(report.modules, 'module')}, shared rank {report.shared_rank}",
        (
            table([row for _, row in able], _METHOD_FIELDS, shown=None),
            _distances(report, able),
            *paragraphs(refused, "warning"),
            *paragraphs(installed),
        ),
    )


_METHOD_FIELDS: Fields[MethodRow] = (
    ("method", "name", lambda row: row.name),
    ("rank", "number", lambda row: str(row.rank)),
    ("ρ", "number", lambda row: rho(row.energy_ratio)),
    ("effective", "number", lambda row: number(row.effective_rank, ".1f")),
    ("norm", "number", lambda row: number(row.norm, ".3g")),
    ("kept energy", "number", lambda row: share(row.kept_energy)),
    ("from mean", "number", lambda row: number(row.distance)),
    ("time", "number", lambda row: f"{row.seconds:.2g} s"),
)


def _distances(report: CompareReport, able: list[tuple[int, MethodRow]]) -> Table:
    numbers = [str(i + 1) for i in range(len(able))]
    names = [f"{n} {row.name}" for n, (_, row) in zip(numbers, able, strict=True)]
    cells = [[number(report.distances[m][k], ".2f") for k, _ in able] for m, _ in able]
    title = "distances between the updates, relative to the norm of the exact mean"
    return matrix("", names, numbers, cells, title)
