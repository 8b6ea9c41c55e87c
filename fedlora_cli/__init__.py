"""Server-side aggregation of federated LoRA adapters of different ranks.

>>> from fedlora_cli import METHODS
>>> METHODS["raflora"].source
'arXiv:2602.13486'

The names below are the public library, in the words of the command. They are imported when first
used, so that `import fedlora_cli` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora_cli.version import __version__

if TYPE_CHECKING:
    from fedlora_cli.adapter import Adapter
    from fedlora_cli.aggregation.options import Options
    from fedlora_cli.clients import read_clients
    from fedlora_cli.cohort import Client, Cohort, align
    from fedlora_cli.errors import (
        FedloraError,
        InputError,
        OutputError,
        UsageError,
        VerificationError,
    )
    from fedlora_cli.factors import Factors
    from fedlora_cli.formats import read
    from fedlora_cli.method import Method
    from fedlora_cli.methods import METHODS
    from fedlora_cli.render.report.aggregate import AggregateReport
    from fedlora_cli.rounds.aggregate import aggregate
    from fedlora_cli.weights import Holdings, Weights

_HOMES = {
    "Adapter": "adapter",
    "AggregateReport": "render.report.aggregate",
    "Client": "cohort",
    "Cohort": "cohort",
    "Factors": "factors",
    "FedloraError": "errors",
    "Holdings": "weights",
    "InputError": "errors",
    "METHODS": "methods",
    "Method": "method",
    "Options": "aggregation.options",
    "OutputError": "errors",
    "UsageError": "errors",
    "VerificationError": "errors",
    "Weights": "weights",
    "aggregate": "rounds.aggregate",
    "align": "cohort",
    "read": "formats",
    "read_clients": "clients",
}

__all__ = [
    "METHODS",
    "Adapter",
    "AggregateReport",
    "Client",
    "Cohort",
    "Factors",
    "FedloraError",
    "Holdings",
    "InputError",
    "Method",
    "Options",
    "OutputError",
    "UsageError",
    "VerificationError",
    "Weights",
    "__version__",
    "aggregate",
    "align",
    "read",
    "read_clients",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
