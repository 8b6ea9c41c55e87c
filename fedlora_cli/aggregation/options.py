"""Everything that `fedlora aggregate` lets a person choose, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedlora_cli.clients.sample_counts import MAX_RATIO
from fedlora_cli.errors import UsageError, require
from fedlora_cli.execution.cluster import check_form
from fedlora_cli.files.locations import optional
from fedlora_cli.remote import Location

Basis = Literal["stored", "svd"]
Robust = Literal["multi-krum", "geometric-median"]
Missing = Literal["renormalize", "zero"]
Dora = Literal["refuse", "approximate"]
Split = Literal["balanced", "left", "right"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
Target = Literal["peft", "vllm", "sglang", "llama.cpp"]
BadClient = Literal["refuse", "skip"]


#: The words of the choices that are words; what is not given is None.
_WORDS: dict[str, tuple[str | None, ...]] = {
    "basis": get_args(Basis),
    "missing": get_args(Missing),
    "dora": get_args(Dora),
    "split": get_args(Split),
    "on_bad_client": get_args(BadClient),
    "robust": (*get_args(Robust), None),
    "dtype": (*get_args(Dtype), None),
}

_KRUM = "Multi-Krum leaves out a number of clients that you name: give both"


@dataclass(frozen=True)
class AggregateOptions:
    """The choices of one aggregation; the defaults are those of the command.

    - `rank`: of the output; None is the largest that occurs. `energy`: instead of a rank, the
      smallest that keeps this share of the energy in every module.
    - `samples`: a file with sample counts. `base`: the base model, however the clients name it.
    - `adapter`: the folder in every client's own that has its adapter.
    - `on_bad_client`: "skip" leaves out clients that are at fault, instead of refusing all of them.
      `min_clients`: how many must take part. `max_count_ratio`: how many times the median of all a
      sample count may be that the client tells itself. `allow_copies`: count clients with the
      same weights, each for itself.
    - `previous`, `before_previous`: the last two global adapters; `momentum`: β of the heavy ball
      term β (ΔW_g - ΔW_g'). `rounds`: instead, a folder of rounds to find both in.
    - `quorum`: q of raFLoRA's denominator max(N(i), q N). `max_rank`: refuse clients above it.
    - `max_weight`: the largest weight of one client at any rank index. `clip_norm`: the largest
      ‖ΔW_k‖_F over all modules, "auto" twice the median. `robust`: a rule that tells whom to trust
      how far, from what clients have in common; `attackers`: how many Multi-Krum leaves out.
    - `basis`: "svd" brings every client into SVD order first. `missing`: whether a client that does
      not adapt a module leaves its weight to the others, or counts as a zero update.
    - `dora`: "approximate" averages the directions and the magnitudes of DoRA apart.
    - `split`: where the singular values go. `dtype`: of the output; None is that of most samples.
    - `target`: the server that is to load the output; what it cannot load is refused.
    - `jobs`: threads, 0 for all cores. `cluster`: who computes the modules instead, processes or a
      Dask cluster (`fedlora_cli.execution.cluster`). `device`: where to compute.
    - `verify`: read the result back and compare. `force`: replace an existing adapter.
      `dry_run`: read headers only and write nothing. `explain`: tell how modules are computed.

    Places may be given as text, a path or a URL. Raises UsageError for a number out of its range.
    """

    method: str = "raflora"
    rank: int | None = None
    energy: float | None = None
    samples: Location | None = None
    base: str | None = None
    adapter: str | None = None
    on_bad_client: BadClient = "refuse"
    min_clients: int = 1
    max_count_ratio: float = MAX_RATIO
    allow_copies: bool = False
    rounds: Location | None = None
    previous: Location | None = None
    before_previous: Location | None = None
    momentum: float = 0.0
    quorum: float | None = None
    max_rank: int | None = None
    max_weight: float | None = None
    clip_norm: float | Literal["auto"] | None = None
    robust: Robust | None = None
    attackers: int | None = None
    basis: Basis = "stored"
    missing: Missing = "renormalize"
    dora: Dora = "refuse"
    split: Split = "balanced"
    dtype: Dtype | None = None
    target: Target | None = None
    device: str = "cpu"
    jobs: int = 0
    cluster: str | None = None
    verify: bool = False
    force: bool = False
    explain: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "rounds", "previous", "before_previous"):
            object.__setattr__(self, name, optional(getattr(self, name)))
        for name, words in _WORDS.items():
            value = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(value in words, flag, repr(value), f"one of {', '.join(filter(None, words))}")
        require(self.rank is None or self.rank >= 1, "--rank", self.rank, "1 or more")
        require(self.energy is None or 0 < self.energy <= 1, "--energy", self.energy, "in (0, 1]")
        require(0 <= self.momentum < 1, "--momentum", self.momentum, "in [0, 1)")
        require(self.quorum is None or 0 <= self.quorum <= 1, "--quorum", self.quorum, "in [0, 1]")
        require(
            self.max_rank is None or self.max_rank >= 1, "--max-rank", self.max_rank, "1 or more"
        )
        require(self.min_clients >= 1, "--min-clients", self.min_clients, "1 or more")
        ratio = self.max_count_ratio
        require(1 <= ratio < math.inf, "--max-count-ratio", ratio, "a number of 1 or more")
        limit, clip, f = self.max_weight, self.clip_norm, self.attackers
        require(limit is None or 0 < limit <= 1, "--max-weight", limit, "in (0, 1]")
        positive = clip is None or clip == "auto" or 0 < clip < math.inf
        require(positive, "--clip-norm", clip, "a positive number, or auto")
        require(f is None or f >= 1, "--attackers", f, "1 or more")
        if (f is None) == (self.robust == "multi-krum"):
            found = "without --attackers" if f is None else "without --robust multi-krum"
            raise UsageError("--robust" if f is None else "--attackers", found, _KRUM)
        require(self.jobs >= 0, "--jobs", self.jobs, "0 or more; 0 is all cores")
        if self.cluster is not None:
            check_form(self.cluster)
        if self.rank is not None and self.energy is not None:
            raise UsageError("--energy", "given together with --rank", "give one of them")

    def changed(self) -> dict[str, Any]:
        """The choices that make the result and are not the default, as command-line flags.

        Where things are and how they are computed is left out: it does not change the bytes. What
        the sample counts were is told with the clients.
        """
        default = AggregateOptions()
        names = (
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
        )
        chosen = {
            f"--{name.replace('_', '-')}": getattr(self, name)
            for name in (*names, "dtype", "base")
            if getattr(self, name) != getattr(default, name)
        }
        for name in ("previous", "before_previous"):
            path: Location | None = getattr(self, name)
            if path is not None:
                chosen[f"--{name.replace('_', '-')}"] = self._named(path)
        return chosen

    def _named(self, path: Location) -> str:
        """A folder's name; with its round's, where the folders of rounds are all named alike."""
        whole = path.resolve()
        return whole.name if self.rounds is None else f"{whole.parent.name}/{whole.name}"
