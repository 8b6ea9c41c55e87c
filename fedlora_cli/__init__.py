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
    from fedlora_cli.analysis.comparison.compare import compare
    from fedlora_cli.analysis.diagnosis.diagnose import diagnose
    from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
    from fedlora_cli.analysis.inspection.inspect import inspect
    from fedlora_cli.analysis.prediction.predict import predict
    from fedlora_cli.clients import read_clients
    from fedlora_cli.cluster import ClusterWarning
    from fedlora_cli.cohort import Client, Cohort, align
    from fedlora_cli.errors import (
        ClusterError,
        FedloraError,
        InputError,
        OutputError,
        UsageError,
        VerificationError,
    )
    from fedlora_cli.factors import Factors
    from fedlora_cli.files.locations import location
    from fedlora_cli.formats import read
    from fedlora_cli.method import Method
    from fedlora_cli.methods import METHODS
    from fedlora_cli.render.report.aggregate import AggregateReport
    from fedlora_cli.render.report.compare import CompareReport
    from fedlora_cli.render.report.diagnose import DiagnoseReport
    from fedlora_cli.render.report.handout import DistributeReport, InitReport
    from fedlora_cli.render.report.inspect import InspectReport
    from fedlora_cli.render.report.predict import PredictReport
    from fedlora_cli.render.report.simulate import SimulateReport
    from fedlora_cli.rounds.aggregate import aggregate
    from fedlora_cli.rounds.distribute import distribute
    from fedlora_cli.rounds.initialise import initialise
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
    from fedlora_cli.weights import Holdings, Weights

_HOMES = {
    "Adapter": "adapter",
    "AggregateReport": "render.report.aggregate",
    "Arm": "simulation.options",
    "Client": "cohort",
    "ClusterError": "errors",
    "ClusterWarning": "cluster",
    "Cohort": "cohort",
    "CompareReport": "render.report.compare",
    "DiagnoseOptions": "analysis.diagnosis.options",
    "DiagnoseReport": "render.report.diagnose",
    "DistributeOptions": "rounds.options",
    "DistributeReport": "render.report.handout",
    "Factors": "factors",
    "FedloraError": "errors",
    "Holdings": "weights",
    "InitOptions": "rounds.options",
    "InitReport": "render.report.handout",
    "InputError": "errors",
    "InspectReport": "render.report.inspect",
    "METHODS": "methods",
    "Method": "method",
    "Options": "aggregation.options",
    "OutputError": "errors",
    "PredictReport": "render.report.predict",
    "Setting": "simulation.options",
    "SimulateOptions": "simulation.options",
    "SimulateReport": "render.report.simulate",
    "Source": "simulation.options",
    "Split": "simulation.options",
    "Training": "simulation.options",
    "UsageError": "errors",
    "VerificationError": "errors",
    "Weights": "weights",
    "aggregate": "rounds.aggregate",
    "align": "cohort",
    "compare": "analysis.comparison.compare",
    "diagnose": "analysis.diagnosis.diagnose",
    "distribute": "rounds.distribute",
    "initialise": "rounds.initialise",
    "inspect": "analysis.inspection.inspect",
    "location": "files.locations",
    "predict": "analysis.prediction.predict",
    "read": "formats",
    "read_clients": "clients",
    "simulate": "simulation.simulate",
}

__all__ = [
    "METHODS",
    "Adapter",
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
    "Options",
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
    "initialise",
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
