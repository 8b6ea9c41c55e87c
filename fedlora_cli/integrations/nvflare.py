"""NVFlare: LoRA adapters of different ranks, aggregated on the server. Extra: `fedlora[nvflare]`.

Server: `FedLoRARecipe`, or its parts `FedLoRAAggregator`, `FedLoRARankFilter` and
`FedLoRAPersistor`. Sites: `load_adapter` and `lora_meta`. The parts share the state of the
federation through a private property of NVFlare's context. Constructor arguments of components
travel as JSON, so they are plain values.
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
    LORA,
    at_fixed_rank,
    check_shapes,
    mean_metrics,
    settings,
    shapes_of,
    untrained,
    upload_of,
)
from fedlora_cli.rounds.in_memory import cut, distribute_state_dict
from fedlora_cli.rounds.state_dict import StateDict

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
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

#: The key of a site's sample count in the metadata of its result.
NUM_EXAMPLES = "num_examples"

#: The property of NVFlare's context that holds the federation: private, so it stays on the server.
_FEDERATION = "fedlora.federation"

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
    - `rounds`: folder on the server. Each result is written when it arrives and leaves the memory;
      the folder's last round is the state from which the next job goes on.
    - `min_completed`: with fewer usable results, the global adapter stays as it was.
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
        on_bad_client: str = "skip",
        min_completed: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # NVFlare exports the attributes that have the names of the arguments.
        self.method, self.quorum, self.rank, self.momentum = method, quorum, rank, momentum
        self.base, self.weight_key, self.rounds = base, weight_key, rounds
        self.on_bad_client, self.min_completed, self.options = on_bad_client, min_completed, options
        self._settings = settings(
            options or {},
            method=method,
            quorum=quorum,
            rank=rank,
            momentum=momentum,
            base=base,
            on_bad_client=on_bad_client,
        )
        self._federation: Federation | None = None
        self._fixed: dict[str, tuple[int, ...]] = {}
        self.reset_stats()

    def reset_stats(self) -> None:
        self._uploads: dict[str, StateDict] = {}
        self._metrics: dict[str, tuple[float, Mapping[str, Any]]] = {}

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
        """Take the result of a site. Raises FedloraError, which NVFlare does not show in full."""
        site = str(model.meta["client_name"])
        try:
            federation = self._state()
            upload = upload_of(site, model, self.weight_key)
            if federation.rounds is None:
                self._uploads[site] = upload
            else:
                federation.spool(site, upload)
        except FedloraError as error:
            self.warning(f"{site} left out: {error}")
            raise
        self._metrics[site] = (upload.samples or 1.0, model.metrics or {})

    def aggregate_model(self) -> FLModel:
        """The next global adapter, or no change. Raises FedloraError if NVFlare cannot store it."""
        try:
            federation, report, text = self._state().next(self._uploads)
            if report is not None:
                check_shapes(_current(federation).tensors, self._fixed)
        except FedloraError as error:
            self.error(str(error))
            raise
        self._federation = federation
        if self.fl_ctx is not None:
            self.fl_ctx.set_prop(_FEDERATION, federation, private=True, sticky=True)
        if report is None:
            self.warning(text)
            return FLModel(ParamsType.DIFF, params={})  # no difference: the last adapter stays
        self.info(text)
        for left_out in report.left_out:
            self.warning(f"{left_out.path} left out: {left_out.reason}")
        tensors = dict(_current(federation).tensors)
        return FLModel(ParamsType.FULL, params=tensors, metrics=mean_metrics(self._metrics))

    def _state(self) -> Federation:
        """The federation: of this run, of the persistor, of the folder of rounds, or a new one."""
        if self._federation is None:
            shared = None if self.fl_ctx is None else self.fl_ctx.get_prop(_FEDERATION)
            stored = (
                None if self.fl_ctx is None else self.fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
            )
            options = self._settings
            if shared is None and stored is not None:
                # Another persistor, such as PTFileModelPersistor: it refuses other shapes.
                self._fixed = shapes_of(stored[ModelLearnableKey.WEIGHTS])
                options = at_fixed_rank(options, self._fixed)
            federation = _started(self.rounds) if shared is None else shared
            self._federation = replace(
                federation, options=options, min_completed=self.min_completed
            )
        return self._federation


class FedLoRARankFilter(DXOFilter):  # type: ignore[misc]
    """Sends the global adapter to each site at its rank and alpha. A server output filter.

    A site's rank is that of its last result. `ranks` has those of the first round, such as
    {"site-1": 4}, at the scaling of the global adapter; other sites get the whole adapter.
    """

    def __init__(self, ranks: dict[str, int] | None = None) -> None:
        super().__init__([DataKind.WEIGHTS], [DataKind.WEIGHTS])
        self.ranks = ranks

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        site = fl_ctx.get_peer_context().get_identity_name()
        rank = (self.ranks or {}).get(site)
        federation: Federation | None = fl_ctx.get_prop(_FEDERATION)
        if federation is None or federation.current is None:
            # Before the first round, an adapter of another persistor has no config.
            tensors = dxo.data if rank is None else untrained(dxo.data, rank)
            return DXO(DataKind.WEIGHTS, data=tensors, meta=dict(dxo.meta))
        state = federation.for_client(site)
        if rank is not None and site not in federation.roster:
            state = cut(state, rank)
        meta = {**dxo.meta, LORA: dict(state.config)}
        return DXO(DataKind.WEIGHTS, data=dict(state.tensors), meta=meta)


class FedLoRAPersistor(ModelPersistor):  # type: ignore[misc]
    """Starts from a PEFT adapter, and writes PEFT adapters. Any rank may follow any rank.

    - `adapter`: folder on the server of the first global adapter, as `fedlora init` makes it.
    - `rounds`: folder on the server of all rounds. The last whole round, if any, is the start.

    The job's result has the last global adapter in `global/`, and in `best_global/` the adapter
    with the best metric of the sites.
    """

    def __init__(self, adapter: str, rounds: str | None = None) -> None:
        super().__init__()
        self.adapter, self.rounds = adapter, rounds

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        try:
            federation = _started(self.rounds)
            if federation.current is None:
                federation = replace(federation, current=StateDict.load(self.adapter))
        except FedloraError as error:
            self.log_error(fl_ctx, str(error))
            raise
        fobs.register(TensorDecomposer)  # or the sites cannot read tensors, and wait for ever
        fl_ctx.set_prop(_FEDERATION, federation, private=True, sticky=True)
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
    - `ranks`: see `FedLoRARankFilter`.
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
        rounds: str | Path | None = None,
        name: str = "fedlora",
        **arguments: Any,
    ) -> None:
        for argument in _SET_BY_RECIPE:
            if argument in arguments:
                cure = "leave it out: fedlora reads each site's adapter, in full and unencrypted"
                raise UsageError("FedLoRARecipe", f"{argument} is given", cure)
        # The server runs in another folder.
        place = None if rounds is None else str(Path(rounds).absolute())
        known = signature(FedLoRAAggregator).parameters
        own = {key: arguments.pop(key) for key in known if key in arguments}
        if adapter is not None:
            start = str(Path(adapter).absolute())
            arguments["model_persistor"] = FedLoRAPersistor(start, place)
        super().__init__(
            name=name,
            min_clients=min_clients,
            train_script=train_script,
            aggregator=FedLoRAAggregator(rounds=place, **own),
            server_expected_format=ExchangeFormat.PYTORCH,
            params_transfer_type=TransferType.FULL,
            **arguments,
        )
        self.add_server_output_filter(FedLoRARankFilter(ranks), tasks=[AppConstants.TASK_TRAIN])


def lora_meta(model: Any, samples: float, weight_key: str = NUM_EXAMPLES) -> dict[str, Any]:
    """The metadata of a site's result: its sample count, and the config of its adapter.

    For `FLModel(meta=...)`, and for `model.__fl_meta__` of NVFlare's patch of the HF Trainer.
    """
    return {weight_key: samples, LORA: dict(StateDict.of(model).config)}


def load_adapter(model: Any, received: FLModel, adapter_name: str = "default") -> None:
    """Load the global adapter into a PEFT model, at the model's rank and scaling.

    Raises InputError for an adapter that does not fit.
    """
    from peft import set_peft_model_state_dict

    own = StateDict.of(model, adapter_name=adapter_name)
    tensors = received.params
    if LORA in received.meta:
        state = StateDict(tensors, received.meta[LORA])
        if shapes_of(tensors) != shapes_of(own.tensors) or state.scaling != own.scaling:
            state = distribute_state_dict(state, like={"site": own})["site"]
        tensors = state.tensors
    elif shapes_of(tensors) != shapes_of(own.tensors):
        tensors = untrained(tensors, own.rank)
    set_peft_model_state_dict(model, dict(tensors), adapter_name)


def _started(rounds: str | None) -> Federation:
    """The federation after the last whole round in the folder, or before its first round."""
    return Federation() if rounds is None else Federation.resume(Path(rounds))


def _write(name: str, fl_ctx: FLContext) -> None:
    """Write the current global adapter into a folder of the job's result."""
    state = _current(fl_ctx.get_prop(_FEDERATION))
    state.save(Path(fl_ctx.get_prop(FLContextKey.APP_ROOT)) / name)


def _current(federation: Federation) -> StateDict:
    """The global adapter. Raises UsageError before the first one."""
    if federation.current is None:
        raise UsageError("federation", "it has no global adapter yet", "aggregate a round first")
    return federation.current
