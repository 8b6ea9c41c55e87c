"""Fuzzing the reader of `adapter_config.json`: whatever it is given, only InputError escapes.

pip install '.[fuzz]' && python tests/fuzz/configs.py -max_total_time=60
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedlora_cli.files", "fedlora_cli.formats", "json"]):
    from fedlora_cli.errors import InputError
    from fedlora_cli.formats.peft.config import read_config

from tally import Tally

MODULES = ("model.layers.0.self_attn.q_proj", "q", "")

SEEDS = (
    {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 0.5,
        "use_rslora": True,
        "rank_pattern": {"^q": 2, "layers.[01].*": 3},
        "alpha_pattern": {"v_proj": 1},
        "target_modules": r".*\.(q|v)_proj",
        "exclude_modules": "k_proj",
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "modules_to_save": ["score"],
        "base_model_name_or_path": "tiny/base",
        "task_type": "SEQ_CLS",
        "lora_dropout": 0.1,
        "fan_in_fan_out": False,
        "revision": None,
        "bias": "none",
        "init_lora_weights": True,
    },
)

#: A small time for expressions: a fuzzer takes one that would not end for a crash.
SECONDS = 0.05


def main(folder: Path) -> None:
    tally, path = Tally(), folder / "adapter_config.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            config, _ = read_config(path)
            config.matcher.seconds_left = SECONDS
            for module in MODULES:
                config.scale(config.alpha(module), config.rank(module))
                config.targets.match(module)
        except InputError:
            tally.count(accepted=False)
        else:
            tally.count(accepted=True)

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        (corpus / f"{number}").write_text(json.dumps(seed))
        (corpus / f"{number}-tight").write_text(json.dumps(seed, separators=(",", ":")))
    names = sorted({name for seed in SEEDS for name in seed} | {"use_dora", "target_parameters"})
    lines = [json.dumps(json.dumps(name) + ":") for name in names]
    lines = [line.replace("\\\\", "\\") for line in lines]
    words = folder / "words"
    words.write_text("\n".join([*lines, '"null"', '"true"', '"[]"', '"{}"', '"-1"', '"1e999"']))
    atheris.Setup([*sys.argv, str(corpus), f"-dict={words}", "-max_len=2048"], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="fedlora-fuzz-")))
