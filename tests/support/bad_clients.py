"""Clients that must be refused for their config, factors, or place among the others."""

from __future__ import annotations

import os
from typing import Any

import torch

from support.adapters import PREFIX
from support.damage import (
    CONFIG,
    Q_A,
    Q_B,
    WEIGHTS,
    Damage,
    config,
    header,
    move_away,
    put,
    raw_config,
    rename_tensor,
    replace_tensor,
    set_config,
    set_tensors,
    twice,
    twin,
    void,
    with_value,
)


def config_text(old: str, new: str) -> Damage:
    """Change the text of the config, and leave what JSON would not write."""
    return lambda folder: raw_config((folder / CONFIG).read_text().replace(old, new))(folder)


def long_named(A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Factors of a module with a long name, which gives a matcher much to try."""
    module = f"{PREFIX}layers.0.{'a' * 200}"
    return {f"{module}.lora_A.weight": A.clone(), f"{module}.lora_B.weight": B.clone()}


CONFIGS: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json: cannot be read (no such"),
    "empty config": (raw_config(""), "adapter_config.json: not valid JSON"),
    "broken JSON": (raw_config('{"peft_type": '), "adapter_config.json: not valid JSON"),
    "config is a list": (raw_config("[]"), "a JSON list"),
    "config is null": (raw_config("null"), "a JSON NoneType"),
    "config nested without end": (raw_config("[" * 100_000), "nested too deeply"),
    "a key twice": (raw_config(twice("")), "the key 'r' appears twice"),
    "NaN in the config": (raw_config(twice("").replace("64", "NaN")), "NaN is not a JSON number"),
    "a number of 5000 digits": (raw_config('{"r": ' + "9" * 5000 + "}"), "not valid JSON"),
    "not UTF-8": (lambda f: void((f / CONFIG).write_bytes(b"\xff\xfe{}")), "not Unicode text"),
    "half a surrogate pair": (config_text("tiny/base", "\\ud800"), "not Unicode text"),
    "a name of 10 MB": (config(base_model_name_or_path="x" * 10**7), "at most 4096 characters"),
    "a config of 17 MB": (config(x="x" * 17 * 2**20), "bytes, more than 16777216"),
    "a name of 5000 letters": (config(base_model_name_or_path="x" * 5000), "at most 4096 charac"),
    **{
        f"peft_type {value!r}": (config(peft_type=value), "only LORA adapters are understood")
        for value in ("IA3", "EVIL", None, ["LORA"], {"a": 1})
    },
    "a type of a megabyte": (config(peft_type="x" * 10**6), "…; only LORA adapters are"),
    "a key of a megabyte": (config(rank_pattern={"x" * 10**6: -1}), "…; it must be a whole number"),
    "a megabyte twice": (raw_config(f'{{"{"x" * 500_000}":1,"{"x" * 500_000}":2}}'), "…; write"),
    "infinite alpha": (config_text('"lora_alpha": 8', '"lora_alpha": 1e999'), "lora_alpha is inf"),
    "alpha of 401 digits": (config(lora_alpha=10**400), "at most 1e+12"),
    "a task that PEFT does not know": (config(task_type="EVIL"), "task_type is 'EVIL'"),
    "rank not as in the config": (config(r=4), "has rank 3, but adapter_config.json gives it 4"),
    "a target that PEFT would not match": (
        config(target_modules=["v_proj"]),
        "layers.0.q_proj has LoRA tensors, but target_modules does not match it",
    ),
    "an expression that takes Python's matcher for ever": (
        config(target_modules="([a-z_.0-9]+)+!"),
        "target_modules does not match it",
    ),
    "an expression that takes every matcher for ever": (
        lambda f: (
            set_tensors(f, lambda t: t.update(long_named(t[Q_A], t[Q_B]))),
            set_config(f, rank_pattern={"(.|..)+" * 8 + r"\1[01]{2}": 4}, target_modules=None),
        ),
        "its expressions take too long",
    ),
    "an expression that takes all memory": (
        config(exclude_modules="a{4000000000}"),
        "is not a usable regular expression",
    ),
    "repetitions of repetitions": (
        config(rank_pattern={"(((a{1000}){1000}){1000})": 4}),
        "is not a usable regular expression",
    ),
    "an expression that is none": (
        config(alpha_pattern={"(": 4}),
        "is not a usable regular expression",
    ),
    **{
        f"{field} = {str(value)[:20]!r}": (config(**{field: value}), "; it must be ")
        for field, value in [
            *(("r", value) for value in (0, -4, 2.5, "3", True, None, [8], 10**13)),
            *(("lora_alpha", value) for value in (0, -16, "16", True)),
            ("use_rslora", "false"),
            ("rank_pattern", {"q_proj": -1}),
            ("alpha_pattern", [1]),
            ("modules_to_save", {"a": 1}),
            ("lora_dropout", 2),
            ("fan_in_fan_out", 1),
            ("layers_to_transform", "all"),
            ("base_model_name_or_path", 7),
        ]
    },
}


def with_tensors(**factors: Any) -> Damage:
    """Replace A and B of one module at a time."""
    keys = {"A": Q_A, "B": Q_B}
    named = {keys[side]: tensor for side, tensor in factors.items()}
    return lambda folder: set_tensors(folder, lambda tensors: tensors.update(named))


FACTORS: dict[str, tuple[Damage, str]] = {
    "A without B": (
        lambda f: set_tensors(f, lambda t: void(t.pop(Q_B))),
        "layers.0.q_proj has lora_A but no lora_B",
    ),
    "B without A": (
        lambda f: set_tensors(f, lambda t: void(t.pop(Q_A))),
        "layers.0.q_proj has lora_B but no lora_A",
    ),
    "ranks of A and B differ": (with_tensors(A=torch.ones(4, 20)), "differ in rank"),
    "factors swapped": (header(lambda h: h.update({Q_A: h[Q_B], Q_B: h[Q_A]})), "differ in rank"),
    "factors transposed": (
        with_tensors(A=torch.ones(20, 3), B=torch.ones(3, 12)),
        "differ in rank",
    ),
    "another shape than the others": (
        with_tensors(A=torch.ones(3, 21)),
        "layers.0.q_proj is linear 12 x 20, but linear 12 x 21",
    ),
    "no LoRA at all": (
        lambda f: set_tensors(f, lambda t: (t.clear(), t.update({PREFIX + "x": torch.ones(2)}))),
        "no LoRA tensors in it",
    ),
    "nothing at all": (lambda f: set_tensors(f, lambda t: t.clear()), "no LoRA tensors in it"),
    "not from PEFT": (rename_tensor(Q_A, "q.lora_A"), "PEFT's names begin with"),
    "an adapter that is not of PEFT": (
        rename_tensor(Q_A, Q_A.replace(".weight", ".of.mine.weight")),
        "a LoRA variant",
    ),
    "a leftover tensor": (replace_tensor(f"{PREFIX}extra.weight", torch.ones(2)), "not part of"),
    "a magnitude vector": (
        replace_tensor(Q_A.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(12)),
        "layers.0.q_proj.lora_magnitude_vector: DoRA",
    ),
    "an ungathered shard": (with_tensors(A=torch.ones(0)), "gather the shards (ZeRO-3, FSDP)"),
    "a head that was not gathered": (
        lambda f: (
            set_config(f, modules_to_save=["score"]),
            replace_tensor(f"{PREFIX}score.weight", torch.ones(0))(f),
        ),
        "gather the shards (ZeRO-3, FSDP)",
    ),
    "factors of whole numbers": (
        with_tensors(A=torch.ones(3, 20, dtype=torch.int32)),
        "dtype int32",
    ),
    "a module without a name": (
        lambda f: set_tensors(
            f,
            lambda t: t.update({f"{PREFIX}.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}),
        ),
        "factors of a module without a name",
    ),
}

#: What only the values tell, which are read after all headers.
VALUES: dict[str, tuple[Damage, str]] = {
    "NaN": (with_value(float("nan")), "holds 1 NaN or infinite values, the first at position 22"),
    "infinity": (with_value(float("-inf")), "holds 1 NaN or infinite values"),
    "an update beyond all numbers": (
        lambda f: set_tensors(
            f, lambda t: t.update({key: 1e300 * t[key].double() for key in (Q_A, Q_B)})
        ),
        "the update of layers.0.q_proj is larger than any number",
    ),
}

CLIENTS: dict[str, tuple[Damage, str]] = {
    "another base model": (
        config(base_model_name_or_path="other/base"),
        "its base model is tiny/base, but other/base",
    ),
    "a global adapter": (
        put("fedlora.json", '{"schema": "fedlora.aggregate/1"}'),
        "a global adapter that fedlora wrote, not a client; leave it out; aggregate takes it as",
    ),
    "an adapter that has not arrived": (
        lambda f: ((f / CONFIG).unlink(), (f / WEIGHTS).unlink()),
        "a client's sample count, but no adapter; wait until it is uploaded",
    ),
    "a broken link": (
        lambda f: (f.rename(f.with_name("x")), f.symlink_to("gone"), move_away(f.with_name("x"))),
        "a broken link; mend the link",
    ),
    "a link to another client": (
        lambda f: (move_away(f), f.symlink_to("good")),
        "the same folder as",
    ),
    "a name that is not UTF-8": (
        lambda f: f.rename(os.fsdecode(os.fsencode(f) + b"\xff")),
        "a path that is not UTF-8; rename the folder",
    ),
    "names that Unicode spells in two ways": (
        twin("bad-\u00e9", "bad-e\u0301"),
        "a client named almost like ",
    ),
    "names that differ in case": (twin("Bad", "bad"), "a client named almost like "),
    "negative sample count": (put("fedlora.json", '{"samples": -5}'), "samples: -5 samples"),
    "sample count is text": (put("fedlora.json", '{"samples": "5"}'), "a sample count is a number"),
    "sample count is no number": (put("fedlora.json", '{"samples": NaN}'), "samples: nan samples"),
    "as many samples as atoms": (put("fedlora.json", '{"samples": 1e300}'), "samples: 1e+300 sam"),
    "a sample count of 17 MB": (put("fedlora.json", " " * 17 * 2**20), "bytes, more than 16777216"),
    "no sample count": (
        lambda f: (f / "fedlora.json").unlink(),
        "no sample count for bad, while other clients have one",
    ),
}
