"""Server-side aggregation of federated LoRA adapters of different ranks.

>>> from fedlora_cli import METHODS
>>> METHODS["raflora"].source
'arXiv:2602.13486'

The names below are the public library, in the words of the command. Each is imported when it is
first used, so that `import fedlora_cli` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers, which cannot read the table
    from fedlora_cli.adapters.adapter import Adapter as Adapter
    from fedlora_cli.aggregation.options import AggregateOptions as AggregateOptions
    from fedlora_cli.analysis.comparison.compare import compare as compare
    from fedlora_cli.analysis.diagnosis.diagnose import diagnose as diagnose
    from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions as DiagnoseOptions
    from fedlora_cli.analysis.inspection.inspect import inspect as inspect
    from fedlora_cli.analysis.inspection.options import InspectOptions as InspectOptions
    from fedlora_cli.analysis.prediction.options import PredictOptions as PredictOptions
    from fedlora_cli.analysis.prediction.predict import predict as predict
    from fedlora_cli.clients.cohort import Client as Client
    from fedlora_cli.clients.cohort import Cohort as Cohort
    from fedlora_cli.clients.cohort import align as align
    from fedlora_cli.clients.reading import read_clients as read_clients
    from fedlora_cli.errors import ClusterError as ClusterError
    from fedlora_cli.errors import FedloraError as FedloraError
    from fedlora_cli.errors import InputError as InputError
    from fedlora_cli.errors import MethodError as MethodError
    from fedlora_cli.errors import OutputError as OutputError
    from fedlora_cli.errors import UsageError as UsageError
    from fedlora_cli.errors import VerificationError as VerificationError
    from fedlora_cli.execution.cluster import ClusterWarning as ClusterWarning
    from fedlora_cli.files.locations import location as location
    from fedlora_cli.formats import read as read
    from fedlora_cli.linalg.factors import Factors as Factors
    from fedlora_cli.methods import METHODS as METHODS
    from fedlora_cli.methods import register as register
    from fedlora_cli.methods.method import Method as Method
    from fedlora_cli.methods.weights import Holdings as Holdings
    from fedlora_cli.methods.weights import Weights as Weights
    from fedlora_cli.methods.weights import by_holders as by_holders
    from fedlora_cli.methods.weights import by_norm as by_norm
    from fedlora_cli.methods.weights import by_samples as by_samples
    from fedlora_cli.methods.weights import uniform as uniform
    from fedlora_cli.reports.aggregate import AggregateReport as AggregateReport
    from fedlora_cli.reports.compare import CompareReport as CompareReport
    from fedlora_cli.reports.diagnose import DiagnoseReport as DiagnoseReport
    from fedlora_cli.reports.distribution import DistributeReport as DistributeReport
    from fedlora_cli.reports.distribution import InitReport as InitReport
    from fedlora_cli.reports.inspect import InspectReport as InspectReport
    from fedlora_cli.reports.predict import PredictReport as PredictReport
    from fedlora_cli.reports.simulate import SimulateReport as SimulateReport
    from fedlora_cli.rounds.aggregate import aggregate as aggregate
    from fedlora_cli.rounds.distribute import distribute as distribute
    from fedlora_cli.rounds.in_memory import aggregate_state_dicts as aggregate_state_dicts
    from fedlora_cli.rounds.in_memory import cut as cut
    from fedlora_cli.rounds.in_memory import distribute_state_dict as distribute_state_dict
    from fedlora_cli.rounds.in_memory import init_state_dicts as init_state_dicts
    from fedlora_cli.rounds.initialize import initialize as initialize
    from fedlora_cli.rounds.options import DistributeOptions as DistributeOptions
    from fedlora_cli.rounds.options import InitOptions as InitOptions
    from fedlora_cli.rounds.state_dict import StateDict as StateDict
    from fedlora_cli.simulation.arm import Arm as Arm
    from fedlora_cli.simulation.options import Setting as Setting
    from fedlora_cli.simulation.options import SimulateOptions as SimulateOptions
    from fedlora_cli.simulation.options import Source as Source
    from fedlora_cli.simulation.options import Split as Split
    from fedlora_cli.simulation.options import Training as Training
    from fedlora_cli.simulation.simulate import simulate as simulate
    from fedlora_cli.version import __version__ as __version__

#: The public names by module.
_NAMES = {
    "adapters.adapter": "Adapter",
    "aggregation.options": "AggregateOptions",
    "analysis.comparison.compare": "compare",
    "analysis.diagnosis.diagnose": "diagnose",
    "analysis.diagnosis.options": "DiagnoseOptions",
    "analysis.inspection.inspect": "inspect",
    "analysis.inspection.options": "InspectOptions",
    "analysis.prediction.options": "PredictOptions",
    "analysis.prediction.predict": "predict",
    "clients.cohort": "Client Cohort align",
    "clients.reading": "read_clients",
    "errors": "ClusterError FedloraError InputError MethodError OutputError UsageError "
    "VerificationError",
    "execution.cluster": "ClusterWarning",
    "files.locations": "location",
    "formats": "read",
    "linalg.factors": "Factors",
    "methods": "METHODS register",
    "methods.method": "Method",
    "methods.weights": "Holdings Weights by_holders by_norm by_samples uniform",
    "reports.aggregate": "AggregateReport",
    "reports.compare": "CompareReport",
    "reports.diagnose": "DiagnoseReport",
    "reports.distribution": "DistributeReport InitReport",
    "reports.inspect": "InspectReport",
    "reports.predict": "PredictReport",
    "reports.simulate": "SimulateReport",
    "rounds.aggregate": "aggregate",
    "rounds.distribute": "distribute",
    "rounds.initialize": "initialize",
    "rounds.in_memory": "aggregate_state_dicts cut distribute_state_dict init_state_dicts",
    "rounds.state_dict": "StateDict",
    "rounds.options": "DistributeOptions InitOptions",
    "simulation.arm": "Arm",
    "simulation.options": "Setting SimulateOptions Source Split Training",
    "simulation.simulate": "simulate",
    "version": "__version__",
}

_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

if not TYPE_CHECKING:  # type checkers need a literal list, or none
    __all__ = sorted(_MODULES)


def __dir__() -> list[str]:
    return sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
