"""The views of an inspection: each adapter, the table of all adapters, and their differences."""

from __future__ import annotations

from dataclasses import replace

from fedlora_cli.adapters.adapter import Role
from fedlora_cli.render.view import Block, Fields, Paragraph, Table, View, table
from fedlora_cli.render.wording import count, file_size, number, ranks_text, shape_text
from fedlora_cli.reports.inspect import (
    Difference,
    InspectedAdapter,
    InspectReport,
    ModuleGroup,
    TensorRow,
)
from fedlora_cli.text import printable

#: Rows of the table of differences that a terminal shows.
_SHOWN = 40

#: Notes that the view of a cohort shows.
_NOTES = 20

#: The meaning of a tensor that is not a factor.
_ROLES: dict[Role, str] = {
    "saved": "saved in full",
    "base": "base weights",
    "bias": "trained bias",
    "token": "trained token",
    "magnitude": "magnitudes",
    "lora_bias": "bias on lora_B",
}


def inspect_views(report: InspectReport, *, modules: bool) -> tuple[View, ...]:
    """The view of a single adapter, or the table of several; with `modules`, also each adapter.

    The last view counts the faults. The command prints the faults themselves as errors.
    """
    views = []
    if len(report.adapters) == 1 or modules:
        views += [_adapter(adapter, modules=modules) for adapter in report.adapters]
    if len(report.adapters) > 1:
        views.append(_adapters(report, notes=not modules))
    if views:
        views[-1] = replace(views[-1], blocks=(*views[-1].blocks, _verdict(report)))
    return tuple(views)


def _verdict(report: InspectReport) -> Paragraph:
    if report.faults:
        return Paragraph(count(len(report.faults), "fault"), "bad")
    if report.values:
        return Paragraph("no faults: every tensor is finite", "good")
    checked = "configs and headers are checked; --values checks the tensors as well"
    return Paragraph(f"no faults: {checked}", "good")


def _adapter(adapter: InspectedAdapter, *, modules: bool) -> View:
    blocks: list[Block] = [_facts(adapter)]
    if adapter.modules:
        blocks.append(_modules(adapter) if modules else table(adapter.modules, _GROUP_FIELDS))
    if adapter.tensors:
        blocks.append(table(adapter.tensors, _TENSOR_FIELDS))
    if adapter.notes:
        blocks.append(Paragraph("\n".join(adapter.notes), "warning"))
    return View(adapter.name, _summary(adapter), tuple(blocks))


def _summary(adapter: InspectedAdapter) -> str:
    if not adapter.modules:
        return "no module could be read"
    modules = sum(len(group.names) for group in adapter.modules)
    return (
        f"rank {adapter.rank}, {count(modules, 'module')}, "
        f"{count(len(adapter.tensors), 'other tensor')}, {_dtypes(adapter)}, "
        f"{adapter.parameters:,} parameters"
    )


def _facts(adapter: InspectedAdapter) -> Paragraph:
    facts = {
        "path": adapter.path,
        "size": file_size(adapter.bytes),
        "base model": adapter.base_model,
        "revision": adapter.revision,
        "task type": adapter.task_type,
        "rsLoRA": "yes" if adapter.rslora else None,
        "samples": None if adapter.samples is None else f"{adapter.samples:g}",
    }
    if origin := adapter.origin:
        facts["written by"] = (
            f"fedlora {origin.version}: {origin.method} of {count(origin.clients, 'client')}, "
            f"shared rank {origin.shared_rank}"
        )
    known = ((label, value) for label, value in facts.items() if value is not None)
    return Paragraph("\n".join(f"{label:<10}  {printable(value)}" for label, value in known))


def _modules(adapter: InspectedAdapter) -> Table:
    by_name = {name: group for group in adapter.modules for name in group.names}
    return table(
        [replace(by_name[name], target=name) for name in sorted(by_name)],
        [("module", "name", lambda group: group.target), *_MODULE_FIELDS],
        shown=None,
    )


_TENSOR_FIELDS: Fields[TensorRow] = (
    ("other tensor", "name", lambda tensor: tensor.name),
    ("shape", "number", lambda tensor: shape_text(tensor.shape)),
    ("dtype", "text", lambda tensor: tensor.dtype),
    ("", "text", lambda tensor: _ROLES[tensor.role]),
)


def _adapters(report: InspectReport, *, notes: bool) -> View:
    """All adapters in one table; with `notes`, the notes about each adapter."""
    blocks: list[Block] = [table(report.adapters, _ADAPTER_FIELDS)]
    if report.differences:
        blocks.append(_differences(report.differences))
    elif all(adapter.modules for adapter in report.adapters):
        blocks.append(Paragraph("the configs and headers of the adapters agree"))
    lines = [note for adapter in report.adapters for note in adapter.notes] if notes else []
    if lines:
        more = [f"and {len(lines) - _NOTES} more; -v shows all"] if len(lines) > _NOTES else []
        blocks.append(Paragraph("\n".join((*lines[:_NOTES], *more)), "warning"))
    ranks = [adapter.rank for adapter in report.adapters if adapter.modules]
    summary = ranks_text(ranks) if ranks else "no module could be read"
    return View(count(len(report.adapters), "adapter"), summary, tuple(blocks))


def _differences(differences: tuple[Difference, ...]) -> Table:
    return table(
        [
            ("" if k else difference.what, *value)
            for difference in differences
            for k, value in enumerate(difference.values)
        ],
        [
            ("what differs", "name", lambda row: row[0]),
            ("", "phrase", lambda row: row[1]),
            ("adapters", "number", lambda row: len(row[2])),
            ("", "phrase", lambda row: ", ".join(row[2])),
        ],
        shown=_SHOWN,
    )


def _dtypes(adapter: InspectedAdapter) -> str:
    dtypes = sorted({group.dtype for group in adapter.modules})
    return dtypes[0] if len(dtypes) == 1 else "mixed" if dtypes else "-"


_ADAPTER_FIELDS: Fields[InspectedAdapter] = (
    ("adapter", "name", lambda row: row.name),
    ("rank", "number", lambda row: row.rank if row.modules else "-"),
    ("modules", "number", lambda row: sum(len(group.names) for group in row.modules)),
    ("dtype", "text", _dtypes),
    ("parameters", "number", lambda row: f"{row.parameters:,}"),
    ("size", "number", lambda row: file_size(row.bytes)),
    ("samples", "number", lambda row: "global" if row.origin else number(row.samples, "g")),
)

#: The columns that modules and groups of modules have in common.
_MODULE_FIELDS: Fields[ModuleGroup] = (
    ("shape", "number", lambda group: shape_text(group.shape)),
    ("rank", "number", lambda group: group.rank),
    ("alpha", "number", lambda group: number(group.alpha, "g")),
    ("scaling", "number", lambda group: number(group.scale, "g")),
    ("dtype", "text", lambda group: group.dtype),
)

_GROUP_FIELDS: Fields[ModuleGroup] = (
    ("target", "name", lambda group: group.target),
    ("modules", "number", lambda group: len(group.names)),
    *_MODULE_FIELDS,
)
