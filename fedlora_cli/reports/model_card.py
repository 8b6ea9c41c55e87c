"""The model card of a global adapter: its method, its clients, and its numbers.

Names and reasons come from untrusted clients, so every renderer must show them as plain text.
"""

from __future__ import annotations

import json
import re
import shlex

from fedlora_cli.formats import FILES, FORMATS
from fedlora_cli.reports.aggregate import SAMPLES_SOURCE, AggregateReport
from fedlora_cli.text import printable

#: The most clients that the card lists; `fedlora.json` lists all.
_LISTED = 50

#: Words that every renderer shows as they are: letters, a number or one of our file names, with
#: punctuation. Hexadecimal words are excluded, because GitHub links them as commits.
_LETTERS = r"[^\W\d_]+(?:['-][^\W\d_]+)*'?"
_FILES = "|".join(map(re.escape, sorted(FILES - {"README.md"})))
_WORD = rf"(?![0-9a-f]{{7,40}}\b)(?:{_LETTERS}|-?\d+(?:[.,]\d+)?|{_FILES})"
_PLAIN = re.compile(rf"(?:\(?{_WORD}|{_WORD}\))[,;:]?")


def model_card(report: AggregateReport) -> str:
    """The README.md of a written adapter, with the front matter that model hubs read."""
    return "\n".join([*_front_matter(report), *_summary(report), *_clients(report), ""])


def _front_matter(report: AggregateReport) -> list[str]:
    library = FORMATS[report.format].library
    lines = ["---", *([f"library_name: {library}"] if library else [])]
    tags = ["lora", "federated", "fedlora"]
    if report.base_model:
        lines.append(f"base_model: {_yaml(report.base_model)}")
        tags.insert(0, f"base_model:adapter:{report.base_model}")
    return [*lines, "tags:", *(f"- {_yaml(tag)}" for tag in tags), "---", ""]


def _summary(report: AggregateReport) -> list[str]:
    rho = _number(report.energy_ratio)
    return [
        "# Global LoRA adapter",
        "",
        f"Aggregated from {len(report.clients)} clients by fedlora {report.version} with "
        f"`{report.method}` ({_plain(_origin(report))}).",
        "",
        f"- rank {report.rank}, scaling {report.scale:g}, {report.dtype}",
        f"- {len(report.modules)} adapted modules, {len(report.tensors)} tensors saved in full",
        f"- ρ, the share of the energy in the first {report.shared_rank} rank indices, which "
        f"every client holds: {rho}; "
        f"FlexLoRA on the same clients: {_number(report.flexlora_energy_ratio)}",
        f"- energy of the weighted sum kept at this rank: {_number(report.kept_energy)}",
        f"- {SAMPLES_SOURCE[report.samples_from]}",
        "",
        "```",
        _command(report),
        "```",
        "",
        *(f"- left out: {_plain(out.name)}: {_plain(out.reason)}" for out in report.left_out),
        *(f"- warning: {_plain(warning)}" for warning in report.warnings),
        "",
    ]


def _origin(report: AggregateReport) -> str:
    """The paper of the method, and the distribution that it was installed with."""
    return ", ".join(text for text in (report.source, report.distribution) if text)


def _command(report: AggregateReport) -> str:
    """The command in a canonical form that does not depend on the order of the clients."""
    options = "".join(
        f" {flag}" if value is True else f" {flag} {shlex.quote(str(value))}"
        for flag, value in report.options.items()
    )
    return printable(f"fedlora aggregate CLIENTS -o OUTPUT --method {report.method}{options}")


def _clients(report: AggregateReport) -> list[str]:
    rows = [
        f"| {_cell(row.name)} | {row.rank} | {row.samples:g} | {_number(row.weight)} "
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
    """The text with every word as code that a renderer might change. Renderers leave code alone:
    they find no emphasis, HTML, addresses, @names or #numbers in it.

    >>> _plain("ann left out: adapter_config.json: r is -4")
    'ann left out: adapter_config.json: r is -4'
    >>> _plain("ann@a.b and *a `b`")
    '`ann@a.b` and `*a` `` `b` ``'
    """
    words = printable(text).split(" ")
    return " ".join(word if not word or _PLAIN.fullmatch(word) else _code(word) for word in words)


def _code(word: str) -> str:
    """A word as code, between more backticks than it has in a row."""
    longest = max(map(len, re.findall("`+", word)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{word}{pad}{fence}"


def _cell(text: str) -> str:
    r"""The text as a table cell, where a bar ends the cell even in code. Renderers disagree about a
    bar after a backslash, so it becomes a hexadecimal escape.

    >>> print(_cell("a|b"), _cell("a\\|b"))
    `a\|b` `a\\x7cb`
    """
    return re.sub(r"(\\?)\|", lambda bar: r"\\x7c" if bar[1] else r"\|", _plain(text))


def _yaml(text: str) -> str:
    r"""Text quoted for YAML: like JSON, but a letter beyond U+FFFF is one escape, not two.

    >>> print(_yaml('a"\u00e9\U0001f600'))
    "a\"\u00e9\U0001f600"
    """
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda letter: _escape(ord(letter[0])), quoted)


def _escape(letter: int) -> str:
    return f"\\u{letter:04x}" if letter < 0x10000 else f"\\U{letter:08x}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
