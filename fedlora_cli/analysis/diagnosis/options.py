"""The options of `fedlora diagnose`, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora_cli.errors import UsageError
from fedlora_cli.files.locations import optional
from fedlora_cli.options import (
    adapter_option,
    at_least,
    base_option,
    check_options,
    jobs_option,
    option,
    samples_option,
)
from fedlora_cli.remote import Location


@dataclass(frozen=True)
class DiagnoseOptions:
    """The options of a diagnosis. Raises UsageError for a number out of its range.

    Without `subject`, adapters that fedlora aggregated are rounds, and others are clients; with
    `adapter`, all are clients.
    """

    subject: Literal["clients", "rounds"] | None = option(
        None, "Kind of the adapters; default: read from their files.", "--as"
    )
    shared_rank: int | None = option(
        None,
        "Smallest rank of the clients; default: read from the adapters or their reports.",
        check=at_least(1),
    )
    samples: Location | None = samples_option()
    base: str | None = base_option()
    adapter: str | None = adapter_option()
    similarity: bool | None = option(
        None,
        "Compare the clients pairwise, or not; default: with up to 100 clients.",
        "--similarity/--no-similarity",
    )
    jobs: int = jobs_option()

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", optional(self.samples))
        check_options(self)
        if self.adapter is not None and self.subject == "rounds":
            raise UsageError("--adapter", "given for rounds", "leave it out: it is for clients")

    def check_rank(self, rank: int) -> None:
        """Check `shared_rank` against the largest rank of the adapters. Raises UsageError."""
        if self.shared_rank is not None and self.shared_rank >= rank:
            found = f"{self.shared_rank}, where no adapter has more than rank {rank}"
            raise UsageError("--shared-rank", found, "give the smallest rank of the clients")
