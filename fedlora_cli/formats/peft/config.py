"""`adapter_config.json`, read strictly: PEFT itself accepts nearly any value in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedlora_cli.adapter import Facts
from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.formats.peft import patterns

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """The fields that decide what the tensors mean.

    Patterns are kept in the order of the file, because the first one that matches counts.
    """

    path: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: patterns.Targets
    facts: Facts

    def rank(self, module: str) -> int:
        """r of that module: its `rank_pattern`, else `r`."""
        key = patterns.first_match(self.rank_pattern, module, where=self.path)
        return self.r if key is None else self.rank_pattern[key]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732)."""
        key = patterns.first_match(self.alpha_pattern, module, where=self.path)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


#: Fields that change what the tensors mean in a way that is not understood yet, with their name.
_NOT_UNDERSTOOD: dict[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "biases on lora_B (lora_bias)",
    "target_parameters": "LoRA on parameters, as for mixtures of experts (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
    "corda_config": "CorDA",
    "lora_ga_config": "LoRA-GA",
    "ensure_weight_tying": "tied adapters (ensure_weight_tying)",
}

#: Initialisations that leave the base weights as they were. The others move weight from the base
#: into the adapter (PiSSA, OLoRA, CorDA, LoftQ), or freeze a factor (MiCA).
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")

#: Fields that are known and change nothing in what the tensors mean.
_HARMLESS = {
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}


def read_config(path: Path) -> tuple[Config, tuple[str, ...]]:
    """The config and the names of fields that are not known. Raises InputError."""
    raw = read_object(path)
    field = _Fields(path, raw)
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise InputError(path, f"peft_type is {peft_type!r}", "only LORA adapters are understood")
    for name, meaning in _NOT_UNDERSTOOD.items():
        if raw.get(name):
            raise InputError(path, f"it uses {meaning}", f"not understood yet; unset {name}")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        init = raw["init_lora_weights"]
        cure = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise InputError(path, f"init_lora_weights is {init!r}, which changes the base model", cure)
    if raw.get("bias", "none") != "none":
        raise InputError(path, f"bias is {raw['bias']!r}", "not understood yet; train with 'none'")
    config = Config(
        path=path,
        r=field.natural("r", 8),
        lora_alpha=field.positive("lora_alpha", 8),
        use_rslora=field.boolean("use_rslora", False),
        rank_pattern=field.pattern("rank_pattern", field.natural_value),
        alpha_pattern=field.pattern("alpha_pattern", field.positive_value),
        targets=patterns.Targets(
            where=path,
            target=field.names("target_modules"),
            exclude=field.names("exclude_modules"),
            layers=field.integers("layers_to_transform"),
            layers_pattern=field.strings("layers_pattern"),
            saved=field.strings("modules_to_save"),
        ),
        facts=Facts(
            base_model=field.text("base_model_name_or_path"),
            revision=field.text("revision"),
            task_type=field.text("task_type"),
            modules_to_save=field.strings("modules_to_save"),
            dropout=field.dropout("lora_dropout"),
            fan_in_fan_out=field.boolean("fan_in_fan_out", False),
        ),
    )
    known = field.seen | _HARMLESS | set(_NOT_UNDERSTOOD)
    known |= {"peft_type", "init_lora_weights", "bias"}
    return config, tuple(sorted(set(raw) - known))


class _Fields:
    """Typed access to the fields of one config; remembers which were asked for."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.seen: set[str] = set()

    def _get(self, name: str) -> Any:
        self.seen.add(name)
        return self.raw.get(name)

    def _refuse(self, name: str, value: Any, wanted: str) -> InputError:
        return InputError(self.path, f"{name} is {str(value)[:80]!r}", f"it must be {wanted}")

    def natural_value(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._refuse(name, value, "a whole number, 1 or more")
        return value

    def positive_value(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._refuse(name, value, "a positive number")
        return float(value)

    def natural(self, name: str, default: int) -> int:
        value = self._get(name)
        return default if name not in self.raw else self.natural_value(name, value)

    def positive(self, name: str, default: float) -> float:
        value = self._get(name)
        return default if name not in self.raw else self.positive_value(name, value)

    def dropout(self, name: str) -> float:
        value = self._get(name)
        if value is None:
            return 0.0
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self._refuse(name, value, "a probability")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._refuse(name, value, "true or false")
        return value

    def text(self, name: str) -> str | None:
        value = self._get(name)
        if value is not None and not isinstance(value, str):
            raise self._refuse(name, value, "text")
        return value or None

    def strings(self, name: str) -> tuple[str, ...]:
        """A list of names; one name alone counts as a list of one."""
        value = self._get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refuse(name, value, "a list of module names")
        return tuple(value)

    def names(self, name: str) -> str | frozenset[str] | None:
        """A regular expression, a set of names, or None."""
        value = self._get(name)
        return value if value is None or isinstance(value, str) else frozenset(self.strings(name))

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self._get(name)
        if value is None or type(value) is int:
            return None if value is None else (value,)
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self._refuse(name, value, "a list of layer numbers")
        return tuple(value) or None

    def pattern(self, name: str, check: Callable[[str, Any], T]) -> dict[str, T]:
        value = self._get(name) or {}
        if not isinstance(value, dict):
            raise self._refuse(name, value, "an object of patterns")
        return {key: check(f"{name}[{key!r}]", item) for key, item in value.items()}
