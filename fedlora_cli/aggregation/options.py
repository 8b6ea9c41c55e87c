"""Everything that `fedlora aggregate` lets a person choose, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora_cli.errors import UsageError, require

Basis = Literal["stored", "svd"]
Missing = Literal["renormalize", "zero"]
Split = Literal["balanced", "left", "right"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]


@dataclass(frozen=True)
class Options:
    """The choices of one aggregation; the defaults are those of the command.

    - `rank`: of the output; None is the largest that occurs. `energy`: instead of a rank, the
      smallest that keeps this share of the energy in every module.
    - `samples`: a file with sample counts. `base`: the base model, however the clients name it.
    - `previous`, `before_previous`: the last two global adapters; `momentum`: β of the heavy ball
      term β (ΔW_g - ΔW_g'). `rounds`: instead, a folder of rounds to find both in.
    - `quorum`: q of raFLoRA's denominator max(N(i), q N). `max_rank`: refuse clients above it.
    - `basis`: "svd" brings every client into SVD order first. `missing`: whether a client that does
      not adapt a module leaves its weight to the others, or counts as a zero update.
    - `split`: where the singular values go. `dtype`: of the output; None is that of the clients.
    - `jobs`: threads, 0 for all cores. `device`: where to compute.
    - `verify`: read the result back and compare. `force`: replace an existing adapter.
      `dry_run`: read headers only and write nothing.

    Raises UsageError for a number out of its range.
    """

    method: str = "raflora"
    rank: int | None = None
    energy: float | None = None
    samples: Path | None = None
    base: str | None = None
    rounds: Path | None = None
    previous: Path | None = None
    before_previous: Path | None = None
    momentum: float = 0.0
    quorum: float | None = None
    max_rank: int | None = None
    basis: Basis = "stored"
    missing: Missing = "renormalize"
    split: Split = "balanced"
    dtype: Dtype | None = None
    device: str = "cpu"
    jobs: int = 0
    verify: bool = False
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        require(self.rank is None or self.rank >= 1, "--rank", self.rank, "1 or more")
        require(self.energy is None or 0 < self.energy <= 1, "--energy", self.energy, "in (0, 1]")
        require(0 <= self.momentum < 1, "--momentum", self.momentum, "in [0, 1)")
        require(self.quorum is None or 0 <= self.quorum <= 1, "--quorum", self.quorum, "in [0, 1]")
        require(
            self.max_rank is None or self.max_rank >= 1, "--max-rank", self.max_rank, "1 or more"
        )
        require(self.jobs >= 0, "--jobs", self.jobs, "0 or more; 0 is all cores")
        if self.rank is not None and self.energy is not None:
            raise UsageError("--energy", "given together with --rank", "give one of them")

    def changed(self) -> dict[str, Any]:
        """The choices that make the result and are not the default, as command-line flags.

        Where things are and how they are computed is left out: it does not change the bytes. What
        the sample counts were is told with the clients.
        """
        default = Options()
        names = ("rank", "energy", "momentum", "quorum", "max_rank", "basis", "missing", "split")
        chosen = {
            f"--{name.replace('_', '-')}": getattr(self, name)
            for name in (*names, "dtype", "base")
            if getattr(self, name) != getattr(default, name)
        }
        for name in ("previous", "before_previous"):
            path: Path | None = getattr(self, name)
            if path is not None:
                chosen[f"--{name.replace('_', '-')}"] = self._named(path)
        return chosen

    def _named(self, path: Path) -> str:
        """A folder's name; with its round's, where the folders of rounds are all named alike."""
        whole = path.resolve()
        return whole.name if self.rounds is None else f"{whole.parent.name}/{whole.name}"
