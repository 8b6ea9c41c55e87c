"""The strategy of the app: FedAvg that counts what travels."""

from collections.abc import Iterable
from logging import INFO
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid

from fedlora_cli.integrations.flower import FedLoRA as FedAvg


class FlowerTuneLlm(FedAvg):
    """Log the bytes of all arrays that are sent and received."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.megabytes = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure the next round of training."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._track(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the replies."""
        replies = list(replies)
        self._track(replies)
        return super().aggregate_train(server_round, replies)

    def _track(self, messages: list[Message]) -> None:
        for message in messages:
            if message.has_content():
                records = message.content.array_records.values()
                self.megabytes += sum(record.count_bytes() for record in records) / 1024**2
        log(INFO, "Communication: %.2f MB", self.megabytes)
