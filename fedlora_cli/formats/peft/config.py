"""`adapter_config.json`, read strictly: PEFT itself accepts nearly any value in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from fedlora_cli.adapters.adapter import AdapterMetadata, Selection
from fedlora_cli.adapters.expert_layouts import SINCE_0_19_1, expert_layout
from fedlora_cli.errors import FaultHandler, InputError, catching_faults, raise_fault
from fedlora_cli.files.documents import read_object
from fedlora_cli.formats import mlx
from fedlora_cli.formats.peft.fields import BIASES, Fields
from fedlora_cli.formats.peft.keys import Keys
from fedlora_cli.formats.peft.names import PLAIN
from fedlora_cli.formats.peft.patterns import Matcher, Targets
from fedlora_cli.formats.peft.variants import B_LAYOUT, NOT_UNDERSTOOD, variants_of
from fedlora_cli.remote import Location

T = TypeVar("T")

#: The most bytes of a config: 50 000 modules take 4 MB, and 14 MB if each has its rank and alpha.
MAX_BYTES = 16 * 1024 * 1024

#: Known fields that do not change the meaning of the tensors.
_HARMLESS = {
    "corda_config",  # has an effect only under an init_lora_weights that is refused, as the next
    "lora_ga_config",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}

#: The most names in `modules_to_save` and `layers_pattern`, each compared with every tensor or
#: module: adapters have a few heads and a few words for a layer.
_MOST_NAMES = 256

#: The most parameters of one module that are kept: far more than any module has.
MANY_PARAMETERS = 64


class _Field(cached_property[T]):
    """A property of `Config` that reads one field when it is first used."""

    def __init__(self, read: Callable[[Fields], T]) -> None:
        super().__init__(lambda config: read(config.fields))


def _modules_to_save(fields: Fields) -> tuple[str, ...]:
    names = fields.strings("modules_to_save", _MOST_NAMES)
    for name in names:
        if not PLAIN.fullmatch(name):
            found = f"modules_to_save names {name[:80]!r}"
            cure = "name it by letters, digits, _, - and dots; PEFT reads all else as patterns"
            raise InputError(fields.path, found, cure)
    return names


@dataclass(frozen=True)
class Config:
    """The fields that decide the meaning of the tensors.

    Every field is a property that raises InputError if its value is bad or the file is unreadable.
    Patterns keep the order of the file, because the first match applies.

    - `variants`: the errors about unsupported kinds of LoRA.
    - `implied`: modules that PEFT adapts although no field names them.
    """

    path: Location
    source: Fields | InputError
    matcher: Matcher
    variants: tuple[InputError, ...] = ()
    implied: frozenset[str] = frozenset()

    r = _Field(lambda fields: fields.checked("r", fields.natural, 8))
    lora_alpha = _Field(lambda fields: fields.checked("lora_alpha", fields.positive, 8))
    use_rslora = _Field(lambda fields: fields.boolean("use_rslora"))
    rank_pattern = _Field(lambda fields: fields.pattern("rank_pattern", fields.natural))
    alpha_pattern = _Field(lambda fields: fields.pattern("alpha_pattern", fields.positive))
    target_modules = _Field(lambda fields: fields.names("target_modules"))
    exclude_modules = _Field(lambda fields: fields.names("exclude_modules"))
    layers_to_transform = _Field(lambda fields: fields.integers("layers_to_transform"))
    layers_pattern = _Field(lambda fields: fields.strings("layers_pattern", _MOST_NAMES))
    modules_to_save = _Field(_modules_to_save)
    bias = _Field(lambda fields: fields.one_of("bias", BIASES))
    lora_bias = _Field(lambda fields: fields.boolean("lora_bias"))
    use_dora = _Field(lambda fields: fields.boolean("use_dora"))
    ensure_weight_tying = _Field(lambda fields: fields.boolean("ensure_weight_tying"))
    target_parameters = _Field(lambda fields: fields.strings("target_parameters"))
    #: The tokens by embedding; the key "" stands for the input embedding.
    trainable_tokens = _Field(lambda fields: fields.tokens("trainable_token_indices"))

    @property
    def fields(self) -> Fields:
        if isinstance(self.source, InputError):
            raise self.source
        return self.source

    @property
    def known(self) -> bool:
        """Whether the file could be read."""
        return not isinstance(self.source, InputError)

    def rank(self, module: str) -> int:
        """r of the module, from `rank_pattern` or `r`."""
        key = self._rank_keys.first(module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """alpha of the module, from `alpha_pattern` or `lora_alpha`."""
        key = self._alpha_keys.first(module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    @cached_property
    def _rank_keys(self) -> Keys:
        return Keys.of(self.matcher, self.rank_pattern)

    @cached_property
    def _alpha_keys(self) -> Keys:
        return Keys.of(self.matcher, self.alpha_pattern)

    def scale(self, alpha: float, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        """The targeted parameters by the ending of their module's name."""
        by_module: dict[str, dict[str, None]] = {}
        for target in self.target_parameters:
            module, _, name = target.rpartition(".")
            names = by_module.setdefault(module, {})
            if len(names) <= MANY_PARAMETERS:  # a longer list is refused at any length
                names[name] = None
        return {module: tuple(names) for module, names in by_module.items()}

    def token_indices(self, embedding: str) -> tuple[int, ...]:
        """The trained tokens of this embedding, in the order of the rows."""
        places = self._token_places
        names = [embedding[at:] for at in range(len(embedding) + 1) if embedding[at:] in places]
        first = min(names, key=lambda name: places[name], default=None)
        return () if first is None else self.trainable_tokens[first]

    @cached_property
    def _token_places(self) -> Mapping[str, int]:
        """The position in the file of every embedding with trained tokens."""
        return {name: place for place, name in enumerate(self.trainable_tokens)}

    def adapts(self, module: str) -> bool:
        """Whether PEFT adapts a module with this name. Raises InputError."""
        return module in self.implied or self.targets.match(module)

    @cached_property
    def targets(self) -> Targets:
        return Targets(
            matcher=self.matcher,
            target=self.target_modules,
            exclude=self.exclude_modules,
            layers=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            saved=self.modules_to_save,
        )


def read_config(
    path: Location, on_fault: FaultHandler = raise_fault
) -> tuple[Config, AdapterMetadata]:
    """The config and the metadata in a file. Every fault goes to `on_fault`."""
    try:
        raw = read_object(path, most=MAX_BYTES)
        if mlx.is_config(raw):
            raise mlx.AnotherFormat(path, mlx.FOUND, mlx.CURE)
        if raw.get("peft_type") != "LORA":
            found = f"peft_type is {raw.get('peft_type')!r}"
            raise InputError(path, found, "only LORA adapters are understood")
    except InputError as error:
        on_fault(error)
        return Config(path, error, Matcher(path)), AdapterMetadata()
    return config_of(path, raw, on_fault)


def config_of(
    path: Location, raw: Mapping[str, Any], on_fault: FaultHandler = raise_fault
) -> tuple[Config, AdapterMetadata]:
    """The config and the metadata in the fields `raw` of the file `path`."""
    fields = Fields(path, raw)
    variants = tuple(variants_of(path, raw))
    for variant in variants:
        on_fault(variant)
    config = Config(path, fields, Matcher(path), variants)
    for name, value in vars(Config).items():
        if isinstance(value, _Field):
            with catching_faults(on_fault):
                getattr(config, name)
    metadata = _metadata(fields, config, on_fault)
    known = {*fields.seen, *_HARMLESS, *NOT_UNDERSTOOD, B_LAYOUT}
    unknown = {name: value for name, value in raw.items() if name not in known}
    return config, replace(metadata, unknown_fields=tuple(_meaningful(unknown)))


def _meaningful(fields: Mapping[str, Any]) -> Iterator[str]:
    """The fields that have a value, as text: a new kind of LoRA has none by default."""
    for name, value in sorted(fields.items()):
        if value is not None and value is not False and value not in ("", [], {}):
            yield f"{name} = {json.dumps(value, sort_keys=True)}"


def _metadata(fields: Fields, config: Config, on_fault: FaultHandler) -> AdapterMetadata:
    """The metadata in the config; a bad value is a fault and counts as absent."""

    def value_of(read: Callable[[str], T], name: str, otherwise: T) -> T:
        with catching_faults(on_fault):
            return read(name)
        return otherwise

    return AdapterMetadata(
        base_model=value_of(fields.text, "base_model_name_or_path", None),
        revision=value_of(fields.text, "revision", None),
        task_type=value_of(fields.task_type, "task_type", None),
        model_class=fields.model_class("auto_mapping"),
        dropout=value_of(fields.dropout, "lora_dropout", 0.0),
        fan_in_fan_out=value_of(fields.boolean, "fan_in_fan_out", False),
        rslora=_valid(lambda: config.use_rslora, False),
        bias=_valid(lambda: config.bias, "none"),
        lora_bias=_valid(lambda: config.lora_bias, False),
        dora=_valid(lambda: config.use_dora, False),
        target_parameters=_valid(lambda: tuple(sorted(config.target_parameters)), ()),
        layer_replication=value_of(fields.ranges, "layer_replication", ()),
        invocation_tokens=value_of(fields.tokens_of, "alora_invocation_tokens", ()),
        expert_layout=expert_layout(fields.raw.get("peft_version"))
        if _valid(lambda: bool(config.target_parameters), False)
        else SINCE_0_19_1,
        selections=(_valid(lambda: _selection(config), Selection()),),
        saved_names=_valid(lambda: config.modules_to_save, ()),
        token_names=_valid(lambda: tuple(filter(None, config.trainable_tokens)), ()),
    )


def _valid(read: Callable[[], T], otherwise: T) -> T:
    """The value of a field, or `otherwise` if it has a fault, which was reported before."""
    try:
        return read()
    except InputError:
        return otherwise


def _selection(config: Config) -> Selection:
    """The selection of modules; empty if PEFT chooses the modules by the model."""
    if not config.targets.explicit:
        return Selection()
    modules = _sorted(config.target_modules)
    # PEFT loads no config with these fields if they have no effect.
    layers = () if isinstance(modules, str) else sorted(config.layers_to_transform or ())
    pattern = config.layers_pattern if layers else ()
    return Selection(modules, _sorted(config.exclude_modules), tuple(layers), pattern)


def _sorted(names: str | frozenset[str] | None) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(sorted(names or ()))
