"""Every command writes the same bytes as before, for the samples.

`tests/digests.json` holds the command line of each run, in order, with the digests of the report
and of the files that the run wrote. `python tests/test_bytes.py` writes the digests anew. To add a
run, first add its command line there, with `{}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

TESTS = Path(__file__).resolve().parent
RECORD = TESTS / "digests.json"

#: One thread, and the instructions that every x86-64 processor has: the libraries would otherwise
#: choose faster ones, which round differently.
PLAIN = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1") | {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}


def make_inputs() -> None:
    """Write two sample clients again: with one shared A, and in the formats that are one file."""
    shutil.copytree(TESTS.parent / "samples", "samples")
    Path("counts.csv").write_text("client,samples\nclinic-a,157\nclinic-h,154\n")
    shared: dict[str, Any] = {}
    for client in ("clinic-a", "clinic-h"):
        source = Path("samples/round-01", client)
        tensors = load_file(source / "adapter_model.safetensors")
        shared = shared or {key: value for key, value in tensors.items() if "lora_A" in key}
        frozen = shutil.copytree(source, Path("frozen", client))
        save_file(tensors | shared, frozen / "adapter_model.safetensors")
        kohya, diffusers = {}, {}
        for key, value in tensors.items():
            module, lora, side = key.removeprefix("base_model.model.").partition(".lora_")
            if lora:
                diffusers[f"unet.{module}.lora_{side}"] = value
                side = {"A.weight": "down.weight", "B.weight": "up.weight"}[side]
                kohya[f"lora_unet_{module.replace('.', '_')}.lora_{side}"] = value
        for name, renamed in (("kohya", kohya), ("diffusers", diffusers)):
            Path(name).mkdir(exist_ok=True)
            save_file(renamed, Path(name, f"{client}.safetensors"))


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a JSON tree with the keys that lead to it; times are left out."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield f"{path}/{key}", None
            if "seconds" not in key:
                yield from leaves(tree[key], f"{path}/{key}")
    elif isinstance(tree, list):
        for item in tree:
            yield from leaves(item, path)
    else:
        yield path, tree


def parts_of_report(name: str, text: str | bytes) -> dict[str, bytes]:
    """A report's keys and its numbers; text in it may be reworded."""
    found = list(leaves(json.loads(text)))
    keys = sorted({path for path, _ in found})
    numbers = [f"{path} {x:.6g}" for path, x in found if isinstance(x, int | float)]
    return {
        f"{name} keys": "\n".join(keys).encode(),
        f"{name} numbers": "\n".join(numbers).encode(),
    }


def parts_of_file(path: Path) -> dict[str, bytes]:
    """What stays the same in a written file; a config by PEFT itself has no fixed order."""
    data, is_config = path.read_bytes(), path.name == "adapter_config.json"
    if path.suffix == ".json" and not is_config:
        return parts_of_report(str(path), data)
    return {} if is_config and b'"peft_version"' in data else {str(path): data}


def files() -> set[Path]:
    """All weights and JSON files in the current folder."""
    return {path for kind in ("json", "safetensors") for path in Path().rglob(f"*.{kind}")}


def run_all() -> None:
    """Run every command in the current folder; write the digests into `digests.json` there."""
    make_inputs()
    record: dict[str, dict[str, Any]] = {}
    for run in json.loads(RECORD.read_text())["runs"]:
        before, output = files(), io.StringIO()
        sys.argv = ["fedlora", *run.split(), "--json", "--quiet"]
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as left:
            runpy.run_module("fedlora_cli", run_name="__main__")
        parts = parts_of_report("report", output.getvalue() or "null")
        for path in sorted(files() - before):
            parts |= parts_of_file(path)
        digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
        record[run] = {"exit code": left.value.code or 0, **digests}
    Path("digests.json").write_text(json.dumps(record))


def made_now(folder: Path) -> dict[str, Any]:
    """What the commands write here, and the versions on which the numbers depend."""
    subprocess.run(
        [sys.executable, "-c", "import test_bytes; test_bytes.run_all()"],
        cwd=folder,
        env={**os.environ, **PLAIN, "PYTHONPATH": str(TESTS)},
        check=True,
    )
    versions = {name: version(name).partition("+")[0] for name in ("torch", "transformers")}
    runs = json.loads((folder / "digests.json").read_text())
    return {"made with": {"machine": platform.machine(), **versions}, "runs": runs}


def test_every_command_writes_the_same_bytes(tmp_path: Path) -> None:
    old, new = json.loads(RECORD.read_text()), made_now(tmp_path)
    changed = [
        f"{run}: {file}"
        for run in old["runs"]
        for file in sorted(old["runs"][run].keys() | new["runs"][run].keys())
        if old["runs"][run].get(file) != new["runs"][run].get(file)
    ]
    exact = [line for line in changed if not line.endswith((".safetensors", " numbers"))]
    assert not exact, "\n".join(["configs, keys or exit codes changed:", *exact])
    if new["made with"] != old["made with"]:
        pytest.skip(f"weights are of {old['made with']}, and here is {new['made with']}")
    assert not changed, "\n".join(["weights or numbers changed:", *changed])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        RECORD.write_text(json.dumps(made_now(Path(folder)), indent=1) + "\n")
