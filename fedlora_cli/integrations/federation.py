"""The server's side of a federation, round by round, for any framework.

>>> import torch
>>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
>>> names = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
>>> ann = StateDict({names[0]: torch.ones(1, 3), names[1]: torch.ones(2, 1)}, config, 30)
>>> federation, report, reason = Federation().next({"ann": ann})
>>> federation.round, federation.roster["ann"], reason
(1, Member(rank=1, scaling=1.0, round=1), '')
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora_cli import formats
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.clients.reading import LeftOut
from fedlora_cli.errors import InputError, UsageError
from fedlora_cli.files.documents import exists, read_object, unwritable
from fedlora_cli.files.folder import other_than, other_than_folders
from fedlora_cli.files.output import write_file
from fedlora_cli.formats.terms import CONFIG
from fedlora_cli.methods import find
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.reports.document import to_json
from fedlora_cli.reports.provenance import check_manifest
from fedlora_cli.reports.round_folders import GLOBAL, round_name, rounds_in
from fedlora_cli.rounds.aggregate import aggregate
from fedlora_cli.rounds.in_memory import aggregate_state_dicts, cut, distribute_state_dict
from fedlora_cli.rounds.options import DistributeOptions
from fedlora_cli.rounds.state_dict import StateDict, checked_name
from fedlora_cli.text import printable

#: The options of a federation in a framework: a bad client does not end the round, and clients that
#: did not train may return the same bytes.
DEFAULTS = AggregateOptions(on_bad_client="skip", allow_copies=True)

#: The file of a round that holds the roster, and the folder of its uploads.
_ROSTER, _CLIENTS = "roster.json", "clients"

#: The fields of a member in that file.
_TYPES = {"rank": int, "scaling": float, "round": int}


def at_terms(state: StateDict, rank: int, scaling: float, *, ordered: bool) -> StateDict:
    """An adapter at another rank and scaling: its first rank indices, or its best approximation."""
    if ordered or rank >= state.rank:
        return cut(state, rank, scaling)
    options = DistributeOptions(alpha=scaling * rank)  # distribute writes no rsLoRA
    return distribute_state_dict(state, ranks=[rank], options=options)[rank]


@dataclass(frozen=True)
class Member:
    """A client as it was in its last round: largest rank, scaling of B A, and that round."""

    rank: int
    scaling: float
    round: int


@dataclass(frozen=True, eq=False)
class Federation:
    """The state between two rounds; each round makes the next state.

    - `rounds`: a folder for `round-01/global` and so on, as of `fedlora aggregate --rounds`; with
      None, everything stays in memory.
    - `keep_clients`: whether the uploads stay in `round-01/clients`.
    - `round`: the number of finished rounds.
    - `current`, `before`: the global adapters of the last two rounds; `current` of round 0 is the
      initial adapter.
    - `roster`: the clients by name.
    """

    options: AggregateOptions = DEFAULTS
    rounds: Path | None = None
    keep_clients: bool = False
    round: int = 0
    current: StateDict | None = None
    before: StateDict | None = None
    roster: Mapping[str, Member] = field(default_factory=dict)
    _cuts: dict[tuple[int, float], StateDict] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("rounds", "previous", "before_previous"):
            if getattr(self.options, name) is not None:
                cure = "leave it out: the federation knows its earlier rounds"
                raise UsageError(name, "given in the options of a federation", cure)

    def start(self, initial: StateDict) -> Federation:
        """Round 0: the adapter from which all clients start; its rank is that of the output.

        An initial adapter whose update is not zero counts as the global adapter of a round 0, and
        is written to `round-00/global`. Raises InputError and OutputError.
        """
        options, method = self.options, find(self.options.method)
        if options.rank is None and options.energy is None and method.compress == "svd":
            options = replace(options, rank=initial.rank)
        folder = None if self.rounds is None else self._folder(0) / GLOBAL
        if folder is not None and not folder.exists() and not initial.is_zero:
            _make(folder.parent)
            replace(initial, samples=None).save(folder)
        return replace(self, options=options, current=initial, before=None)

    def resumed(self) -> Federation:
        """The state after the last whole round in the folder of rounds; unfinished ones go.

        Raises InputError for a folder that holds other rounds, or whose files changed since they
        were written.
        """
        if self.rounds is None or not self.rounds.is_dir():
            return self
        folders = rounds_in(self.rounds)
        start = self._folder(0) / GLOBAL
        number = len([folder for folder in folders if folder != start])
        if folders != [self._folder(n) / GLOBAL for n in range(number + 1)][-len(folders) :]:
            names = ", ".join(round_name(folder) for folder in folders[:20])
            cure = "name another folder for this federation"
            raise InputError(self.rounds, f"its rounds are {names}", cure)
        self._remove_uploads(number + 1)
        if not number:
            return self
        for folder in folders[-2:]:
            check_manifest(folder)
        *before, current = [StateDict.load(folder) for folder in folders[-2:]]
        return replace(
            self,
            round=number,
            current=current,
            before=before[0] if before else None,
            roster=_read_roster(self._folder(number) / _ROSTER),
            _cuts={},
        )

    def with_member(self, name: str, rank: int, scaling: float) -> Federation:
        """The federation with a client whose rank is known before its first upload."""
        return replace(self, roster={**self.roster, name: Member(rank, scaling, self.round)})

    def for_client(self, name: str) -> StateDict | None:
        """The global adapter at the client's rank and scaling; whole for unknown clients.

        None before the first round, if there is no initial adapter.
        """
        member = self.roster.get(name)
        if self.current is None or member is None:
            return self.current
        terms = (member.rank, member.scaling)
        if terms not in self._cuts:
            self._cuts[terms] = at_terms(self.current, *terms, ordered=self.is_ordered)
        return self._cuts[terms]

    @property
    def is_ordered(self) -> bool:
        """Whether the first rank indices of the global adapter matter most: not if the method puts
        the factors of all clients one after another.
        """
        method = find(self.options.method)
        return self.round == 0 or method.compress == "svd" or method.merge != "sum"

    def spool(self, name: str, upload: StateDict) -> None:
        """Write an upload of the coming round, so that it can leave the memory.

        Needs `rounds`. A second upload of the same name replaces the first. Raises InputError and
        OutputError.
        """
        if self.rounds is None:
            raise UsageError("rounds", "not given", "uploads need a folder of rounds")
        folder = self._folder(self.round + 1) / _CLIENTS / checked_name(name)
        _make(folder.parent)
        upload.save(folder, force=True)

    def next(
        self, uploads: Mapping[str, StateDict]
    ) -> tuple[Federation, AggregateReport | None, str]:
        """The state after another round, the report, and a reason if there is no report.

        The spooled uploads count as well. If no adapter can be made of the uploads, the state
        stays, and the reason names the fault. Raises UsageError and OutputError.
        """
        if not uploads and not self._has_spooled:
            return self, None, "no client answered"
        try:
            after, report = self._aggregated(uploads)
        except InputError as error:
            self._remove_uploads(self.round + 1)
            return self, None, str(error)
        return after, report, ""

    def _aggregated(self, uploads: Mapping[str, StateDict]) -> tuple[Federation, AggregateReport]:
        number = self.round + 1
        # The step from the initial adapter to the first global adapter has no earlier step.
        momentum = self.options.momentum if self.round else 0.0
        options = replace(self.options, momentum=momentum)
        if self.rounds is None:
            current, report = aggregate_state_dicts(
                uploads,
                replace(options, base=options.base or _base(self.current, uploads)),
                previous=self.current,
                before_previous=self.before if momentum else None,
            )
            configs = {name: upload.config for name, upload in uploads.items()}
        else:
            current, report, configs = self._aggregated_in_folder(uploads, options)
        members = {client.name: _member(configs[client.name], number) for client in report.clients}
        after = replace(
            self,
            round=number,
            current=current,
            before=self.current,
            roster={**self.roster, **members},
            _cuts={},
        )
        if self.rounds is not None:
            text = to_json({name: asdict(member) for name, member in after.roster.items()})
            write_file(self._folder(number) / _ROSTER, text.encode())
            if not self.keep_clients:
                self._remove_uploads(number)
        return after, report

    def _aggregated_in_folder(
        self, uploads: Mapping[str, StateDict], options: AggregateOptions
    ) -> tuple[StateDict, AggregateReport, dict[str, Mapping[str, Any]]]:
        """The global adapter of the round, the report, and the configs of the clients by name."""
        folder = self._folder(self.round + 1)
        faults = {name: self._spool_fault(name, upload) for name, upload in uploads.items()}
        refused = {name: fault for name, fault in faults.items() if fault is not None}
        if refused and (options.on_bad_client == "refuse" or len(refused) == len(uploads)):
            raise next(iter(refused.values()))
        base = options.base or _base(self.current, uploads)
        options = replace(options, rounds=self.rounds, base=base)
        report = aggregate(folder / _CLIENTS, folder / GLOBAL, options)
        left_out = [LeftOut(printable(name), at.where, at.found) for name, at in refused.items()]
        report = replace(report, left_out=(*report.left_out, *left_out))
        configs: dict[str, Mapping[str, Any]] = {
            client.name: read_object(folder / _CLIENTS / client.name / CONFIG)
            for client in report.clients
        }
        return StateDict.load(folder / GLOBAL), report, configs

    def _spool_fault(self, name: str, upload: StateDict) -> InputError | None:
        try:
            self.spool(name, upload)
        except InputError as error:
            return error
        return None

    @property
    def _has_spooled(self) -> bool:
        return self.rounds is not None and (self._folder(self.round + 1) / _CLIENTS).is_dir()

    def _folder(self, number: int) -> Path:
        return (self.rounds or Path()) / f"round-{number:02d}"

    def _remove_uploads(self, number: int) -> None:
        """Remove the uploads of a round, if the folder holds nothing else."""
        if self.rounds is None:
            return
        folder = self._folder(number) / _CLIENTS
        if folder.is_dir() and other_than_folders(other_than(formats.FILES))(folder) is None:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                raise unwritable(folder, error) from None


def _make(folder: Path) -> None:
    """Make a folder and its parents. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None


def _base(current: StateDict | None, uploads: Mapping[str, StateDict]) -> str | None:
    """The base model of the federation: clients name it by the paths on their own machines."""
    configs = [state.config for state in (*([current] if current else []), *uploads.values())]
    names = (config.get("base_model_name_or_path") for config in configs)
    return next((name for name in names if isinstance(name, str) and name), None)


def _member(config: Mapping[str, Any], number: int) -> Member:
    state = StateDict({}, config)
    return Member(state.rank, state.scaling, number)


def _read_roster(path: Path) -> dict[str, Member]:
    """The roster in a file; empty without the file. Raises InputError."""
    if not exists(path):
        return {}
    roster = {}
    for name, fields in read_object(path).items():
        values: list[Any] = [fields.get(key) for key in _TYPES] if isinstance(fields, dict) else []
        if [type(value) for value in values] != [*_TYPES.values()] or min(values) < 0:
            cure = "remove the file; the clients' ranks are known again after their next upload"
            raise InputError(path, f"{name} is {str(fields)[:80]}", cure)
        roster[name] = Member(*values)
    return roster
