"""The model card: what this adapter is and what it was made of, for whoever finds it later."""

from __future__ import annotations

import json
import re
import shlex

from fedlora_cli.errors import printable
from fedlora_cli.formats import FORMATS
from fedlora_cli.render.report.aggregate import VOUCHED, AggregateReport

#: Clients listed in the card; `fedlora.json` beside it has all of them.
_LISTED = 50


def model_card(report: AggregateReport) -> str:
    """README.md of the written adapter, with the front matter that model hubs read."""
    return "\n".join([*_front_matter(report), *_summary(report), *_clients(report), ""])


def _front_matter(report: AggregateReport) -> list[str]:
    library = FORMATS[report.format].library
    lines = ["---", *([f"library_name: {library}"] if library else [])]
    tags = ["lora", "federated", "fedlora"]
    if report.base_model:
        lines.append(f"base_model: {json.dumps(report.base_model)}")
        tags.insert(0, f"base_model:adapter:{report.base_model}")
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]


def _summary(report: AggregateReport) -> list[str]:
    rho = _number(report.energy_ratio)
    return [
        "# Global LoRA adapter",
        "",
        f"Aggregated from {len(report.clients)} clients by fedlora {report.version} with "
        f"`{report.method}` ({report.source}).",
        "",
        f"- rank {report.rank}, scaling {report.scale:g}, {report.dtype}",
        f"- {len(report.modules)} adapted modules, {len(report.tensors)} tensors saved in full",
        f"- share of the energy in the first {report.shared_rank} rank indices, which every client "
        f"holds: {rho}; FlexLoRA on the same clients: {_number(report.flexlora_energy_ratio)}",
        f"- energy of the weighted sum kept at this rank: {_number(report.kept_energy)}",
        f"- {VOUCHED[report.samples_from]}",
        "",
        "```",
        _command(report),
        "```",
        "",
        *(f"- left out: {_plain(one.name)}: {_plain(one.reason)}" for one in report.left_out),
        *(f"- warning: {_plain(warning)}" for warning in report.warnings),
        "",
    ]


def _command(report: AggregateReport) -> str:
    """The command in one canonical form: the order of the clients never shows."""
    options = "".join(
        f" {flag}" if value is True else f" {flag} {shlex.quote(str(value))}"
        for flag, value in report.options.items()
    )
    return printable(f"fedlora aggregate CLIENTS -o OUTPUT --method {report.method}{options}")


def _clients(report: AggregateReport) -> list[str]:
    rows = [
        f"| {_plain(row.name)} | {row.rank} | {row.samples:g} | {_number(row.weight)} "
        f"| {(row.sha256 or '')[:16]} |"
        for row in report.clients[:_LISTED]
    ]
    more = len(report.clients) - len(rows)
    return [
        "| client | rank | samples | weight | sha256 |",
        "|---|---|---|---|---|",
        *rows,
        *([f"\nand {more} more, in `fedlora.json`"] if more else []),
    ]


def _plain(text: str) -> str:
    r"""Text that Markdown shows as it stands: no link, picture, HTML or cell begins in it.

    >>> _plain("<b> | ![x](http://a.b)")
    '&lt;b\\> \\| !\\[x\\](http://a.b)'
    """
    escaped = re.sub(r"([\\`*\[\]>|~$])", r"\\\1", printable(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
