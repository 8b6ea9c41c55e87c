"""The options of `fedlora inspect`, as a frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.files.locations import optional
from fedlora_cli.options import (
    adapter_option,
    base_option,
    check_options,
    jobs_option,
    option,
    samples_option,
)
from fedlora_cli.remote import Location


@dataclass(frozen=True)
class InspectOptions:
    """The options of an inspection. Raises UsageError for a number out of its range.

    With `samples`, every adapter counts as a client, even a global adapter.
    """

    samples: Location | None = samples_option()
    base: str | None = base_option()
    adapter: str | None = adapter_option()
    values: bool = option(False, "Read every tensor and check that all values are finite.")
    jobs: int = jobs_option()

    def __post_init__(self) -> None:
        object.__setattr__(self, "samples", optional(self.samples))
        check_options(self)
