"""Adapters of MLX (mlx_lm.lora): recognized, to report them, but not read.

`<module>.lora_a` is (in, r) and `<module>.lora_b` is (r, out); the update is
scale · (lora_a @ lora_b)ᵀ. The config has PEFT's file name. Source: mlx_lm/tuner/lora.py and
mlx_lm/lora.py of ml-explore/mlx-lm 0.32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fedlora_cli.errors import InputError

#: The description and the remedy of the fault.
FOUND = "an adapter of MLX, whose factors are the transposes of PEFT's"
CURE = "convert it with samples/from_mlx.py of fedlora's sources"

#: Fields that no config of PEFT has.
_FIELDS = frozenset({"fine_tune_type", "lora_parameters", "lora_layers"})


class AnotherFormat(InputError):
    """The config belongs to another program, so PEFT's files are not missing."""


def is_config(fields: Collection[str]) -> bool:
    """Whether these are the fields of MLX's `adapter_config.json`.

    >>> is_config({"lora_parameters": {"rank": 8}, "num_layers": 16}), is_config({"r": 8})
    (True, False)
    """
    return "peft_type" not in fields and not _FIELDS.isdisjoint(fields)


def has_factors(keys: Iterable[str]) -> bool:
    """Whether any of these names is that of an MLX factor.

    >>> has_factors(["model.layers.0.self_attn.q_proj.lora_a"])
    True
    """
    return any(key.endswith((".lora_a", ".lora_b")) for key in keys)
