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

Kind = Literal["linear", "embedding", "convolution", "experts"]

#: What a tensor that is no factor is: a module that was trained in full, weights of the base model,
#: a trained bias, one token's row of an embedding, the magnitudes of DoRA (arXiv:2402.09353), or a
#: bias on lora_B, which is an update like B A.
Role = Literal["saved", "base", "bias", "token", "magnitude", "lora_bias"]

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


@dataclass(frozen=True)
class Layout:
    """How a file holds the factors of a module: under the name `pair`, which both have in common.

    `sides` are those of lora_A beyond the rank where it is a convolution: (in, *kernel). Of the
    `experts` that share one pair, the module is number `expert`; `parameter` is the one that they
    adapt, "" where that is not known.
    """

    kind: Kind
    pair: str
    sides: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 1
    parameter: str = ""


@dataclass(frozen=True, eq=False)
class Module:
    """An adapted module, known from headers alone; `read` brings its factors, all values finite.

    `shape` is (out, in) of the update, `alpha` is PEFT's lora_alpha in this module, `scale` its
    scaling, both NaN where a config is broken and that was not refused; `dtype` is torch's name of
    one. An embedding of n tokens and width d has shape (d, n), a convolution (out, in · kernel); an
    expert is a module of its own.
    """

    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    dtype: str
    layout: Layout
    read: Read[Factors]


@dataclass(frozen=True, eq=False)
class FullTensor:
    """A tensor that is no factor: a head that was trained in full, for example.

    `owner` is the module that was saved in full, None in other roles. `scale` is what a bias on
    lora_B is multiplied by, None where the values are absolute.
    """

    shape: tuple[int, ...]
    dtype: str
    role: Role
    owner: str | None
    read: Read[Tensor]
    scale: float | None = None


@dataclass(frozen=True)
class Facts:
    """What an adapter says of its base model and training. Empty or None: it does not say.

    `bias`, `lora_bias`, `target_parameters`, `layer_replication` and `dora` are the fields of
    PEFT's config, `invocation_tokens` those of an activated LoRA.
    """

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    dropout: float = 0.0
    fan_in_fan_out: bool = False
    rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    dora: bool = False
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    invocation_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter. `weights_file` is the file that its tensors come from, `format` the name of
    its format; `notes` are remarks about the reading that the user should see.
    """

    path: Path
    weights_file: Path
    modules: Mapping[str, Module]
    tensors: Mapping[str, FullTensor]
    facts: Facts
    notes: tuple[str, ...] = ()
    format: str = "peft"

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """An adapter ready to be written. `alphas` are lora_alpha by module: the scale of its factors
    is alpha / r, or alpha / sqrt(r) where `facts.rslora` says so.
    """

    factors: Mapping[str, Factors]
    alphas: Mapping[str, float]
    layouts: Mapping[str, Layout]
    tensors: Mapping[str, Tensor]
    modules_to_save: tuple[str, ...]
    facts: Facts
