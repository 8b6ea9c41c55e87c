"""What a person wants to know of adapters before using them."""

from __future__ import annotations

import math
from dataclasses import replace

from fedlora_cli.adapters.adapter import Role
from fedlora_cli.render.view import Block, Column, Paragraph, Table, View, columns, count, file_size
from fedlora_cli.reports.inspect import Difference, InspectedAdapter, InspectReport
from fedlora_cli.text import printable

#: Rows of a table of differences; a cohort that differs in every shape has more.
_SHOWN = 40

#: Notes about the adapters of a cohort.
_TOLD = 20


def inspect_views(report: InspectReport, *, modules: bool) -> tuple[View, ...]:
    """One adapter on its own; of many, one table and what differs, and with `modules` each one.

    The last of them says whether there are faults, but not which: these belong among the errors.
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
    where = (
        "every tensor is finite" if report.values else "by config and headers; --values reads on"
    )
    return Paragraph(f"no faults: {where}", "good")


def _adapter(adapter: InspectedAdapter, *, modules: bool) -> View:
    blocks: list[Block] = [_facts(adapter)]
    if adapter.modules:
        blocks.append(_modules(adapter) if modules else _groups(adapter))
    if adapter.tensors:
        blocks.append(_tensors(adapter))
    if adapter.notes:
        blocks.append(Paragraph("\n".join(adapter.notes), "warning"))
    return View(adapter.name, _summary(adapter), tuple(blocks))


def _summary(adapter: InspectedAdapter) -> str:
    if not adapter.modules:
        return "no module of it could be read"
    number = sum(len(group.names) for group in adapter.modules)
    return (
        f"rank {adapter.rank}, {count(number, 'module')}, "
        f"{count(len(adapter.tensors), 'other tensor')}, {_dtypes(adapter)}, "
        f"{adapter.parameters:,} parameters"
    )


def _facts(adapter: InspectedAdapter) -> Paragraph:
    origin = adapter.origin
    facts = {
        "path": adapter.path,
        "size": file_size(adapter.bytes),
        "base model": adapter.base_model,
        "revision": adapter.revision,
        "task type": adapter.task_type,
        "rsLoRA": "yes" if adapter.rslora else None,
        "samples": None if adapter.samples is None else f"{adapter.samples:g}",
        "written by": None
        if origin is None
        else f"fedlora {origin.version}: {origin.method} of {count(origin.clients, 'client')}, "
        f"shared rank {origin.shared_rank}",
    }
    told = {what: printable(value) for what, value in facts.items() if value is not None}
    return Paragraph("\n".join(f"{what:<10}  {value}" for what, value in told.items()))


def _groups(adapter: InspectedAdapter) -> Table:
    rows = tuple(
        (
            group.target,
            str(len(group.names)),
            _shape(group.shape),
            str(group.rank),
            _number(group.alpha),
            _number(group.scale),
            group.dtype,
        )
        for group in adapter.modules
    )
    heads = columns("modules", "shape", "rank", "alpha", "scaling")
    return Table((Column("target", "name"), *heads, Column("dtype", "text")), rows)


def _modules(adapter: InspectedAdapter) -> Table:
    rows = sorted(
        (
            name,
            _shape(group.shape),
            str(group.rank),
            _number(group.alpha),
            _number(group.scale),
            group.dtype,
        )
        for group in adapter.modules
        for name in group.names
    )
    heads = columns("shape", "rank", "alpha", "scaling")
    head = Column("module", "name")
    return Table((head, *heads, Column("dtype", "text")), tuple(rows), shown=None)


#: What a tensor that is no factor is.
_ROLES: dict[Role, str] = {
    "saved": "saved in full",
    "base": "base weights",
    "bias": "trained bias",
    "token": "trained token",
    "magnitude": "magnitudes",
    "lora_bias": "bias on lora_B",
}


def _tensors(adapter: InspectedAdapter) -> Table:
    rows = tuple(
        (
            tensor.name,
            _shape(tensor.shape),
            tensor.dtype,
            _ROLES[tensor.role],
        )
        for tensor in adapter.tensors
    )
    heads = (Column("other tensor", "name"), Column("shape"), *columns("dtype", "", kind="text"))
    return Table(heads, rows)


def _adapters(report: InspectReport, *, notes: bool) -> View:
    """All in one table; with the `notes` of each, where it is not shown on its own."""
    rows = tuple(
        (
            adapter.name,
            str(adapter.rank) if adapter.modules else "-",
            str(sum(len(group.names) for group in adapter.modules)),
            _dtypes(adapter),
            f"{adapter.parameters:,}",
            file_size(adapter.bytes),
            "global" if adapter.origin else _number(adapter.samples),
        )
        for adapter in report.adapters
    )
    heads = (Column("adapter", "name"), *columns("rank", "modules"), Column("dtype", "text"))
    table = Table((*heads, *columns("parameters", "size", "samples")), rows)
    blocks: list[Block] = [table]
    if report.differences:
        blocks.append(_differences(report.differences, len(report.adapters)))
    elif all(adapter.modules for adapter in report.adapters):
        blocks.append(Paragraph("they differ in nothing that headers show"))
    told = [note for adapter in report.adapters for note in adapter.notes] if notes else []
    if told:
        more = [f"and {len(told) - _TOLD} more; -v shows all"] if len(told) > _TOLD else []
        blocks.append(Paragraph("\n".join((*told[:_TOLD], *more)), "warning"))
    ranks = sorted({adapter.rank for adapter in report.adapters if adapter.modules})
    span = "no module of them could be read"
    if ranks:
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return View(count(len(report.adapters), "adapter"), span, tuple(blocks))


def _differences(differences: tuple[Difference, ...], adapters: int) -> Table:
    rows = tuple(
        (one.what if first else "", value, str(len(names)), ", ".join(names))
        for one in differences
        for first, (value, names) in zip((True, *[False] * adapters), one.values, strict=False)
    )
    heads = (Column("what differs", "name"), Column("", "phrase"), Column("adapters"))
    return Table((*heads, Column("", "phrase")), rows, shown=_SHOWN)


def _dtypes(adapter: InspectedAdapter) -> str:
    dtypes = sorted({group.dtype for group in adapter.modules})
    return dtypes[0] if len(dtypes) == 1 else "mixed" if dtypes else "-"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:g}"
