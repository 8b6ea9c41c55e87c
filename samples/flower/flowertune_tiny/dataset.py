"""Questions and answers, letter by letter; every partition asks about other complaints."""

from collections.abc import Sequence

import torch

VOCABULARY = "\n abcdefghijklmnopqrstuvwxyz?.:"

_COMPLAINTS = (
    *("fever", "cough", "burn", "cramp", "rash", "fall"),
    *("cold", "headache", "nausea", "sprain", "bite", "cut"),
)
_ADVICE = ("rest", "drink", "cool it", "stretch", "wash it", "call us", "keep warm", "lie down")
_WHO = ("i", "we", "she", "he", "they")
_LENGTH = 40


def load_data(partition_id: int, num_partitions: int) -> torch.Tensor:
    """The texts of one partition as tokens, (texts, letters)."""
    return _tokens(_COMPLAINTS[partition_id::num_partitions] or _COMPLAINTS[:1])


def load_held_out() -> torch.Tensor:
    """Every fourth text about all complaints."""
    return _tokens(_COMPLAINTS)[::4]


def _tokens(complaints: Sequence[str]) -> torch.Tensor:
    texts = [
        f"{who} had a {complaint}? answer: {_ADVICE[_COMPLAINTS.index(complaint) % len(_ADVICE)]}."
        for complaint in complaints
        for who in _WHO
    ]
    return torch.tensor([[VOCABULARY.index(c) for c in text.ljust(_LENGTH)] for text in texts])
