"""Reports to JSON documents: stable keys, null instead of NaN, never an infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fedlora_cli.method import Method
from fedlora_cli.render.report.aggregate import AggregateReport

AGGREGATE_SCHEMA = "fedlora.aggregate/1"
METHODS_SCHEMA = "fedlora.methods/1"

#: The fields of a method that are values, not functions.
METHOD_COLUMNS = (
    "name",
    "summary",
    "formula",
    "source",
    "merge",
    "compress",
    "basis_free",
    "uses_previous",
)


def aggregate_document(report: AggregateReport) -> dict[str, Any]:
    """The document of one aggregation: what `--json` prints and `fedlora.json` keeps."""
    return {"schema": AGGREGATE_SCHEMA, **_without_nan(asdict(report))}


def methods_document(methods: Iterable[Method]) -> dict[str, Any]:
    """The table of methods."""
    return {
        "schema": METHODS_SCHEMA,
        "methods": [
            {column: getattr(method, column) for column in METHOD_COLUMNS} for method in methods
        ],
    }


def to_json(document: dict[str, Any]) -> str:
    """One document as text. Raises ValueError for a number that JSON does not have."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """The same value with every NaN or infinity replaced by None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
