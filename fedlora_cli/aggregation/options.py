"""The options of `fedlora aggregate`, as a frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fedlora_cli.clients.sample_counts import MAX_RATIO
from fedlora_cli.errors import UsageError
from fedlora_cli.execution.cluster import check_form
from fedlora_cli.files.locations import optional
from fedlora_cli.methods import METHODS, names, outside_note
from fedlora_cli.options import (
    BELOW_ONE,
    POSITIVE_SHARE,
    SHARE,
    Check,
    adapter_option,
    at_least,
    base_option,
    check_options,
    jobs_option,
    option,
    samples_option,
)
from fedlora_cli.remote import Location

Basis = Literal["stored", "svd"]
Robust = Literal["multi-krum", "geometric-median"]
Missing = Literal["renormalize", "zero"]
Dora = Literal["refuse", "approximate"]
Split = Literal["balanced", "left", "right"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Target = Literal["peft", "vllm", "sglang", "llama.cpp"]
BadClient = Literal["refuse", "skip"]

_CLIENTS = "Clients"
_EARLIER = "Previous rounds"
_INFLUENCE = "Influence"
_OUTPUT = "Output"

#: Options that change the result, in the order of reports. Where files are and how the result is
#: computed does not change the bytes; the sample counts stand with the clients.
_REPORTED = (
    "adapter",
    "on_bad_client",
    "min_clients",
    "max_count_ratio",
    "allow_copies",
    "rank",
    "energy",
    "momentum",
    "quorum",
    "max_rank",
    "max_weight",
    "clip_norm",
    "robust",
    "attackers",
    "basis",
    "missing",
    "dora",
    "split",
    "dtype",
    "base",
)


def _clip_norm(flag: str, text: str) -> float | Literal["auto"]:
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError:
        raise UsageError(flag, f"{text[:40]!r} is no number", "give a number, or auto") from None


@dataclass(frozen=True)
class AggregateOptions:
    """The options of one aggregation, as in `fedlora aggregate --help`.

    Paths may be text, a path or a URL. Raises UsageError for a value out of its range.
    """

    method: str = option(
        "raflora",
        f"Aggregation method: {', '.join(METHODS)}.",
        "-m",
        words=names,
        note=outside_note,
        show_default=True,
    )
    rank: int | None = option(
        None, "Rank of the output; default: the largest of the clients.", "-r", check=at_least(1)
    )
    energy: float | None = option(
        None,
        "Share of the energy to keep in each module, such as 0.99, at the smallest rank; instead "
        "of --rank.",
        check=POSITIVE_SHARE,
    )
    samples: Location | None = samples_option()
    adapter: str | None = adapter_option()
    verify: bool = option(False, "Read the written files back and compare every module.")
    on_bad_client: BadClient = option(
        "refuse",
        "Refuse the whole round, or skip the faulty client; skip reads all tensors once more.",
        panel=_CLIENTS,
        show_default=True,
    )
    min_clients: int = option(
        1,
        "Write nothing if fewer clients than this remain.",
        panel=_CLIENTS,
        show_default=True,
        check=at_least(1),
    )
    max_count_ratio: float = option(
        MAX_RATIO,
        "Largest self-reported sample count, in multiples of the median of all clients.",
        panel=_CLIENTS,
        show_default=True,
        check=Check(lambda ratio: 1 <= ratio < math.inf, "a number of 1 or more"),
    )
    allow_copies: bool = option(
        False, "Count each of several clients with identical weights.", panel=_CLIENTS
    )
    previous: Location | None = option(
        None, "Global adapter of the previous round.", panel=_EARLIER, metavar="DIR"
    )
    before_previous: Location | None = option(
        None, "Global adapter of the round before that.", panel=_EARLIER, metavar="DIR"
    )
    rounds: Location | None = option(
        None,
        "Folder of all rounds, in which both are found by the numbers of the rounds.",
        panel=_EARLIER,
        metavar="DIR",
    )
    momentum: float = option(
        0.0,
        "β: factor of the added step from --before-previous to --previous; default: 0.",
        panel=_EARLIER,
        check=BELOW_ONE,
    )
    quorum: float | None = option(
        None,
        "Minimum share of samples behind a rank index; below it the previous adapter keeps the "
        "rest.",
        panel=_INFLUENCE,
        check=SHARE,
    )
    max_rank: int | None = option(
        None, "Refuse clients with a higher rank.", panel=_INFLUENCE, check=at_least(1)
    )
    max_weight: float | None = option(
        None,
        "Largest weight of one client at a rank index; the other clients share the excess.",
        panel=_INFLUENCE,
        check=POSITIVE_SHARE,
    )
    clip_norm: float | Literal["auto"] | None = option(
        None,
        "Largest norm of a client's update; larger updates are scaled down. auto: twice the "
        "median.",
        panel=_INFLUENCE,
        metavar="C|auto",
        text=str,
        parse=_clip_norm,
        check=Check(lambda c: c == "auto" or 0 < c < math.inf, "a positive number, or auto"),
    )
    robust: Robust | None = option(
        None, "Weigh clients by their distance to the other clients.", panel=_INFLUENCE
    )
    attackers: int | None = option(
        None, "Number of clients that Multi-Krum leaves out.", panel=_INFLUENCE, check=at_least(1)
    )
    basis: Basis = option(
        "stored",
        "Use each adapter's own rank order, or re-order by SVD first (for adapters that do not "
        "share an initialization).",
        panel=_INFLUENCE,
        show_default=True,
    )
    missing: Missing = option(
        "renormalize",
        "Weight of a client in a module that it lacks: shared among the other clients, or a zero "
        "update.",
        panel=_INFLUENCE,
        show_default=True,
    )
    dora: Dora = option(
        "refuse",
        "DoRA clients: refuse them, or average directions and magnitudes separately.",
        panel=_INFLUENCE,
        show_default=True,
    )
    base: str | None = base_option(_OUTPUT)
    split: Split = option(
        "balanced",
        "Factors that get the singular values: both, B (left) or A (right).",
        panel=_OUTPUT,
        show_default=True,
    )
    dtype: Dtype | None = option(
        None, "Data type of the output; default: that of most samples.", panel=_OUTPUT
    )
    target: Target | None = option(
        None, "Server for the output; refuse an output that the server cannot load.", panel=_OUTPUT
    )
    device: str = option(
        "cpu", "Compute on cpu, cuda, cuda:N or auto.", panel=_OUTPUT, show_default=True
    )
    jobs: int = jobs_option(panel=_OUTPUT)
    cluster: str | None = option(
        None,
        "Compute on processes:N, on Dask workers (local:N), or on the Dask cluster at "
        "tcp://HOST:PORT.",
        panel=_OUTPUT,
        metavar="ADDRESS",
    )
    dry_run: bool = option(False, "Read headers only and write nothing.", "-n", panel=_OUTPUT)
    explain: bool = option(False, "Show how each module is computed, and why.", panel=_OUTPUT)
    force: bool = option(False, "Replace an existing adapter.", "-f", panel=_OUTPUT)

    def __post_init__(self) -> None:
        for name in ("samples", "rounds", "previous", "before_previous"):
            object.__setattr__(self, name, optional(getattr(self, name)))
        check_options(self)
        if (self.attackers is None) == (self.robust == "multi-krum"):
            flags = ["--robust multi-krum", "--attackers"]
            lacking = flags.pop(self.attackers is None)
            cure = "give both: Multi-Krum leaves out that number of clients"
            raise UsageError(flags[0], f"given without {lacking}", cure)
        if self.cluster is not None:
            check_form(self.cluster)
        if self.rank is not None and self.energy is not None:
            raise UsageError("--energy", "given together with --rank", "give one of them")

    def changed(self) -> dict[str, Any]:
        """The options that change the result and are not the default, by flag."""
        default = AggregateOptions()
        values = {name: getattr(self, name) for name in _REPORTED}
        chosen = {k: v for k, v in values.items() if v != getattr(default, k)}
        for name in ("previous", "before_previous"):
            path: Location | None = getattr(self, name)
            if path is not None:
                chosen[name] = self._named(path)
        return {f"--{name.replace('_', '-')}": value for name, value in chosen.items()}

    def _named(self, path: Location) -> str:
        """The folder's name, with the name of its round where `rounds` is given: there the folders
        of all rounds may have one name.
        """
        whole = path.resolve()
        return whole.name if self.rounds is None else f"{whole.parent.name}/{whole.name}"
