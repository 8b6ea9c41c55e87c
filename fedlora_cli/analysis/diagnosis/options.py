"""Everything that `fedlora diagnose` lets a person choose, as one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora_cli.errors import UsageError
from fedlora_cli.remote import Location


@dataclass(frozen=True)
class DiagnoseOptions:
    """The choices of one diagnosis.

    - `subject`: what several adapters are; None to tell by whether fedlora aggregated them.
    - `shared_rank`: r of ρ_r; None for that of the cohort, or of the reports beside the adapters.
    - `samples`, `base`: as in an aggregation. `similarity`: compare the clients pairwise; None to
      do so up to 100 clients.
    - `jobs`: threads, 0 for all cores. `adapter`: the folder in every client's own that has its
      adapter; then they are clients.

    Raises UsageError for a number out of its range.
    """

    subject: Literal["clients", "rounds"] | None = None
    shared_rank: int | None = None
    samples: Location | None = None
    base: str | None = None
    similarity: bool | None = None
    jobs: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.shared_rank is not None and self.shared_rank < 1:
            raise UsageError("--shared-rank", f"{self.shared_rank}", "it must be 1 or more")
        if self.jobs < 0:
            raise UsageError("--jobs", f"{self.jobs}", "it must be 0 or more; 0 is all cores")
        if self.adapter is not None and self.subject == "rounds":
            raise UsageError("--adapter", "given for rounds", "it is for clients; leave it out")

    def check_rank(self, rank: int) -> None:
        """Whether anything lies beyond the shared rank, where `rank` is the largest of any adapter.

        Raises UsageError.
        """
        if self.shared_rank is not None and self.shared_rank >= rank:
            found = f"{self.shared_rank}, where no adapter has more than rank {rank}"
            raise UsageError("--shared-rank", found, "give the smallest rank of the clients")
