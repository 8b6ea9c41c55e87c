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
    from fedlora_cli.adapters.adapter import Adapter
    from fedlora_cli.aggregation.options import AggregateOptions
    from fedlora_cli.analysis.comparison.compare import compare
    from fedlora_cli.analysis.diagnosis.diagnose import diagnose
    from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
    from fedlora_cli.analysis.inspection.inspect import inspect
    from fedlora_cli.analysis.prediction.predict import predict
    from fedlora_cli.clients.cohort import Client, Cohort, align
    from fedlora_cli.clients.reading import read_clients
    from fedlora_cli.errors import (
        ClusterError,
        FedloraError,
        InputError,
        OutputError,
        UsageError,
        VerificationError,
    )
    from fedlora_cli.execution.cluster import ClusterWarning
    from fedlora_cli.files.locations import location
    from fedlora_cli.formats import read
    from fedlora_cli.linalg.factors import Factors
    from fedlora_cli.methods import METHODS
    from fedlora_cli.methods.method import Method
    from fedlora_cli.methods.weights import Holdings, Weights
    from fedlora_cli.reports.aggregate import AggregateReport
    from fedlora_cli.reports.compare import CompareReport
    from fedlora_cli.reports.diagnose import DiagnoseReport
    from fedlora_cli.reports.distribution import DistributeReport, InitReport
    from fedlora_cli.reports.inspect import InspectReport
    from fedlora_cli.reports.predict import PredictReport
    from fedlora_cli.reports.simulate import SimulateReport
    from fedlora_cli.rounds.aggregate import aggregate
    from fedlora_cli.rounds.distribute import distribute
    from fedlora_cli.rounds.initialize import initialize
    from fedlora_cli.rounds.options import DistributeOptions, InitOptions
    from fedlora_cli.simulation.options import (
        Arm,
        Setting,
        SimulateOptions,
        Source,
        Split,
        Training,
    )
    from fedlora_cli.simulation.simulate import simulate

_HOMES = {
    "Adapter": "adapters.adapter",
    "AggregateOptions": "aggregation.options",
    "AggregateReport": "reports.aggregate",
    "Arm": "simulation.options",
    "Client": "clients.cohort",
    "ClusterError": "errors",
    "ClusterWarning": "execution.cluster",
    "Cohort": "clients.cohort",
    "CompareReport": "reports.compare",
    "DiagnoseOptions": "analysis.diagnosis.options",
    "DiagnoseReport": "reports.diagnose",
    "DistributeOptions": "rounds.options",
    "DistributeReport": "reports.distribution",
    "Factors": "linalg.factors",
    "FedloraError": "errors",
    "Holdings": "methods.weights",
    "InitOptions": "rounds.options",
    "InitReport": "reports.distribution",
    "InputError": "errors",
    "InspectReport": "reports.inspect",
    "METHODS": "methods",
    "Method": "methods.method",
    "OutputError": "errors",
    "PredictReport": "reports.predict",
    "Setting": "simulation.options",
    "SimulateOptions": "simulation.options",
    "SimulateReport": "reports.simulate",
    "Source": "simulation.options",
    "Split": "simulation.options",
    "Training": "simulation.options",
    "UsageError": "errors",
    "VerificationError": "errors",
    "Weights": "methods.weights",
    "aggregate": "rounds.aggregate",
    "align": "clients.cohort",
    "compare": "analysis.comparison.compare",
    "diagnose": "analysis.diagnosis.diagnose",
    "distribute": "rounds.distribute",
    "initialize": "rounds.initialize",
    "inspect": "analysis.inspection.inspect",
    "location": "files.locations",
    "predict": "analysis.prediction.predict",
    "read": "formats",
    "read_clients": "clients.reading",
    "simulate": "simulation.simulate",
}

__all__ = [
    "METHODS",
    "Adapter",
    "AggregateOptions",
    "AggregateReport",
    "Arm",
    "Client",
    "ClusterError",
    "ClusterWarning",
    "Cohort",
    "CompareReport",
    "DiagnoseOptions",
    "DiagnoseReport",
    "DistributeOptions",
    "DistributeReport",
    "Factors",
    "FedloraError",
    "Holdings",
    "InitOptions",
    "InitReport",
    "InputError",
    "InspectReport",
    "Method",
    "OutputError",
    "PredictReport",
    "Setting",
    "SimulateOptions",
    "SimulateReport",
    "Source",
    "Split",
    "Training",
    "UsageError",
    "VerificationError",
    "Weights",
    "__version__",
    "aggregate",
    "align",
    "compare",
    "diagnose",
    "distribute",
    "initialize",
    "inspect",
    "location",
    "predict",
    "read",
    "read_clients",
    "simulate",
]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
