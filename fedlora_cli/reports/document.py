"""Reports as JSON documents with stable keys; null replaces NaN and infinity."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fedlora_cli.methods.method import Method, step_name

AGGREGATE_SCHEMA = "fedlora.aggregate/1"
COMPARE_SCHEMA = "fedlora.compare/1"
DIAGNOSE_SCHEMA = "fedlora.diagnose/1"
DISTRIBUTE_SCHEMA = "fedlora.distribute/1"
INIT_SCHEMA = "fedlora.init/1"
INSPECT_SCHEMA = "fedlora.inspect/1"
METHODS_SCHEMA = "fedlora.methods/1"
PREDICT_SCHEMA = "fedlora.predict/1"
SIMULATE_SCHEMA = "fedlora.simulate/1"

#: Metadata of a field that a document has only if its value is not None.
ON_DEMAND = {"on demand": True}

#: Characters other than printable ASCII and line breaks.
_SPECIAL = re.compile(r"[^\x20-\x7e\n]")

#: The fields of a method that a document has: values, not functions.
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


def document(schema: str, report: Any) -> dict[str, Any]:
    """The document of a report, as plain values: what `--json` prints."""
    return {"schema": schema, **_plain(report)}


def methods_document(methods: Iterable[Method]) -> dict[str, Any]:
    """The document of the table of methods; installed methods have a distribution."""
    return {"schema": METHODS_SCHEMA, "methods": [_method(method) for method in methods]}


def _method(method: Method) -> dict[str, Any]:
    row = {column: getattr(method, column) for column in METHOD_COLUMNS}
    row |= {step: step_name(getattr(method, step)) for step in ("merge", "compress")}
    return row if method.distribution is None else row | {"distribution": method.distribution}


def to_json(document: dict[str, Any]) -> str:
    """One document as text. Raises ValueError for NaN and infinity.

    Every member has a line, and so has every object in a list, such as a module or a client. A line
    per number would make 1.5 million lines for 300 modules of 5000 clients. Characters that control
    a terminal are escaped; all other letters are kept.
    """
    members = ",\n".join(f"  {_line(key)}: {_member(value)}" for key, value in document.items())
    return _SPECIAL.sub(lambda letter: _escaped(letter[0]), f"{{\n{members}\n}}") + "\n"


def _member(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f"    {_line(item)}" for item in value) + "\n  ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _escaped(letter: str) -> str:
    r"""A printable letter as it is, any other as a JSON escape.

    >>> _escaped("é"), _escaped("\u202e")
    ('é', '\\u202e')
    """
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]


def _plain(value: Any) -> Any:
    """The value as dictionaries and lists, without fields on demand that are None. None replaces
    every NaN and infinity.
    """
    if is_dataclass(value):
        known = {each.name: getattr(value, each.name) for each in fields(value)}
        absent = {
            f.name for f in fields(value) if f.metadata == ON_DEMAND and known[f.name] is None
        }
        return {name: _plain(item) for name, item in known.items() if name not in absent}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):  # NumPy's are floats, too
        return float(value) if math.isfinite(value) else None
    return value
