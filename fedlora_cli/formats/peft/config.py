"""`adapter_config.json`, read strictly: PEFT itself accepts nearly any value in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora_cli.adapter import Facts
from fedlora_cli.errors import InputError
from fedlora_cli.files.documents import read_object
from fedlora_cli.formats.peft.fields import Fields
from fedlora_cli.formats.peft.patterns import Matcher, Targets


@dataclass(frozen=True)
class Config:
    """The fields that decide what the tensors mean.

    Patterns are kept in the order of the file, because the first one that matches counts.
    """

    path: Path
    matcher: Matcher
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: Targets
    facts: Facts

    def rank(self, module: str) -> int:
        """r of that module: its `rank_pattern`, else `r`."""
        key = self.matcher.first(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scale(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732)."""
        key = self.matcher.first(self.alpha_pattern, module)
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
    field = Fields(path, raw)
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise InputError(path, f"peft_type is {peft_type!r}", "only LORA adapters are understood")
    for name, meaning in _NOT_UNDERSTOOD.items():
        if raw.get(name):
            raise InputError(
                path, f"it uses {meaning}", f"not understood yet; train without {name}"
            )
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        init = raw["init_lora_weights"]
        cure = "convert it with save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise InputError(path, f"init_lora_weights is {init!r}, which changes the base model", cure)
    if raw.get("bias", "none") != "none":
        raise InputError(path, f"bias is {raw['bias']!r}", "not understood yet; train with 'none'")
    matcher = Matcher(path)
    config = Config(
        path=path,
        matcher=matcher,
        r=field.natural("r", 8),
        lora_alpha=field.positive("lora_alpha", 8),
        use_rslora=field.boolean("use_rslora", False),
        rank_pattern=field.pattern("rank_pattern", field.natural_value),
        alpha_pattern=field.pattern("alpha_pattern", field.positive_value),
        targets=Targets(
            matcher=matcher,
            target=field.names("target_modules"),
            exclude=field.names("exclude_modules"),
            layers=field.integers("layers_to_transform"),
            layers_pattern=field.strings("layers_pattern"),
            saved=field.strings("modules_to_save"),
        ),
        facts=Facts(
            base_model=field.text("base_model_name_or_path"),
            revision=field.text("revision"),
            task_type=field.task_type("task_type"),
            dropout=field.dropout("lora_dropout"),
            fan_in_fan_out=field.boolean("fan_in_fan_out", False),
        ),
    )
    known = field.seen | _HARMLESS | set(_NOT_UNDERSTOOD)
    known |= {"peft_type", "init_lora_weights", "bias"}
    return config, tuple(sorted(set(raw) - known))
