"""What a person wants to know of adapters before handing them to clients."""

from __future__ import annotations

from fedlora_cli.render.view import (
    Bar,
    Block,
    Column,
    Paragraph,
    Table,
    View,
    columns,
    count,
    file_size,
    percent,
    wrapped,
)
from fedlora_cli.reports.distribution import (
    DistributeReport,
    HandoutRow,
    HeadRow,
    InitReport,
    TargetRow,
)


def distribute_view(report: DistributeReport, *, details: bool) -> View:
    """What every client receives of the global update; with `details`, by module as well."""
    blocks: list[Block] = [_received(report.clients, whole=details)]
    if details:
        blocks.append(_modules(report))
    blocks.append(Paragraph(_about(report)))
    return View(
        report.source,
        f"rank {report.rank}, {count(len(report.modules), 'module')}, "
        f"handed out as {count(len(report.clients), 'adapter')}",
        tuple(blocks),
    )


def init_view(report: InitReport, *, details: bool) -> View:
    """What is adapted, what is trained in full, and the adapters; with `details`, every module."""
    number = sum(len(target.names) for target in report.targets)
    blocks: list[Block] = [_targets(report.targets, each=details)]
    if report.tensors:
        blocks.append(_heads(report.tensors))
    blocks.append(_adapters(report.adapters, whole=details))
    task = "" if report.task_type is None else f"{report.task_type}, "
    return View(
        report.base_model,
        f"{report.model_class}, {task}{count(number, 'module')}, seed {report.seed}",
        tuple(blocks),
    )


def _received(clients: tuple[HandoutRow, ...], *, whole: bool) -> Table:
    rows = tuple(
        (
            row.name,
            Bar(row.kept_energy),
            percent(row.kept_energy, 1),
            *_settings(row),
            f"{row.padded} of {row.directions}",
            file_size(row.bytes),
        )
        for row in clients
    )
    heads = (Column("adapter", "name"), Column("energy", "bar"), Column(""))
    rest = columns("rank", "alpha", "scaling", "new", "size")
    return Table((*heads, *rest), rows, shown=None if whole else 20)


def _modules(report: DistributeReport) -> Table:
    rows = tuple(
        (
            row.name,
            _shape(row.shape),
            str(len(row.singular_values)),
            percent(row.least_kept, 1),
            percent(row.most_kept, 1),
        )
        for row in report.modules
    )
    heads = (Column("module", "name"), Column("shape", "text"))
    return Table((*heads, *columns("directions", "least", "most")), rows, shown=None)


def _about(report: DistributeReport) -> str:
    """What the columns are, and what new directions mean."""
    lines = [wrapped("energy: what an adapter holds of that of the global update, at its rank")]
    if any(row.padded for row in report.clients):
        text = "new: directions beyond those of the global update; B is zero and A random there, "
        lines.append(wrapped(text + "so that they change nothing yet and can be trained"))
    return "\n".join(lines)


def _targets(targets: tuple[TargetRow, ...], *, each: bool) -> Table:
    if each:
        names = tuple((name, _shape(one.shape)) for one in targets for name in one.names)
        return Table((Column("module", "name"), Column("shape")), names, shown=None)
    rows = tuple((one.target, str(len(one.names)), _shape(one.shape)) for one in targets)
    return Table((Column("target", "name"), *columns("modules", "shape")), rows)


def _heads(tensors: tuple[HeadRow, ...]) -> Table:
    rows = tuple(
        (
            one.name,
            _shape(one.shape),
            one.dtype,
            "drawn at random" if one.drawn else "from the base model",
        )
        for one in tensors
    )
    heads = (Column("trained in full", "name"), Column("shape"))
    return Table((*heads, *columns("dtype", "", kind="text")), rows)


def _adapters(adapters: tuple[HandoutRow, ...], *, whole: bool) -> Table:
    rows = tuple(
        (
            row.name,
            *_settings(row),
            row.dtype,
            f"{row.parameters:,}",
            file_size(row.bytes),
        )
        for row in adapters
    )
    heads = (Column("adapter", "name"), *columns("rank", "alpha", "scaling"))
    rest = (Column("dtype", "text"), *columns("parameters", "size"))
    return Table((*heads, *rest), rows, shown=None if whole else 20)


def _settings(row: HandoutRow) -> tuple[str, str, str]:
    """Rank, alpha and scaling."""
    return str(row.rank), _number(row.alpha), _number(row.scaling)


def _number(value: float | None) -> str:
    """A number that all modules have, or that they differ."""
    return "mixed" if value is None else f"{value:.4g}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
