"""NVFlare: LoRA adapters of different ranks, aggregated on the server. Extra: `fedlora[nvflare]`.

Server: `FedLoRARecipe`, or its parts `FedLoRAAggregator`, `FedLoRARankFilter` and
`FedLoRAPersistor`. Sites: `load_adapter` and `lora_meta`. The parts share the federation as a
private property of NVFlare's context. Arguments of components travel as JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from fedlora_cli.errors import FedloraError, UsageError
from fedlora_cli.integrations.federation import Federation
from fedlora_cli.integrations.nvflare_results import (
    at_fixed_rank,
    check_shapes,
    mean_metrics,
    settings,
    upload_of,
)
from fedlora_cli.integrations.nvflare_site import LORA, NUM_EXAMPLES, ORDERED, shapes_of, untrained
from fedlora_cli.integrations.nvflare_site import load_adapter as load_adapter
from fedlora_cli.integrations.nvflare_site import lora_meta as lora_meta
from fedlora_cli.rounds.state_dict import StateDict
from fedlora_cli.text import first_line

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.abstract.model import (
        ModelLearnable,
        ModelLearnableKey,
        make_model_learnable,
    )
    from nvflare.app_common.abstract.model_persistor import ModelPersistor
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
    from nvflare.app_opt.pt.decomposers import TensorDecomposer
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.client.config import ExchangeFormat, TransferType
    from nvflare.fuel.utils import fobs
except ImportError as error:
    raise ImportError(
        f"fedlora_cli.integrations.nvflare: NVFlare cannot be used ({error}); "
        "pip install 'fedlora[nvflare]'"
    ) from None

#: Properties of NVFlare's context, private to the server: the federation, and whether its persistor
#: is FedLoRAPersistor.
_FEDERATION, _ANY_RANK = "fedlora.federation", "fedlora.any_rank"

#: The folders in the job's result with the last and the best global adapter.
_LAST, _BEST = "global", "best_global"

#: Arguments of FedAvgRecipe that FedLoRARecipe sets, or that FedAvg ignores beside an aggregator.
_SET_BY_RECIPE = (
    "aggregator",
    "aggregator_data_kind",
    "aggregation_weights",
    "exclude_vars",
    "params_transfer_type",
    "server_expected_format",
)


class FedLoRAAggregator(ModelAggregator):  # type: ignore[misc]
    """Aggregates the adapters of a round by a method of fedlora, for FedAvg and ScatterAndGather.

    - `weight_key`: the sample count in the metadata of a site's result.
    - `rounds`: folder on the server. Each result is written when it arrives and leaves the memory.
      The next job with this folder goes on after its last round. `keep_clients` keeps the results.
    - `min_completed`: with fewer good results, the global adapter stays as it was.
    - `options`: further fields of `AggregateOptions`, such as {"clip_norm": "auto"}.

    Raises UsageError.
    """

    def __init__(
        self,
        method: str = "raflora",
        quorum: float | None = None,
        rank: int | None = None,
        momentum: float = 0.0,
        base: str | None = None,
        weight_key: str = NUM_EXAMPLES,
        rounds: str | None = None,
        keep_clients: bool = False,
        on_bad_client: str = "skip",
        min_completed: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # NVFlare exports the attributes that have the names of the arguments.
        self.method, self.quorum, self.rank, self.momentum = method, quorum, rank, momentum
        self.base, self.weight_key = base, weight_key
        self.rounds, self.keep_clients = rounds, keep_clients
        self.on_bad_client, self.min_completed, self.options = on_bad_client, min_completed, options
        self.settings = settings(
            options or {},
            method=method,
            quorum=quorum,
            rank=rank,
            momentum=momentum,
            base=base,
            on_bad_client=on_bad_client,
            min_clients=min_completed,
        )
        self._federation: Federation | None = None
        self._fixed: dict[str, tuple[int, ...]] = {}  # of a persistor that keeps its shapes
        self.reset_stats()

    def reset_stats(self) -> None:
        self._uploads: dict[str, StateDict] = {}
        self._metrics: dict[str, Mapping[str, Any]] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Start or resume the federation before the persistor loads the first adapter; then keep
        the rank of another persistor. An error ends the job.
        """
        super().handle_event(event_type, fl_ctx)
        try:
            if event_type == EventType.START_RUN:
                self._share(self._state())
            if event_type == AppEventType.INITIAL_MODEL_LOADED and not fl_ctx.get_prop(_ANY_RANK):
                stored = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
                self._fixed = shapes_of(stored[ModelLearnableKey.WEIGHTS])
                federation = self._state()
                options = at_fixed_rank(federation.options, self._fixed)
                self._share(replace(federation, options=options))
        except FedloraError as error:
            self.system_panic(str(error), fl_ctx)

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """ScatterAndGather's call: the name of the site is the one of its connection."""
        self.fl_ctx = fl_ctx
        model = FLModelUtils.from_shareable(shareable, fl_ctx)
        model.meta["client_name"] = fl_ctx.get_peer_context().get_identity_name()
        try:
            self.accept_model(model)
        except FedloraError:
            return False
        return True

    def accept_model(self, model: FLModel) -> None:
        """Take the result of a site. Errors are logged in a line: NVFlare may not show them.

        Raises InputError for a result that is no adapter.
        """
        site = str(model.meta["client_name"])
        try:
            federation = self._state()
            upload = upload_of(site, model, self.weight_key)
            if federation.rounds is None:
                self._uploads[site] = upload
            else:
                federation.spool(site, upload)
        except Exception as error:
            reason = str(error) if isinstance(error, FedloraError) else first_line(error)
            self.warning(f"{site} left out: {reason}")
            raise
        self._metrics[site] = model.metrics or {}

    def aggregate_model(self) -> FLModel:
        """The next global adapter, or no change. Raises FedloraError if NVFlare cannot store it."""
        try:
            federation, report, reason = self._state().next(self._uploads)
            if report is None:
                self.warning(f"the global adapter stays as it was: {reason}")
                return FLModel(ParamsType.DIFF, params={})  # no difference
            tensors = _current(federation).tensors
            check_shapes(tensors, self._fixed)
        except FedloraError as error:
            self.error(str(error))
            raise
        self._share(federation)
        for client in report.left_out:
            self.warning(f"{client.name} left out: {client.reason}")
        names = ", ".join(client.name for client in report.clients)
        self.info(f"round {federation.round} of {report.method}: {names}; rank {report.rank}")
        samples = {client.name: client.samples for client in report.clients}
        metrics = mean_metrics(samples, self._metrics) or None
        return FLModel(ParamsType.FULL, params=dict(tensors), metrics=metrics)

    def _state(self) -> Federation:
        """The federation; with `_share`, the persistor may have started it."""
        if self.fl_ctx is not None and self.fl_ctx.get_prop(_FEDERATION) is not None:
            self._federation = self.fl_ctx.get_prop(_FEDERATION)
        if self._federation is None:
            rounds = None if self.rounds is None else Path(self.rounds)
            federation = Federation(self.settings, rounds, self.keep_clients)
            self._federation = federation.resumed()
        return self._federation

    def _share(self, federation: Federation) -> None:
        self._federation = federation
        if self.fl_ctx is not None:
            self.fl_ctx.set_prop(_FEDERATION, federation, private=True, sticky=True)


class FedLoRARankFilter(DXOFilter):  # type: ignore[misc]
    """Sends the global adapter to each site at its rank and alpha. A server output filter.

    A site's rank and alpha are those of its last result. For the first round, `ranks` has them,
    such as {"site-1": 4}, and `alphas` those at another scaling than that of the global adapter.
    Sites without a rank get the whole adapter.
    """

    def __init__(
        self, ranks: dict[str, int] | None = None, alphas: dict[str, float] | None = None
    ) -> None:
        super().__init__([DataKind.WEIGHTS], [DataKind.WEIGHTS])
        self.ranks, self.alphas = ranks, alphas

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        site = fl_ctx.get_peer_context().get_identity_name()
        rank = (self.ranks or {}).get(site)
        federation: Federation = fl_ctx.get_prop(_FEDERATION) or Federation()
        whole = federation.current
        if whole is None:
            # Before the first round, an adapter of another persistor has no config.
            tensors = dxo.data if rank is None else untrained(dxo.data, rank)
            return DXO(DataKind.WEIGHTS, data=tensors, meta=dict(dxo.meta))
        if rank is not None and site not in federation.roster:
            alpha = (self.alphas or {}).get(site)
            scaling = whole.scaling if alpha is None else alpha / rank
            federation = federation.with_member(site, rank, scaling)
        state = federation.for_client(site) or whole
        meta = {**dxo.meta, LORA: dict(state.config), ORDERED: federation.is_ordered}
        return DXO(DataKind.WEIGHTS, data=dict(state.tensors), meta=meta)


class FedLoRAPersistor(ModelPersistor):  # type: ignore[misc]
    """Starts from a PEFT adapter and writes PEFT adapters, of any rank.

    `adapter` is the folder on the server of the first global adapter, as `fedlora init` makes it.
    The aggregator's folder of rounds, if it has any, comes first. The job's result has the last
    global adapter in `global/`, and in `best_global/` the adapter with the sites' best metric.
    """

    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter = adapter

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        federation: Federation = fl_ctx.get_prop(_FEDERATION) or Federation()
        try:
            federation = federation.start(StateDict.load(self.adapter)).resumed()
        except FedloraError as error:
            self.log_error(fl_ctx, str(error))
            raise
        fobs.register(TensorDecomposer)  # or the sites cannot read tensors, and wait for ever
        fl_ctx.set_prop(_FEDERATION, federation, private=True, sticky=True)
        fl_ctx.set_prop(_ANY_RANK, True, private=True, sticky=True)
        return make_model_learnable(dict(_current(federation).tensors), {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        _write(_LAST, fl_ctx)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.GLOBAL_BEST_MODEL_AVAILABLE:
            _write(_BEST, fl_ctx)


class FedLoRARecipe(FedAvgRecipe):  # type: ignore[misc]
    """FedAvg of LoRA adapters of different ranks: aggregator, filter and persistor.

    - `adapter`: folder on the server of the first global adapter; instead, `model` or
      `model_persistor` of FedAvgRecipe, whose rank stays for the whole job.
    - `ranks`, `alphas`: see `FedLoRARankFilter`.
    - `arguments`: those of FedLoRAAggregator, and those of FedAvgRecipe. Raises UsageError for
      those of FedAvgRecipe that are set here.
    """

    def __init__(
        self,
        *,
        min_clients: int,
        train_script: str,
        adapter: str | Path | None = None,
        ranks: dict[str, int] | None = None,
        alphas: dict[str, float] | None = None,
        rounds: str | Path | None = None,
        name: str = "fedlora",
        **arguments: Any,
    ) -> None:
        for argument in _SET_BY_RECIPE:
            if argument in arguments:
                cure = "leave it out: fedlora reads each site's adapter, in full and unencrypted"
                raise UsageError("FedLoRARecipe", f"{argument} is given", cure)
        known = signature(FedLoRAAggregator).parameters
        own = {key: arguments.pop(key) for key in known if key in arguments}
        if rounds is not None:  # the server runs in another folder
            own["rounds"] = str(Path(rounds).absolute())
        if adapter is not None:
            arguments["model_persistor"] = FedLoRAPersistor(str(Path(adapter).absolute()))
        aggregator = FedLoRAAggregator(**own)
        if "model_persistor" not in arguments:  # PTFileModelPersistor
            at_fixed_rank(aggregator.settings, {})
        super().__init__(
            name=name,
            min_clients=min_clients,
            train_script=train_script,
            aggregator=aggregator,
            server_expected_format=ExchangeFormat.PYTORCH,
            params_transfer_type=TransferType.FULL,
            **arguments,
        )
        # The server has fedlora; NVFlare would copy parts of it into the job.
        self._job.set_app_packages(["fedlora_cli"])
        rank_filter = FedLoRARankFilter(ranks, alphas)
        self.add_server_output_filter(rank_filter, tasks=[AppConstants.TASK_TRAIN])


def _current(federation: Federation) -> StateDict:
    """The global adapter. Raises UsageError before the first one."""
    if federation.current is None:
        raise UsageError("federation", "it has no global adapter yet", "aggregate a round first")
    return federation.current


def _write(name: str, fl_ctx: FLContext) -> None:
    """Write the current global adapter into a folder of the job's result."""
    folder = Path(fl_ctx.get_prop(FLContextKey.APP_ROOT)) / name
    _current(fl_ctx.get_prop(_FEDERATION)).save(folder, force=True)
