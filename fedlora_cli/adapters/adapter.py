"""One adapter, whatever its format: module names to lazy factors, and what is not a factor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from fedlora_cli.errors import FaultHandler, raise_fault
from fedlora_cli.files.entries import TensorInfo, read_entries
from fedlora_cli.files.untrusted import State
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "convolution", "experts"]

#: What a tensor that is no factor is: a module that was trained in full, weights of the base model,
#: a trained bias, one token's row of an embedding, the magnitudes of DoRA (arXiv:2402.09353), or a
#: bias on lora_B, which is an update like B A.
Role = Literal["saved", "base", "bias", "token", "magnitude", "lora_bias"]

Content = TypeVar("Content", covariant=True)
T = TypeVar("T")


class TensorWriter(Protocol):
    """Takes the factors of a module, or a full tensor, by its name. Raises OSError."""

    def __call__(self, name: str, content: Factors | Tensor) -> None: ...


class TensorReader(Protocol[Content]):
    """Brings what was only known from headers. What is not finite goes to the report."""

    def __call__(self, on_fault: FaultHandler = raise_fault) -> Content: ...


def widest(dtypes: Iterable[str]) -> str:
    """The narrowest dtype that holds all of these without loss of range or precision.

    >>> widest(["bfloat16", "bfloat16"]), widest(["bfloat16", "float16"])
    ('bfloat16', 'float32')
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "float64" if "float64" in distinct else "float32"


#: Every dtype of factors, each after those that it holds without loss.
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def usual_dtype(dtypes: Sequence[str], samples: Sequence[float]) -> str:
    """The narrowest dtype that holds, without loss, what clients with most of the samples sent.

    So a few clients make it neither wider nor narrower; where two dtypes have half of the samples
    each, it holds both. `dtypes` and `samples` are by client; without any samples, clients count
    alike.

    >>> usual_dtype(["float32", "float32", "float64"], [1, 1, 1])
    'float32'
    >>> usual_dtype(["bfloat16", "float32"], [1, 1]), usual_dtype(["bfloat16", "float32"], [3, 1])
    ('float32', 'bfloat16')
    """
    votes = samples if any(samples) else [1.0] * len(dtypes)
    pairs = [*zip(dtypes, votes, strict=True)]
    for dtype in _DTYPES:
        held = sum(n for own, n in pairs if own == dtype or widest((own, dtype)) == dtype)
        if 2 * held > sum(votes):
            return dtype
    return widest(dtypes)


@dataclass(frozen=True, slots=True)
class FactorLayout:
    """How a file holds the factors of a module: under the name `pair`, which both have in common.

    `sides` are those of lora_A beyond the rank where it is a convolution: (in, *kernel). Of the
    `experts` that share one pair, the module is number `expert`; `parameter` is the one that they
    adapt, "" where that is not known, and `parameters` are all that are adapted around one module.
    Where it is `turned`, the file holds the transposed update.
    """

    kind: Kind
    pair: str
    sides: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 1
    parameter: str = ""
    parameters: tuple[str, ...] = ()
    turned: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Module:
    """An adapted module, known from headers alone: `build` makes its factors of its `entries`.

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
    layout: FactorLayout
    entries: tuple[TensorInfo, ...]
    build: Callable[[Sequence[Tensor]], Factors]

    def read(self, on_fault: FaultHandler = raise_fault) -> Factors:
        """Its factors; values that are not finite go to `on_fault`. Raises InputError."""
        return self.build(read_entries(self.entries, on_fault))


@dataclass(frozen=True, eq=False, slots=True)
class FullTensor:
    """A tensor that is no factor: a head that was trained in full, for example.

    `owner` is the module that was saved in full, None in other roles. `scale` is what a bias on
    lora_B is multiplied by, None where the values are absolute.
    """

    shape: tuple[int, ...]
    dtype: str
    role: Role
    owner: str | None
    read: TensorReader[Tensor]
    scale: float | None = None


@dataclass(frozen=True)
class Selection:
    """The fields of a config that select modules, each a list of names or an expression.

    `modules`, `exclude`, `layers` and `layers_pattern` are PEFT's `target_modules`,
    `exclude_modules`, `layers_to_transform` and `layers_pattern`. Without `modules`, the config
    leaves it to the model.
    """

    modules: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter says of its base model and training. Empty or None: it does not say.

    Where a format has several ways, `key_prefix` is how the names of the main model's tensors begin
    and `alpha_source` where its alphas stand.

    `bias`, `lora_bias`, `target_parameters`, `layer_replication` and `dora` are the fields of
    PEFT's config, `invocation_tokens` those of an activated LoRA. `old_experts` says that PEFT
    before 0.19 stored the experts, if there are any. `model_class` is the full name of the base
    model's class in transformers, which tells what to load where there is no task. `tied` are
    modules whose update is that of an embedding, each with the embedding. `unknown_fields` are
    those that are not understood but have a value, as text.

    `selections`, `saved_names` and `token_names` are what the adapters' own configs name, the most
    frequent first: the modules, those of `modules_to_save`, the keys of `trainable_token_indices`.
    """

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    key_prefix: str | None = None
    alpha_source: str | None = None
    model_class: str | None = None
    dropout: float = 0.0
    fan_in_fan_out: bool = False
    rslora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    dora: bool = False
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    old_experts: bool = False
    tied: tuple[tuple[str, str], ...] = ()
    unknown_fields: tuple[str, ...] = ()
    selections: tuple[Selection, ...] = ()
    saved_names: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()

    @property
    def without_names(self) -> AdapterMetadata:
        """The same without the names that configs use, which are as many as the modules."""
        return replace(self, selections=(), saved_names=(), token_names=())

    def named_like(self, others: Sequence[AdapterMetadata]) -> AdapterMetadata:
        """The same with the names that the configs of these adapters use."""
        return replace(
            self,
            target_parameters=tuple(sorted({n for one in others for n in one.target_parameters})),
            selections=_by_votes(one.selections for one in others),
            saved_names=_by_votes(one.saved_names for one in others),
            token_names=_by_votes(one.token_names for one in others),
        )


def _by_votes(ballots: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """What the ballots name, the most frequent first.

    >>> _by_votes([["b", "a"], ["b"], ["c"]])
    ('b', 'a', 'c')
    """
    votes = Counter(one for ballot in ballots for one in ballot)
    return tuple(sorted(votes, key=lambda one: (-votes[one], str(one))))


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter. `weights_file` is the file that its tensors come from, `format` the name of
    its format; `notes` are remarks about the reading that the user should see.
    """

    path: Location
    weights_file: Location
    modules: Mapping[str, Module]
    tensors: Mapping[str, FullTensor]
    facts: AdapterMetadata
    notes: tuple[str, ...] = ()
    format: str = "peft"

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def state(self) -> State | None:
        """Of the weights file, when its header was read; None without modules."""
        entries = (entry for module in self.modules.values() for entry in module.entries)
        first = next(entries, None)
        return None if first is None else first.state

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds all of its factors."""
        return widest(module.dtype for module in self.modules.values())

    def trains(self, *modules: str) -> bool:
        """Whether it holds factors of any of these modules, or holds any in full."""
        owners = {tensor.owner for tensor in self.tensors.values()}
        return any(module in self.modules or module in owners for module in modules)

    def subset(self, names: Collection[str]) -> Adapter:
        """The same with these modules and tensors alone, without remarks. It may have none left."""
        return replace(
            self,
            facts=self.facts.without_names,
            modules={name: self.modules[name] for name in names if name in self.modules},
            tensors={name: self.tensors[name] for name in names if name in self.tensors},
            notes=(),
        )


def common_ties(adapters: Sequence[Adapter]) -> tuple[tuple[str, str], ...]:
    """The modules that are tied to an embedding in every adapter that has either of the two."""
    ties = sorted({tie for adapter in adapters for tie in adapter.facts.tied})
    common = all(
        tie in adapter.facts.tied or not adapter.trains(*tie)
        for adapter in adapters
        for tie in ties
    )
    return tuple(ties) if common else ()


def read_modules(
    adapter: Adapter, names: Iterable[str], on_fault: FaultHandler = raise_fault
) -> dict[str, Factors]:
    """The factors of those modules that the adapter has. What lies side by side in its file is read
    as one range, what they share is read once. Raises InputError.
    """
    held = {name: adapter.modules[name] for name in names if name in adapter.modules}
    entries = [entry for module in held.values() for entry in module.entries]
    tensors = iter(read_entries(entries, on_fault))
    return {
        name: module.build([next(tensors) for _ in module.entries]) for name, module in held.items()
    }


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """An adapter to be written. `alphas` are lora_alpha by module: the scale of its factors is
    alpha / r, or alpha / sqrt(r) where `facts.rslora` says so.

    Its factors and tensors may be on torch's meta device, which knows shapes and dtypes alone: then
    it describes what will be put into a folder piece by piece.
    """

    factors: Mapping[str, Factors]
    alphas: Mapping[str, float]
    layouts: Mapping[str, FactorLayout]
    tensors: Mapping[str, Tensor]
    modules_to_save: tuple[str, ...]
    facts: AdapterMetadata
