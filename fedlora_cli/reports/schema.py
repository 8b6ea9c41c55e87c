"""JSON Schema of the documents, made from the dataclasses of the reports."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedlora_cli.reports.document import ON_DEMAND

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}


def schema(name: str, report: type) -> dict[str, Any]:
    """The schema of a document, for example of the name `fedlora.diagnose/1`.

    Every key is required except those on demand. Other keys are allowed, because a version may get
    more.
    """
    whole = _schema(report)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "type": "object",
        "properties": {"schema": {"const": name}, **whole["properties"]},
        "required": ["schema", *whole["required"]],
    }


def _schema(kind: Any) -> dict[str, Any]:
    """The schema of one type annotation. Raises TypeError for an unknown type."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        return {
            "type": "object",
            "properties": {name: _schema(hints[name]) for name in names},
            "required": [f.name for f in fields(kind) if f.metadata != ON_DEMAND],
        }
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part) for part in inner]}
    if origin is tuple and inner[1:] == (...,):
        return {"type": "array", "items": _schema(inner[0])}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_schema(part) for part in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _schema(inner[1])}
    raise TypeError(f"no schema for {kind}")
