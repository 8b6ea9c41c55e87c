"""Flower: a strategy for clients of different ranks, and the side of the clients.

Extra: `fedlora[flower]`.

Server: `FedLoRA(lora_config=model.peft_config["default"])` is started with the arrays
`to_record(get_peft_model_state_dict(model))`. Client: `load_adapter(model, message)`, and after the
training the reply `adapter_records(model, context, num_examples)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

try:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp import Grid
    from flwr.serverapp.exception import AggregationError
    from flwr.serverapp.strategy import FedAvg, Result
except ImportError as error:
    raise ImportError(
        f"fedlora_cli.integrations.flower: Flower cannot be used ({error}); "
        "pip install 'fedlora[flower]'"
    ) from None


from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.errors import FedloraError, UsageError
from fedlora_cli.integrations.federation import DEFAULTS, Federation
from fedlora_cli.integrations.flower_client import adapter_card as adapter_card
from fedlora_cli.integrations.flower_client import adapter_records as adapter_records
from fedlora_cli.integrations.flower_client import client_name as client_name
from fedlora_cli.integrations.flower_client import load_adapter as load_adapter
from fedlora_cli.integrations.flower_records import CARD, card
from fedlora_cli.integrations.flower_records import to_record as to_record
from fedlora_cli.integrations.flower_records import to_tensors as to_tensors
from fedlora_cli.integrations.flower_replies import (
    SECURE,
    answers,
    read_replies,
    uploads_in,
    with_usual_metrics,
)
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.rounds.state_dict import StateDict

_LOG = logging.getLogger("flwr")

#: Seconds to wait for the answers to a QUERY.
_PATIENCE = 600.0


class FedLoRA(FedAvg):  # type: ignore[misc]
    """Flower's strategy for LoRA adapters of different ranks. All other arguments are FedAvg's.

    - `lora_config`: the LoraConfig of the initial arrays.
    - `method`, `options`: as of `aggregate`; by default, a faulty client is skipped.
    - `ranks`: the rank of each client, by name; default: the rank of its last reply.
    - `ask_nodes`: before the first training of a node, ask for its name and rank by a QUERY.
    - `rounds`: a folder for the global adapters of all rounds, from which a later run resumes.
    - `keep_clients`: keep the clients' adapters there too.
    - `min_completed`: with fewer usable replies, the last global adapter stays.

    `report` is the report of the last aggregation, `federation` the state between two rounds.
    """

    def __init__(
        self,
        *,
        lora_config: Any,
        method: str | None = None,
        options: AggregateOptions = DEFAULTS,
        ranks: Mapping[str, int] | Callable[[str], int | None] | None = None,
        ask_nodes: bool = False,
        rounds: Path | str | None = None,
        keep_clients: bool = False,
        min_completed: int = 1,
        **fedavg: Any,
    ) -> None:
        super().__init__(**fedavg)
        chosen = replace(
            options,
            method=options.method if method is None else method,
            min_clients=max(min_completed, options.min_clients),
        )
        folder = None if rounds is None else Path(rounds)
        self.federation = Federation(chosen, folder, keep_clients).resumed()
        self.report: AggregateReport | None = None
        self.lora_config = lora_config
        self.ranks = ranks.get if isinstance(ranks, Mapping) else ranks
        self.ask_nodes = ask_nodes or ranks is not None
        self._names: dict[int, str] = {}
        self._asked: set[int] = set()
        self._arrays: ArrayRecord | None = None
        self._running = self._wrapped = False

    @property
    def round(self) -> int:
        """The number of finished rounds, those of earlier runs included."""
        return self.federation.round

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """FedAvg's `start`. After finished rounds in `rounds`, their last adapter replaces
        `initial_arrays`, and `num_rounds` further rounds follow.
        """
        arrays, self._running = self._begin(initial_arrays), True
        try:
            result = super().start(grid, arrays, *args, **kwargs)
        finally:
            self._running = False
        result.arrays = self._arrays  # also if no round had usable replies
        return result

    def summary(self) -> None:
        """Log the configuration. `start` calls this, also that of a strategy around this one."""
        self._wrapped = not self._running
        super().summary()
        _LOG.info("\t└──> FedLoRA: %s, from round %s", self.federation.options.method, self.round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each sampled node, with the adapter at the rank of its client."""
        self._check(arrays)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        if self.ask_nodes:
            self._ask(grid, [message.metadata.dst_node_id for message in messages])
        return self._addressed(messages, self.round + 1)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each sampled node, with the adapter at the rank of its client."""
        self._check(arrays)
        messages = list(super().configure_evaluate(server_round, arrays, config, grid))
        return self._addressed(messages, self.round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new global adapter and the mean metrics; None without enough usable replies."""
        clients, faults = read_replies(replies, self._names)
        _LOG.info("aggregate_train: %s replies and %s failures", len(clients), len(faults))
        self._names |= {client.node: client.name for client in clients}
        uploads, bad = uploads_in(clients, self.weighted_by_key)
        for fault in (*faults, *bad):
            _LOG.warning("left out: %s", fault)
        report, reason = self._next(uploads)
        if report is None:
            _LOG.warning("the last global adapter stays: %s", reason)
            return None, None
        used = {row.name for row in report.clients}
        for client in report.left_out:
            _LOG.warning("left out: %s: %s", client.name, client.reason)
        _LOG.info("FedLoRA: round %s: rank %s from %s clients", self.round, report.rank, len(used))
        self.report = report
        self._arrays = to_record(self._current.tensors)
        metrics, others = with_usual_metrics(client for client in clients if client.name in used)
        for name in others:
            _LOG.warning("left out of the mean metrics: %s has other metrics than most", name)
        return self._arrays, self.train_metrics_aggr_fn(metrics, self.weighted_by_key)

    def initialize_parameters(self, **_: Any) -> NoReturn:
        """Refuse Flower's workflows for secure aggregation, which begin by this call."""
        raise AggregationError("FedLoRA: " + "; ".join(SECURE))

    @property
    def _current(self) -> StateDict:
        return cast("StateDict", self.federation.current)  # since _begin

    def _begin(self, arrays: ArrayRecord) -> ArrayRecord:
        """The arrays to start from: those of the last finished round, or the initial arrays."""
        initial = StateDict(to_tensors(arrays), self.lora_config)
        try:
            if self.round == 0:
                self.federation = self.federation.start(initial)
            else:  # the rank of the output is that of the initial adapter
                options = replace(self.federation, rounds=None).start(initial).options
                self.federation = replace(self.federation, options=options)
                arrays = to_record(self._current.tensors)
        except FedloraError as error:
            raise AggregationError(str(error)) from error
        self._arrays = arrays
        return arrays

    def _check(self, arrays: ArrayRecord) -> None:
        """Raise AggregationError if `arrays` are not those of the global adapter: the next round
        would start without the changes of another strategy, such as the noise of a wrapper.
        """
        if self._arrays is None:
            self._begin(arrays)
        if self._wrapped or not _same(arrays, self._arrays):
            found = "another strategy, such as a wrapper for differential privacy, changes arrays"
            cure = "start FedLoRA itself; clients can clip and add noise by LocalDpMod"
            raise AggregationError(f"FedLoRA: {found}; {cure}")

    def _next(self, uploads: Mapping[str, StateDict]) -> tuple[AggregateReport | None, str]:
        """The report of another round; None and a reason if the last adapter stays.

        Raises AggregationError for options that no round can use, and if files cannot be written.
        """
        try:
            self.federation, report, reason = self.federation.next(uploads)
        except UsageError as error:
            if self.report is None:
                raise AggregationError(str(error)) from error
            return None, str(error)  # a robust rule needs more clients than there are this time
        except FedloraError as error:
            raise AggregationError(str(error)) from error
        return report, reason

    def _ask(self, grid: Grid, nodes: Iterable[int]) -> None:
        """Ask the nodes that are not known yet for the names and ranks of their clients."""
        live = set(grid.get_node_ids())
        self._names = {node: name for node, name in self._names.items() if node in live}
        queries = [
            Message(
                content=RecordDict({CARD: ConfigRecord()}),
                message_type=MessageType.QUERY,
                dst_node_id=node,
            )
            for node in nodes
            if node not in self._names and node not in self._asked
        ]
        self._asked |= {query.metadata.dst_node_id for query in queries}
        replies = grid.send_and_receive(queries, timeout=_PATIENCE) if queries else ()
        met, faults = answers(replies, self._names)
        for fault in faults:
            _LOG.warning("not known by name: %s", fault)
        for client, rank, scaling in met:
            self._names[client.node] = client.name
            if client.name not in self.federation.roster:
                # More than the global rank is not sent: its client fills the rest.
                rank = min(rank, self._current.rank)
                self.federation = self.federation.with_member(client.name, rank, scaling)

    def _addressed(self, messages: Iterable[Message], number: int) -> list[Message]:
        """The messages, each with the adapter at the rank and scaling of its client, and with the
        number of the round in all runs.
        """
        records: dict[int, tuple[ArrayRecord, ConfigRecord]] = {}
        result = []
        for message in messages:
            adapter = self._adapter_for(self._names.get(message.metadata.dst_node_id))
            if id(adapter) not in records:  # clients of one rank share the arrays
                records[id(adapter)] = (
                    to_record(adapter.tensors),
                    card(adapter, ordered=self.federation.is_ordered),
                )
            arrays, terms = records[id(adapter)]
            config = dict(message.content.config_records[self.configrecord_key])
            content = RecordDict(
                {
                    self.arrayrecord_key: arrays,
                    self.configrecord_key: ConfigRecord({**config, "server-round": number}),
                    CARD: terms,
                }
            )
            result.append(
                Message(
                    content=content,
                    message_type=message.metadata.message_type,
                    dst_node_id=message.metadata.dst_node_id,
                )
            )
        return result

    def _adapter_for(self, name: str | None) -> StateDict:
        """The global adapter at the rank of a client; whole for an unknown client."""
        if name is None:
            return self._current
        rank = None if self.ranks is None else self.ranks(name)
        member = self.federation.roster.get(name)
        if rank is not None and (member is None or member.rank != rank):
            scaling = self._current.scaling if member is None else member.scaling
            self.federation = self.federation.with_member(name, rank, scaling)
        try:
            return self.federation.for_client(name) or self._current
        except FedloraError as error:  # a rank or a scaling that no adapter here can have
            _LOG.warning("%s gets the whole adapter: %s", name, error)
            return self._current


def _same(arrays: ArrayRecord, others: ArrayRecord | None) -> bool:
    """Whether two records hold the same arrays."""
    if arrays is others or others is None:
        return arrays is others
    return arrays.keys() == others.keys() and all(
        array.data == others[name].data for name, array in arrays.items()
    )
