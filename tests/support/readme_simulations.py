"""The tables of trained federations, from the reports in `samples/simulations`.

Each report is what `fedlora simulate ... --json` printed for the command that stands above its
table; to train all of them again takes hours, to look at them nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLACE = Path(__file__).parents[2] / "samples" / "simulations"

#: What is changed in every condition: the name of its report, in words, as options.
CONDITIONS = {
    "default": ("as above", ""),
    "more": ("high ranks have more data", "--holdings 1"),
    "wide": ("lower shared rank", "--cohort 8x1,6x4,4x16,2x32"),
    "few": ("few of high rank", "--cohort 18x4,2x32"),
}


def report(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((PLACE / f"{name}.json").read_text())
    return document


def arms(name: str) -> dict[str, dict[str, Any]]:
    """Every arm of a report at its best rate."""
    return {row["arm"]: row for row in report(name)["arms"] if row["best"]}


def spread(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    deviation = "" if value["sd"] is None else f" ± {value['sd']:.2f}"
    return f"{value['mean']:.2f}{deviation}"


def ratio(value: dict[str, float]) -> str:
    """ρ, with two digits of what is missing to 1 where that is little."""
    missing = 1 - value["mean"]
    return f"{value['mean']:.2f}" if missing > 0.02 else f"1 - {missing:.0e}".replace("e-0", "e-")


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def default_table() -> str:
    rows = []
    for arm, row in arms("default").items():
        verdicts = ", ".join(sorted(set(row["verdicts"]), key=row["verdicts"].index))
        rows.append(
            [
                f"`{arm}`",
                spread(row["accuracy"]),
                ratio(row["energy_ratio"]),
                f"{row['effective_rank']['mean']:.1f}",
                f"{row['gamma']['mean']:.2f}",
                f"{row['norm']['mean']:.1f}",
                verdicts,
                f"{row['bytes_up'] / 1e6:.2f} / {row['bytes_down'] / 1e6:.2f} MB",
                f"{row['server_seconds']:.1f} of "
                f"{row['server_seconds'] + row['client_seconds']:.1f} s",
            ]
        )
    heads = ["arm", "accuracy", "ρ", "effective rank", "γ", "norm", "verdict", "up / down"]
    return table([*heads, "server"], rows)


def rates_table() -> str:
    """Accuracy by arm and rate, the best one by validation in bold."""
    found = report("rates")
    rates = sorted({row["rate"] for row in found["arms"]})
    rows = []
    for arm, best in arms("rates").items():
        own = {row["rate"]: row for row in found["arms"] if row["arm"] == arm}
        cells = [spread(own[rate]["accuracy"]) for rate in rates]
        cells[rates.index(best["rate"])] = f"**{spread(best['accuracy'])}**"
        rows.append(
            [f"`{arm}`", *cells, ratio(best["energy_ratio"]), f"{best['norm']['mean']:.1f}"]
        )
    return table(["arm", *(f"{rate:g}" for rate in rates), "ρ there", "norm there"], rows)


def sweep_table() -> str:
    """Accuracy and ρ by quorum and momentum, each at its best rate."""
    found = {(row["quorum"] or 0.0, row["momentum"]): row for row in arms("sweep").values()}
    momenta = sorted({momentum for _, momentum in found})
    rows = []
    for quorum in sorted({quorum for quorum, _ in found}):
        row = [found[quorum, b] for b in momenta]
        cells = [
            f"{spread(one['accuracy'])} (ρ {ratio(one['energy_ratio'])}, lr {one['rate']:g})"
            for one in row
        ]
        rows.append([f"q = {quorum:g}", *cells])
    return table(["", *(f"β = {b:g}" for b in momenta)], rows)


def conditions_table() -> str:
    """Every method at its own best rate, one thing changed at a time."""
    rows = []
    for name, (words, options) in CONDITIONS.items():
        own = arms("rates" if name == "default" else name)
        flexlora, raflora, half = (own[arm] for arm in ("flexlora", "raflora", "raflora-q0.5"))
        pairs = zip(raflora["by_seed"], flexlora["by_seed"], strict=True)
        differences = " ".join(f"{100 * (a - b):+.0f}" for a, b in pairs)
        cells = [
            f"{spread(row['accuracy'])} (ρ {ratio(row['energy_ratio'])})"
            for row in (flexlora, raflora, half)
        ]
        rows.append([words, f"`{options}`" if options else "", *cells, differences])
    heads = ["", "option", "`flexlora`", "`raflora`", "`raflora-q0.5`", "raflora ahead, by seed"]
    return table(heads, rows)


TABLES = {
    "simulated-default": default_table,
    "simulated-rates": rates_table,
    "simulated-sweep": sweep_table,
    "simulated-conditions": conditions_table,
}
