"""`adapter_config.json`, read strictly: PEFT itself accepts nearly any value in it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from fedlora_cli.adapters.adapter import AdapterMetadata, Selection
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

#: A config that names 50 000 modules has 4 MB, and 14 MB where rank and alpha of each are its own.
MAX_BYTES = 16 * 1024 * 1024

#: The first version of PEFT that stores fused experts with A for the input of the model's layer.
#: Earlier ones exchanged the two sides of most models.
NEW_EXPERTS = "0.19.0"

#: Fields that are known and, having been looked at, change nothing in what the tensors mean.
_HARMLESS = {
    "corda_config",  # counts only where init_lora_weights says so, and so does the next
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


#: Heads are few, and words for a layer; nobody saves every module in full and trains factors too.
_MOST_SAVED = 256

#: So many parameters of one module are kept: far more than any has.
MANY_PARAMETERS = 64

#: Fields that decide what the tensors mean, in the order in which they are checked.
_MEANINGS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "lora_bias",
    "use_dora",
    "ensure_weight_tying",
    "target_parameters",
    "trainable_tokens",
)


@dataclass(frozen=True)
class Config:
    """The fields that decide what the tensors mean. A field that is no good raises its InputError
    whenever it is asked for, as every field does where the file itself cannot be read.

    Patterns are kept in the order of the file, because the first one that matches counts.
    `variants` are the errors about kinds of LoRA that are not understood, `implied` the modules
    that PEFT adapts though no field names them.
    """

    path: Location
    source: Fields | InputError
    matcher: Matcher
    variants: tuple[InputError, ...] = ()
    implied: frozenset[str] = frozenset()

    def rank(self, module: str) -> int:
        """r of that module: its `rank_pattern`, else `r`."""
        key = self._rank_keys.first(module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """alpha of that module: its `alpha_pattern`, else `lora_alpha`."""
        key = self._alpha_keys.first(module)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scale(self, alpha: float, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732)."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def fields(self) -> Fields:
        if isinstance(self.source, InputError):
            raise self.source
        return self.source

    @property
    def known(self) -> bool:
        """Whether the file itself could be read."""
        return not isinstance(self.source, InputError)

    @cached_property
    def r(self) -> int:
        return self.fields.natural("r", 8)

    @cached_property
    def lora_alpha(self) -> float:
        return self.fields.positive("lora_alpha", 8)

    @cached_property
    def use_rslora(self) -> bool:
        return self.fields.boolean("use_rslora", False)

    @cached_property
    def rank_pattern(self) -> dict[str, int]:
        return self.fields.pattern("rank_pattern", self.fields.natural_value)

    @cached_property
    def alpha_pattern(self) -> dict[str, float]:
        return self.fields.pattern("alpha_pattern", self.fields.positive_value)

    @cached_property
    def _rank_keys(self) -> Keys:
        return Keys.of(self.matcher, self.rank_pattern)

    @cached_property
    def _alpha_keys(self) -> Keys:
        return Keys.of(self.matcher, self.alpha_pattern)

    @cached_property
    def target_modules(self) -> str | frozenset[str] | None:
        return self.fields.names("target_modules")

    @cached_property
    def exclude_modules(self) -> str | frozenset[str] | None:
        return self.fields.names("exclude_modules")

    @cached_property
    def layers_to_transform(self) -> frozenset[int] | None:
        return self.fields.integers("layers_to_transform")

    @cached_property
    def layers_pattern(self) -> tuple[str, ...]:
        # Every module is matched against these, one by one.
        return self.fields.strings("layers_pattern", _MOST_SAVED)

    @cached_property
    def modules_to_save(self) -> tuple[str, ...]:
        # Every tensor is looked up among these, one by one.
        names = self.fields.strings("modules_to_save", _MOST_SAVED)
        for name in names:
            if not PLAIN.fullmatch(name):
                found = f"modules_to_save names {name[:80]!r}"
                cure = "name it by letters, digits, _, - and dots; PEFT takes all else for patterns"
                raise InputError(self.path, found, cure)
        return names

    @cached_property
    def bias(self) -> str:
        return self.fields.one_of("bias", BIASES)

    @cached_property
    def lora_bias(self) -> bool:
        return self.fields.boolean("lora_bias", False)

    @cached_property
    def use_dora(self) -> bool:
        return self.fields.boolean("use_dora", False)

    @cached_property
    def ensure_weight_tying(self) -> bool:
        return self.fields.boolean("ensure_weight_tying", False)

    @cached_property
    def target_parameters(self) -> tuple[str, ...]:
        return self.fields.strings("target_parameters")

    @cached_property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        """The targeted parameters by the end of the name of their module."""
        found: dict[str, dict[str, None]] = {}
        for target in self.target_parameters:
            owner, _, name = target.rpartition(".")
            names = found.setdefault(owner, {})
            if len(names) <= MANY_PARAMETERS:  # as many are refused, however many more there are
                names[name] = None
        return {owner: tuple(names) for owner, names in found.items()}

    @cached_property
    def trainable_tokens(self) -> Mapping[str, tuple[int, ...]]:
        """The tokens by embedding; those of "" are of the input embedding, whatever its name."""
        return self.fields.tokens("trainable_token_indices")

    @property
    def has_tokens(self) -> bool:
        return bool(self.trainable_tokens)

    def token_indices(self, embedding: str) -> tuple[int, ...]:
        """The tokens that were trained in this embedding, in the order of the rows."""
        places = self._token_places
        found = [embedding[at:] for at in range(len(embedding) + 1) if embedding[at:] in places]
        first = min(found, key=lambda name: places[name], default=None)
        return () if first is None else self.trainable_tokens[first]

    @cached_property
    def _token_places(self) -> Mapping[str, int]:
        """The place in the file of every embedding with trained tokens."""
        return {name: place for place, name in enumerate(self.trainable_tokens)}

    def adapts(self, module: str) -> bool:
        """Whether PEFT would adapt a module of that name. Raises InputError."""
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
    """The config, and what it says beside. Every fault goes to `on_fault`."""
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
    """`read_config` for fields that stand in the file `path`."""
    fields = Fields(path, raw)
    variants = tuple(variants_of(path, raw))
    for variant in variants:
        on_fault(variant)
    config = Config(path, fields, Matcher(path), variants)
    for name in _MEANINGS:
        with catching_faults(on_fault):
            getattr(config, name)
    facts = _facts(fields, config, on_fault)
    known = {*fields.seen, *_HARMLESS, *NOT_UNDERSTOOD, B_LAYOUT}
    unknown = {name: value for name, value in raw.items() if name not in known}
    return config, replace(facts, unknown_fields=tuple(_meaningful(unknown)))


def _meaningful(fields: Mapping[str, Any]) -> Iterator[str]:
    """The fields that may change what the tensors mean: a new kind of LoRA is off by default."""
    for name, value in sorted(fields.items()):
        if value is not None and value is not False and value not in ("", [], {}):
            yield f"{name} = {json.dumps(value, sort_keys=True)}"


def _facts(fields: Fields, config: Config, on_fault: FaultHandler) -> AdapterMetadata:
    """What the config says of the base model and the training; what is no good is not said."""

    def told(read: Callable[[str], T], name: str, otherwise: T) -> T:
        with catching_faults(on_fault):
            return read(name)
        return otherwise

    def flag(name: str) -> bool:
        return fields.boolean(name, False)

    return AdapterMetadata(
        base_model=told(fields.text, "base_model_name_or_path", None),
        revision=told(fields.text, "revision", None),
        task_type=told(fields.task_type, "task_type", None),
        model_class=fields.model_class("auto_mapping"),
        dropout=told(fields.dropout, "lora_dropout", 0.0),
        fan_in_fan_out=told(flag, "fan_in_fan_out", False),
        rslora=told(flag, "use_rslora", False),
        bias=told(lambda name: fields.one_of(name, BIASES), "bias", "none"),
        lora_bias=told(flag, "lora_bias", False),
        dora=told(flag, "use_dora", False),
        target_parameters=told(
            lambda name: tuple(sorted(fields.strings(name))), "target_parameters", ()
        ),
        layer_replication=told(fields.ranges, "layer_replication", ()),
        invocation_tokens=told(fields.tokens_of, "alora_invocation_tokens", ()),
        old_experts=_told(lambda: bool(config.target_parameters), False) and _is_old(fields.raw),
        selections=(_told(lambda: _selection(config), Selection()),),
        saved_names=_told(lambda: config.modules_to_save, ()),
        token_names=_told(lambda: tuple(filter(None, config.trainable_tokens)), ()),
    )


def _told(read: Callable[[], T], otherwise: T) -> T:
    """What a field says, where it is not at fault; the fault itself was reported before."""
    try:
        return read()
    except InputError:
        return otherwise


def _is_old(raw: Mapping[str, Any]) -> bool:
    """Whether a PEFT before `NEW_EXPERTS` wrote it; before 0.18, PEFT did not write its version."""
    old, new = (
        re.match(r"(\d{1,9})\.(\d{1,9})", str(version))
        for version in (raw.get("peft_version"), NEW_EXPERTS)
    )
    if old is None or new is None:
        return True
    return (int(old[1]), int(old[2])) < (int(new[1]), int(new[2]))


def _selection(config: Config) -> Selection:
    """How it selects the modules, where it does not leave them to the model."""
    if not config.targets.explicit:
        return Selection()
    modules = _sorted(config.target_modules)
    # PEFT loads no config that has these fields where they mean nothing.
    layers = () if isinstance(modules, str) else sorted(config.layers_to_transform or ())
    pattern = config.layers_pattern if layers else ()
    return Selection(modules, _sorted(config.exclude_modules), tuple(layers), pattern)


def _sorted(names: str | frozenset[str] | None) -> str | tuple[str, ...]:
    return names if isinstance(names, str) else tuple(sorted(names or ()))
