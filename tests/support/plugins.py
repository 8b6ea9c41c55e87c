"""Methods from outside: functions that processes can import, and distributions without pip."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora_cli import Factors, Method, by_norm, by_samples


def in_full(updates: Sequence[Factors], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum as a dense tensor."""
    pairs = zip(updates, weights, strict=True)
    return sum((update.B * weight @ update.A for update, weight in pairs), torch.zeros(()))


def side_by_side(updates: Sequence[Factors], weights: Sequence[torch.Tensor]) -> Factors:
    """The weighted sum as factors whose scale is not 1."""
    pairs = zip(updates, weights, strict=True)
    B = torch.cat([update.B * weight / 4 for update, weight in pairs], dim=1)
    return Factors(B, torch.cat([update.A for update in updates]), 4.0)


def cut(update: Factors, rank: int) -> Factors:
    """The best approximation by a dense SVD, in factors of unequal size."""
    U, s, Vh = torch.linalg.svd(update.scale * update.B @ update.A, full_matrices=False)
    return Factors(U[:, :rank] * s[:rank] * 3, Vh[:rank] / 6, 2.0)


def outside(name: str, **choices: Any) -> Method:
    """A method whose update before the compression is that of flexlora, unless `choices` differ."""
    usual: dict[str, Any] = {
        "summary": "the weighted mean",
        "formula": "n_k / N",
        "source": "arXiv:2402.11505",
        "rule": by_samples,
        "merge": in_full,
        "compress": "svd",
        "basis_free": True,
    }
    return Method(name, **{**usual, **choices})


#: A method for each way to give a merge and a compression, with the built-in method of the same
#: update before the compression.
OUTSIDE: dict[str, tuple[Method, str]] = {
    each.name: (each, same)
    for each, same in (
        (outside("tensor"), "flexlora"),
        (outside("factors", merge=side_by_side), "flexlora"),
        (outside("cut", merge="sum", compress=cut), "flexlora"),
        (outside("both", merge=in_full, compress=cut), "flexlora"),
        (outside("average-cut", merge="average", compress="svd", basis_free=False), "fedavg"),
        (outside("quick", merge="sum", uses_norms=False), "flexlora"),
    )
}

#: A rule that needs norms over the exact sum, which no built-in method has.
NORMED = outside("normed", rule=by_norm, merge="sum")


def write_distribution(
    target: Path, name: str, version: str, modules: Mapping[str, str], entries: Mapping[str, str]
) -> Path:
    """Install modules, by their text, into the folder `target` as pip does with `--target`."""
    target.mkdir(parents=True, exist_ok=True)
    for module, text in modules.items():
        (target / f"{module}.py").write_text(text)
    info = target / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{method} = {value}" for method, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fedlora.methods]", *lines, ""]))
    return target


def install(source: Path, target: Path) -> Path:
    """Install a project of modules, as its pyproject.toml describes it, without a build backend."""
    project = (source / "pyproject.toml").read_text()
    [name] = re.findall(r'^name = "(.+)"$', project, re.M)
    [version] = re.findall(r'^version = "(.+)"$', project, re.M)
    section = project.split('[project.entry-points."fedlora.methods"]\n')[1].split("\n\n")[0]
    [files] = re.findall(r"^only-include = \[(.+)\]$", project, re.M)
    write_distribution(
        target, name, version, {}, dict(re.findall(r'^([\w-]+) = "(.+)"$', section, re.M))
    )
    for file in re.findall(r'"(.+?)"', files):
        shutil.copy(source / file, target)
    return target
