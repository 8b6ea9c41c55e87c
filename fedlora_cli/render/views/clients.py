"""The blocks about a cohort: its clients, its rank partitions, and the most similar clients."""

from __future__ import annotations

from itertools import combinations

from fedlora_cli.render.view import Bar, Block, Fields, Paragraph, matrix, paragraphs, table
from fedlora_cli.render.wording import count, number, percent, ranks_text, rho, share
from fedlora_cli.reports.diagnose import (
    AdapterRow,
    ClientFinding,
    CohortFindings,
    DiagnoseReport,
    HoldingRow,
    Similarity,
)
from fedlora_cli.text import rank_range

#: The largest cohort whose matrix of cosines fits on a terminal.
_FITTING = 10


def clients_summary(report: DiagnoseReport) -> str:
    """The headline: clients, ranks and modules."""
    ranks = [row.rank for row in report.adapters]
    modules = len({module.name for row in report.adapters for module in row.modules})
    return f"{len(ranks)} of {ranks_text(ranks)}, {count(modules, 'module')}"


def clients_blocks(report: DiagnoseReport, *, whole: bool) -> list[Block]:
    """The tables of clients and partitions, the findings, and the meaning of the columns."""
    cohort = report.cohort
    if cohort is None:
        return []
    clients = list(zip(report.adapters, cohort.clients, strict=True))
    blocks: list[Block] = [
        table(clients, _CLIENT_FIELDS, shown=None if whole else 20),
        table(cohort.partitions, _PARTITION_FIELDS),
    ]
    similarity = cohort.similarity
    names = [row.name for row in report.adapters]
    if whole and similarity is not None and len(names) <= _FITTING:
        heads = [f"{k + 1}" for k in range(len(names))]
        numbered = [f"{k} {name}" for k, name in zip(heads, names, strict=True)]
        cells = [[number(value, ".2f") for value in row] for row in similarity.cosine]
        blocks.append(matrix("cosine", numbered, heads, cells))
    meanings = (
        f"z: robust deviations of ln norm from the median; an outlier is beyond "
        f"{report.thresholds.outlier:g}",
        "effective: exp of the spectral entropy; cosine: with the sum of all others",
        "overlap: shared with the singular subspaces of others; top weight: by raflora",
    )
    return [*blocks, *paragraphs(_lines(report, cohort)), Paragraph("\n".join(meanings))]


_CLIENT_FIELDS: Fields[tuple[AdapterRow, ClientFinding]] = (
    ("client", "name", lambda pair: pair[0].name),
    ("rank", "number", lambda pair: pair[0].rank),
    ("samples", "number", lambda pair: f"{pair[0].samples:g}"),
    ("norm", "number", lambda pair: number(pair[0].norm, ".3g")),
    ("z", "number", lambda pair: number(pair[1].outlier, "+.1f")),
    ("ρ", "number", lambda pair: rho(pair[0].energy_ratio)),
    ("effective", "number", lambda pair: number(pair[0].effective_rank, ".1f")),
    ("cosine", "number", lambda pair: number(pair[1].cosine, ".2f")),
    ("overlap", "number", lambda pair: number(pair[1].overlap, ".2f")),
)

_PARTITION_FIELDS: Fields[HoldingRow] = (
    ("rank index", "text", lambda row: rank_range(row.first, row.last)),
    ("holders", "number", lambda row: row.holders),
    ("samples", "number", lambda row: percent(row.coverage)),
    ("top weight", "number", lambda row: number(row.max_weight, ".2f")),
    ("energy its holders put there", "bar", lambda row: Bar(row.energy)),
    ("", "number", lambda row: share(row.energy)),
)


def _lines(report: DiagnoseReport, cohort: CohortFindings) -> list[str]:
    lines = []
    if cohort.energy_ratio is not None:
        lines.append(
            f"clients with a rank above {report.shared_rank} put ρ = {rho(cohort.energy_ratio)} of "
            f"their energy in rank index {rank_range(1, report.shared_rank or 1)}"
        )
    top = max(cohort.partitions, key=lambda row: row.max_weight or 0.0)
    if top.max_weight is not None:
        lines.append(
            f"the largest weight of one client by raflora is {top.max_weight:.2f}: "
            f"{top.heaviest}, in rank index {rank_range(top.first, top.last)}"
        )
    if cohort.similarity is not None:
        lines += _pairs(cohort.similarity, [row.name for row in report.adapters])
    return lines


def _pairs(similarity: Similarity, names: list[str]) -> list[str]:
    """The pair of clients with the largest cosine and the pair with the smallest."""
    pairs = [
        (value, names[j], names[k])
        for j, k in combinations(range(len(names)), 2)
        if (value := similarity.cosine[j][k]) is not None
    ]
    if len(pairs) < 2:
        return []
    (high, a, b), (low, c, d) = max(pairs), min(pairs)
    return [
        f"most alike: {a} and {b}, cosine {high:.2f}",
        f"least alike: {c} and {d}, cosine {low:.2f}",
    ]
