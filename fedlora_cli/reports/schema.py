"""JSON Schema of the documents, from the dataclasses that they are written from."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fedlora_cli.reports.aggregate import ON_DEMAND

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}


def schema(name: str, report: type) -> dict[str, Any]:
    """The schema of a document with that name, `fedlora.diagnose/1` for example.

    Every key is required, but for those on demand; more may be added within one version, which is
    why others are allowed.
    """
    whole = _of(report)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        "type": "object",
        "properties": {"schema": {"const": name}, **whole["properties"]},
        "required": ["schema", *whole["required"]],
    }


def _of(kind: Any) -> dict[str, Any]:
    """The schema of one type annotation. Raises TypeError for one that no report has."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        return {
            "type": "object",
            "properties": {name: _of(hints[name]) for name in names},
            "required": [one.name for one in fields(kind) if one.metadata != ON_DEMAND],
        }
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(one) for one in inner]}
    if origin is tuple and inner[1:] == (...,):
        return {"type": "array", "items": _of(inner[0])}
    if origin is tuple:
        return {
            "type": "array",
            "prefixItems": [_of(one) for one in inner],
            "minItems": len(inner),
            "maxItems": len(inner),
        }
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _of(inner[1])}
    raise TypeError(f"no schema for {kind}")
