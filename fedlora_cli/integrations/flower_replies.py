"""Replies of clients in Flower, which are untrusted: names, cards, adapters and metrics."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from fedlora_cli.clients.names import folded
from fedlora_cli.errors import InputError, catching_faults
from fedlora_cli.integrations.flower_records import CARD, config_in, views
from fedlora_cli.rounds.state_dict import StateDict
from fedlora_cli.text import printable

#: A client's name is also the name of a folder, of at most 255 bytes, and stands in logs.
_NAME = re.compile(r"\w[\w .@+-]{0,59}")

#: A word in the errors of clients that run Flower's mods for secure aggregation.
_SECURE = "secaggplus"

#: What is wrong with secure aggregation, and what to do.
SECURE = (
    "secure aggregation (SecAgg, SecAgg+) hides the single adapters, which FedLoRA needs",
    "remove secagg_mod and secaggplus_mod from the ClientApp",
)

_CURE = "reply with adapter_records"


@dataclass(frozen=True, eq=False)
class Reply:
    """A reply with content: the number of its node and the name of its client."""

    node: int
    name: str
    content: RecordDict


def read_replies(
    messages: Iterable[Message], names: Mapping[int, str]
) -> tuple[list[Reply], list[InputError]]:
    """The usable replies in the order of their names, and the faults of the others.

    `names` are those of the nodes so far: of two nodes with one name, it stays with its node.
    """
    faults: list[InputError] = []
    rivals: dict[str, list[Reply]] = {}
    for message in messages:
        with catching_faults(faults.append):
            reply = _reply(message)
            rivals.setdefault(folded(reply.name), []).append(reply)
    replies = []
    for same in rivals.values():
        first, *others = sorted(same, key=lambda one: (names.get(one.node) != one.name, one.node))
        replies.append(first)
        faults += [_taken(other, first.node) for other in others]
    return sorted(replies, key=lambda reply: reply.name), faults


def answers(
    messages: Iterable[Message], names: Mapping[int, str]
) -> tuple[list[tuple[Reply, int, float]], list[InputError]]:
    """The answers to a QUERY with rank and scaling, and the faults of the others.

    `names` are those of the nodes so far, which keep them.
    """
    replies, faults = read_replies(messages, names)
    nodes = {folded(name): node for node, name in names.items()}
    met = []
    for reply in replies:
        if folded(reply.name) in nodes:
            faults.append(_taken(reply, nodes[folded(reply.name)]))
            continue
        terms = reply.content.config_records[CARD]
        rank, scaling = terms.get("rank"), terms.get("scaling")
        if type(rank) is int and rank > 0 and type(scaling) is float and 0 < scaling < math.inf:
            met.append((reply, rank, scaling))
        else:
            found = f"rank {rank!r:.40} and scaling {scaling!r:.40}"
            faults.append(InputError(f"client {reply.name}", found, "reply with adapter_card"))
    return met, faults


def _reply(message: Message) -> Reply:
    """A message without an error and with a name. Raises InputError."""
    # The reply for a lost node has the number of the SuperLink.
    node = message.metadata.src_node_id
    if message.has_error():
        reason = printable(message.error.reason or f"error {message.error.code}")[:300]
        found, cure = SECURE if _SECURE in reason else (reason, "see the log of the node")
        raise InputError("a node failed or was lost", found, cure)
    records = message.content.config_records
    if any(name.startswith(_SECURE) for name in records):
        raise InputError(f"node {node}", *SECURE)
    if CARD not in records:
        raise InputError(f"node {node}", "a reply without a card", _CURE)
    name = records[CARD].get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        cure = "give a name of letters, digits, spaces and . @ + - _ in the node config"
        raise InputError(f"node {node}", f"a client named {str(name)[:80]!r}", cure)
    return Reply(node, name, message.content)


def _taken(reply: Reply, node: int) -> InputError:
    found = f"node {node} has the name {reply.name}"
    return InputError(f"node {reply.node}", found, "give each client its own `name` in node config")


def uploads_in(
    replies: Iterable[Reply], weighted_by_key: str
) -> tuple[dict[str, StateDict], list[InputError]]:
    """The adapters of the replies by client, and the faults of the others."""
    uploads: dict[str, StateDict] = {}
    faults: list[InputError] = []
    for reply in replies:
        with catching_faults(faults.append):
            uploads[reply.name] = _upload(reply, weighted_by_key)
    return uploads, faults


def _upload(reply: Reply, weighted_by_key: str) -> StateDict:
    """The adapter of a reply with its sample count. Its tensors share the memory of the reply.

    Raises InputError.
    """
    where = f"client {reply.name}"
    arrays, metrics = (
        list(records.values())
        for records in (reply.content.array_records, reply.content.metric_records)
    )
    if len(arrays) != 1 or len(metrics) != 1:
        found = f"{len(arrays)} array records and {len(metrics)} metric records"
        raise InputError(where, found, _CURE)
    samples: Any = metrics[0].get(weighted_by_key)
    if not isinstance(samples, (int, float)):
        found = f"no number {weighted_by_key} in the metrics"
        raise InputError(where, found, _CURE)
    config = config_in(reply.content.config_records[CARD], where)
    try:
        tensors = views(arrays[0])
    except InputError as error:
        raise InputError(where, f"{error.where}: {error.found}", error.cure) from None
    return StateDict(tensors, config, samples)


def with_usual_metrics(replies: Iterable[Reply]) -> tuple[list[RecordDict], list[str]]:
    """The metrics to average, and the names of the clients that have other metrics than most.

    Flower's mean needs the same names and lengths from all.
    """

    def kind(reply: Reply) -> frozenset[tuple[str, int | None]]:
        (record,) = reply.content.metric_records.values()
        return frozenset((k, len(v) if isinstance(v, list) else None) for k, v in record.items())

    kinds = {reply: kind(reply) for reply in replies}
    ((usual, _),) = Counter(kinds.values()).most_common(1)
    return (
        [RecordDict(dict(one.content.metric_records)) for one in kinds if kinds[one] == usual],
        [one.name for one in kinds if kinds[one] != usual],
    )
