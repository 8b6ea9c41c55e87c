"""One adapter, whatever its format: module names to lazy factors, and what is not a factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from fedlora_cli.errors import Report, refuse
from fedlora_cli.factors import Factors

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding"]

Content = TypeVar("Content", covariant=True)


class Read(Protocol[Content]):
    """Brings what was only known from headers. What is not finite goes to the report."""

    def __call__(self, report: Report = refuse) -> Content: ...


def widest(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds all of these without loss of range or precision.

    >>> widest(["bfloat16", "bfloat16"]), widest(["bfloat16", "float16"])
    ('bfloat16', 'float32')
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "float64" if "float64" in distinct else "float32"


@dataclass(frozen=True, eq=False)
class Module:
    """An adapted module, known from headers alone; `read` brings its factors, all values finite.

    `shape` is (out, in) of the update, `alpha` is PEFT's lora_alpha in this module, `scale` its
    scaling, both NaN where a config is broken and that was not refused; `dtype` is torch's name of
    one. An embedding of n tokens and width d has shape (d, n).
    """

    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    dtype: str
    kind: Kind
    read: Read[Factors]


@dataclass(frozen=True, eq=False)
class FullTensor:
    """A tensor with absolute values, not an update: a head that was trained in full, for example.

    `owner` is the module that was saved in full, None for base weights that PEFT stores beside an
    adapted embedding.
    """

    shape: tuple[int, ...]
    dtype: str
    owner: str | None
    read: Read[Tensor]


@dataclass(frozen=True, eq=False)
class Facts:
    """What an adapter says of its base model and training. Empty or None: it does not say."""

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    dropout: float = 0.0
    fan_in_fan_out: bool = False
    rslora: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter. `weights_file` is the file that its tensors come from; `notes` are remarks
    about the reading that the user should see.
    """

    path: Path
    weights_file: Path
    modules: Mapping[str, Module]
    tensors: Mapping[str, FullTensor]
    facts: Facts
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())
