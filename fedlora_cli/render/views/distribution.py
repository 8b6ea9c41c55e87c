"""The views of `distribute` and `init`: the adapters that the clients start from."""

from __future__ import annotations

from fedlora_cli.render.view import Bar, Field, Fields, View, paragraphs, table
from fedlora_cli.render.wording import count, file_size, percent, shape_text
from fedlora_cli.reports.distribution import (
    DistributedModule,
    DistributedRow,
    DistributeReport,
    HeadRow,
    InitReport,
    TargetRow,
)


def distribute_view(report: DistributeReport, *, details: bool) -> View:
    """The adapter of every client; with `details`, also every module of the global adapter."""
    meanings = ["energy: share of the global update's energy that an adapter holds"]
    if any(row.padded for row in report.clients):
        meanings.append(
            "new: directions beyond those of the global update; B is zero and A is random, so they "
            "change nothing yet and can be trained"
        )
    return View(
        report.source,
        f"rank {report.rank}, {count(len(report.modules), 'module')}, "
        f"distributed as {count(len(report.clients), 'adapter')}",
        (
            table(report.clients, _CLIENT_FIELDS, shown=None if details else 20),
            *([table(report.modules, _MODULE_FIELDS, shown=None)] if details else ()),
            *paragraphs(meanings),
        ),
    )


def init_view(report: InitReport, *, details: bool) -> View:
    """The targets, the fully trained tensors and the adapters; with `details`, every row."""
    targets = table(report.targets, _TARGET_FIELDS)
    modules = [(name, target.shape) for target in report.targets for name in target.names]
    task = "" if report.task_type is None else f"{report.task_type}, "
    return View(
        report.base_model,
        f"{report.model_class}, {task}{count(len(modules), 'module')}, seed {report.seed}",
        (
            table(modules, _TARGET_MODULE_FIELDS, shown=None) if details else targets,
            *([table(report.tensors, _HEAD_FIELDS)] if report.tensors else ()),
            table(report.adapters, _ADAPTER_FIELDS, shown=None if details else 20),
        ),
    )


_NAME: Field[DistributedRow] = ("adapter", "name", lambda row: row.name)
_SIZE: Field[DistributedRow] = ("size", "number", lambda row: file_size(row.bytes))
_SETTINGS: Fields[DistributedRow] = (
    ("rank", "number", lambda row: row.rank),
    ("alpha", "number", lambda row: _number(row.alpha)),
    ("scaling", "number", lambda row: _number(row.scaling)),
)

_CLIENT_FIELDS: Fields[DistributedRow] = (
    _NAME,
    ("energy", "bar", lambda row: Bar(row.kept_energy)),
    ("", "number", lambda row: percent(row.kept_energy, 1)),
    *_SETTINGS,
    ("new", "number", lambda row: f"{row.padded} of {row.directions}"),
    _SIZE,
)

_MODULE_FIELDS: Fields[DistributedModule] = (
    ("module", "name", lambda row: row.name),
    ("shape", "text", lambda row: shape_text(row.shape)),
    ("directions", "number", lambda row: len(row.singular_values)),
    ("least", "number", lambda row: percent(row.least_kept, 1)),
    ("most", "number", lambda row: percent(row.most_kept, 1)),
)


_TARGET_FIELDS: Fields[TargetRow] = (
    ("target", "name", lambda row: row.target),
    ("modules", "number", lambda row: len(row.names)),
    ("shape", "number", lambda row: shape_text(row.shape)),
)

_TARGET_MODULE_FIELDS: Fields[tuple[str, tuple[int, int]]] = (
    ("module", "name", lambda pair: pair[0]),
    ("shape", "number", lambda pair: shape_text(pair[1])),
)

_HEAD_FIELDS: Fields[HeadRow] = (
    ("trained in full", "name", lambda row: row.name),
    ("shape", "number", lambda row: shape_text(row.shape)),
    ("dtype", "text", lambda row: row.dtype),
    ("", "text", lambda row: "random" if row.drawn else "from the base model"),
)

_ADAPTER_FIELDS: Fields[DistributedRow] = (
    _NAME,
    *_SETTINGS,
    ("dtype", "text", lambda row: row.dtype),
    ("parameters", "number", lambda row: f"{row.parameters:,}"),
    _SIZE,
)


def _number(value: float | None) -> str:
    """A number that all modules share, or "mixed" where they differ."""
    return "mixed" if value is None else f"{value:.4g}"
