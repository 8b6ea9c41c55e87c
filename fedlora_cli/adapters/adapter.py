"""One adapter in memory, independent of its format: factors by module name, and full tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from fedlora_cli.adapters.dtypes import widest
from fedlora_cli.adapters.expert_layouts import SINCE_0_19_1, ExpertLayout
from fedlora_cli.errors import FaultHandler, raise_fault
from fedlora_cli.files.entries import TensorInfo, read_entries
from fedlora_cli.files.untrusted import State
from fedlora_cli.linalg.factors import Factors
from fedlora_cli.remote import Location

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "convolution", "experts"]

#: The kinds of tensors that are not factors: part of a module trained in full ("saved"), weights of
#: the base model, a trained bias, one token's row of an embedding, the magnitudes of DoRA
#: (arXiv:2402.09353), and a bias on lora_B, which is an update like B A.
Role = Literal["saved", "base", "bias", "token", "magnitude", "lora_bias"]

#: The name that PEFT gives to the original layer inside the layer that it puts around it.
BASE_LAYER = ".base_layer"

Content = TypeVar("Content", covariant=True)
T = TypeVar("T")


class TensorWriter(Protocol):
    """Writes the factors of a module, or a full tensor, under its name. Raises OSError."""

    def __call__(self, name: str, content: Factors | Tensor) -> None: ...


class TensorReader(Protocol[Content]):
    """Reads values of which only the header was read. Values that are not finite are faults."""

    def __call__(self, on_fault: FaultHandler = raise_fault) -> Content: ...


@dataclass(frozen=True, slots=True)
class FactorLayout:
    """How a file stores the factors of a module.

    - `pair`: the common part of the two tensors' names.
    - `sides`: of a convolution, the sides of lora_A after the rank: (in, *kernel).
    - `expert`, `experts`: the number of this expert, and the count of experts in the pair.
    - `parameter`: the parameter that the experts adapt; "" if the file does not show which.
    - `parameters`: all adapted parameters of the module around the experts.
    - `turned`: whether the file stores the transposed update.
    """

    kind: Kind
    pair: str
    sides: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 1
    parameter: str = ""
    parameters: tuple[str, ...] = ()
    turned: bool = False

    @property
    def target(self) -> str:
        """The module that PEFT's config names for this pair.

        >>> FactorLayout("experts", "mlp.experts.base_layer").target
        'mlp.experts'
        """
        return self.pair.partition(BASE_LAYER)[0]


@dataclass(frozen=True, eq=False, slots=True)
class Module:
    """An adapted module, known from headers: `build` makes its factors from its tensors `infos`.

    - `shape`: (out, in) of the update: (d, n) for an embedding of n tokens and width d,
      (out, in · kernel) for a convolution. Every expert is a module.
    - `alpha`, `scale`: PEFT's lora_alpha and scaling; NaN if the config has a fault.
    - `dtype`: a name of torch.
    """

    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float
    dtype: str
    layout: FactorLayout
    infos: tuple[TensorInfo, ...]
    build: Callable[[Sequence[Tensor]], Factors]

    def read(self, on_fault: FaultHandler = raise_fault) -> Factors:
        """The factors; values that are not finite go to `on_fault`. Raises InputError."""
        return self.build(read_entries(self.infos, on_fault))


@dataclass(frozen=True, eq=False, slots=True)
class FullTensor:
    """A tensor that is not a factor, such as the weight of a head that was trained in full.

    `owner` is the module that was saved in full, None in other roles. `scale` is the multiplier of
    a bias on lora_B, None in other roles.
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

    They are PEFT's `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.
    If `modules` is empty, PEFT chooses the modules by the model.
    """

    modules: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdapterMetadata:
    """The metadata of an adapter about its base model and training; None or empty if not given.

    - `key_prefix`: the beginning of the main model's tensor names (single-file formats).
    - `alpha_source`: the place of the alphas in the file (single-file formats).
    - `model_class`: the full name of the base model's class in transformers, for models without
      a task.
    - `bias`, `lora_bias`, `dora`, `target_parameters`, `layer_replication`: as in PEFT's config.
    - `invocation_tokens`: of an activated LoRA.
    - `expert_layout`: the layout of the fused experts, if there are any.
    - `tied`: modules that share the update of an embedding, each with the embedding.
    - `unknown_fields`: unknown fields of the config that have a value, as text.
    - `selections`, `saved_names`, `token_names`: the names in the adapters' configs, the most
      frequent first: selected modules, `modules_to_save`, keys of `trainable_token_indices`.
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
    expert_layout: ExpertLayout = SINCE_0_19_1
    tied: tuple[tuple[str, str], ...] = ()
    unknown_fields: tuple[str, ...] = ()
    selections: tuple[Selection, ...] = ()
    saved_names: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()

    @property
    def without_names(self) -> AdapterMetadata:
        """The metadata without the names in configs, which can be as many as the modules."""
        return replace(self, selections=(), saved_names=(), token_names=())

    def named_like(self, others: Sequence[AdapterMetadata]) -> AdapterMetadata:
        """The metadata with the names in the configs of these adapters."""
        parameters = {name for other in others for name in other.target_parameters}
        return replace(
            self,
            target_parameters=tuple(sorted(parameters)),
            selections=_by_frequency(other.selections for other in others),
            saved_names=_by_frequency(other.saved_names for other in others),
            token_names=_by_frequency(other.token_names for other in others),
        )


def _by_frequency(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """The distinct members of the groups, the most frequent first.

    >>> _by_frequency([["b", "a"], ["b"], ["c"]])
    ('b', 'a', 'c')
    """
    counts = Counter(chain.from_iterable(groups))
    return tuple(sorted(counts, key=lambda member: (-counts[member], str(member))))


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter. `weights_file` is the file with its tensors, `format` the name of its format;
    `notes` are remarks for the user.
    """

    path: Location
    weights_file: Location
    modules: Mapping[str, Module]
    tensors: Mapping[str, FullTensor]
    metadata: AdapterMetadata
    notes: tuple[str, ...] = ()
    format: str = "peft"

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def state(self) -> State | None:
        """The state of the weights file when its header was read; None without modules."""
        infos = (info for module in self.modules.values() for info in module.infos)
        return next((info.state for info in infos), None)

    @property
    def dtype(self) -> str:
        """The narrowest dtype that holds all factors without loss."""
        return widest(module.dtype for module in self.modules.values())

    def trains(self, *modules: str) -> bool:
        """Whether the adapter has factors or full tensors of any of these modules."""
        owners = {tensor.owner for tensor in self.tensors.values()}
        return any(module in self.modules or module in owners for module in modules)

    def subset(self, names: Collection[str]) -> Adapter:
        """The same with these modules and tensors alone, without remarks. It may have none left."""
        return replace(
            self,
            metadata=self.metadata.without_names,
            modules={name: self.modules[name] for name in names if name in self.modules},
            tensors={name: self.tensors[name] for name in names if name in self.tensors},
            notes=(),
        )


def common_ties(adapters: Sequence[Adapter]) -> tuple[tuple[str, str], ...]:
    """All ties of modules to embeddings; none if an adapter has a module of a tie untied."""
    ties = sorted({tie for adapter in adapters for tie in adapter.metadata.tied})
    common = all(
        tie in adapter.metadata.tied or not adapter.trains(*tie)
        for adapter in adapters
        for tie in ties
    )
    return tuple(ties) if common else ()


def read_modules(
    adapter: Adapter, names: Iterable[str], on_fault: FaultHandler = raise_fault
) -> dict[str, Factors]:
    """The factors of these modules, as far as the adapter has them. Neighbors in the file are read
    as one range, shared tensors once. Raises InputError.
    """
    modules = {name: adapter.modules[name] for name in names if name in adapter.modules}
    infos = [info for module in modules.values() for info in module.infos]
    tensors = iter(read_entries(infos, on_fault))
    return {
        name: module.build([next(tensors) for _ in module.infos])
        for name, module in modules.items()
    }


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """An adapter to be written. `alphas` are lora_alpha by module: the scale of the factors is
    alpha / r, or alpha / sqrt(r) if `metadata.rslora` is set.

    The factors and tensors may be on torch's meta device, which has shapes and dtypes only: their
    values are written later, module by module.
    """

    factors: Mapping[str, Factors]
    alphas: Mapping[str, float]
    layouts: Mapping[str, FactorLayout]
    tensors: Mapping[str, Tensor]
    modules_to_save: tuple[str, ...]
    metadata: AdapterMetadata
