"""Checks of methods from outside: their fields, their functions, and the weights of their rules."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fedlora_cli.errors import FedloraError, MethodError
from fedlora_cli.methods.method import COMPRESSIONS, MERGES, Method, titled
from fedlora_cli.methods.weights import FloatArray, Holdings, Rule, Weights
from fedlora_cli.text import first_line

Value = TypeVar("Value")

#: Names that are safe in a shell, in a list with commas, and as a folder.
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,39}")

_CURE = "correct the method"


def checked(method: object, distribution: str | None = None) -> Method:
    """The method with checks around its rules. Raises MethodError for a wrong field."""
    if not isinstance(method, Method):
        found = f"an object of type {type(method).__name__} is no method"
        raise MethodError(distribution or "register", found, "give a fedlora_cli.Method")
    title = titled(str(method.name)[:40], distribution)
    for field, right in (
        ("name", isinstance(method.name, str) and NAME.fullmatch(method.name)),
        ("summary", isinstance(method.summary, str)),
        ("formula", isinstance(method.formula, str)),
        ("source", isinstance(method.source, str)),
        ("rule", callable(method.rule)),
        ("merge", method.merge in MERGES or callable(method.merge)),
        ("compress", method.compress in COMPRESSIONS or callable(method.compress)),
        ("with_quorum", method.with_quorum is None or callable(method.with_quorum)),
    ):
        if not right:
            found = f"{str(getattr(method, field))[:40]!r} is no {field} of a method"
            raise MethodError(title, found, _FIELDS.get(field, _CURE))
    quorum = method.with_quorum
    return replace(
        method,
        rule=partial(checked_weights, title, method.uses_norms, method.rule),
        with_quorum=quorum and partial(_checked_quorum, title, method.uses_norms, quorum),
        distribution=distribution,
    )


_FIELDS = {
    "name": "use at most 40 of the characters a-z, 0-9, - and _",
    "merge": f"give one of {', '.join(MERGES)}, or a function",
    "compress": f"give one of {', '.join(COMPRESSIONS)}, or a function",
}


def called(title: str, step: str, function: Callable[..., Value], *arguments: Any) -> Value:
    """The result of a function from outside. Raises its FedloraError, and MethodError for any other
    error.
    """
    try:
        return function(*arguments)
    except FedloraError:
        raise
    except Exception as error:
        found = f"its {step} failed ({type(error).__name__}: {first_line(error)})"
        raise MethodError(title, found, "report it to the author of the method") from error


def checked_weights(title: str, uses_norms: bool, rule: Rule, holdings: Holdings) -> Weights:
    """The weights of a rule from outside, in float64. Raises MethodError for impossible weights."""
    given = called(title, "rule", rule, holdings)
    # Without norms, as from headers alone, the weights of a rule that needs them are unknown.
    unknown = uses_norms and not np.isfinite(holdings.norms).all()
    clients, previous = (_numbers(getattr(given, name, None)) for name in ("clients", "previous"))
    shape = (holdings.ranks.size, holdings.rank)
    for wrong, found in (
        (clients.shape != shape, f"clients of shape {clients.shape} instead of {shape}"),
        (previous.shape != shape[1:], f"previous of shape {previous.shape} instead of {shape[1:]}"),
    ):
        if wrong:
            raise MethodError(title, f"its rule returned {found}", _CURE)
    for values in (clients, previous):
        if not unknown and not (np.isfinite(values) & (values >= 0)).all():
            found = "its rule returned a weight that is negative or not finite"
            raise MethodError(title, found, _CURE)
    if clients[holdings.held == 0].any():
        found = "its rule returned a weight where a client lacks the rank index"
        raise MethodError(title, found, _CURE)
    return Weights(clients, previous)


def _checked_quorum(
    title: str, uses_norms: bool, with_quorum: Callable[[float], Rule], quorum: float
) -> Rule:
    rule = called(title, "quorum", with_quorum, quorum)
    return partial(checked_weights, title, uses_norms, rule)


def _numbers(values: object) -> FloatArray:
    """The values in float64; of shape () if they are no numbers."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return np.zeros(())
