"""What `--verify` must see, and what it must not mistake for an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import Spec, make
from support.rounds import SHAPES, make_round

from fedlora_cli import METHODS, AggregateOptions, VerificationError, aggregate


@contextmanager
def write_wrong(adapter, folder, provenance, *, module: str, B: torch.Tensor) -> Iterator[Any]:
    """What a defect between the algebra and the disk would do."""
    from fedlora_cli.formats import peft

    with peft.writing(adapter, folder, provenance) as put:
        yield lambda name, one: put(name, replace(one, B=B) if name == module else one)


@pytest.mark.parametrize("size", [1e-3, 7e-4, 1e-4, 1e-6])
def test_verification_sees_a_wrong_direction_though_truncation_loses_more(
    tmp_path: Path, monkeypatch, size: float
) -> None:
    """A change outside of what the sum spans, far smaller than what truncation leaves out."""
    from fedlora_cli.formats import FORMATS

    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "good", AggregateOptions(rank=2, verify=True))
    key = "base_model.model.layers.1.fc.lora_B.weight"
    B = load_file(tmp_path / "good/adapter_model.safetensors")[key]
    noise = torch.randn(B.shape, generator=torch.Generator().manual_seed(5))
    wrong = B + size * B.norm() * noise / noise.norm()

    defect = partial(write_wrong, module="layers.1.fc", B=wrong)
    monkeypatch.setitem(FORMATS, "peft", replace(FORMATS["peft"], writing=defect))
    with pytest.raises(VerificationError, match=r"layers\.1\.fc is off by"):
        aggregate([tmp_path / "round"], tmp_path / "bad", AggregateOptions(rank=2, verify=True))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("method", ["raflora", "flexlora", "flora", "fedavg"])
@pytest.mark.parametrize("share", [0.0, 1e-3, 1e-9])
def test_clients_that_cancel_each_other_verify(tmp_path: Path, method: str, share: float) -> None:
    from safetensors.torch import save_file

    one = make(tmp_path / "round", Spec("a", rank=3, samples=10, shapes=SHAPES))
    other = make(tmp_path / "round", Spec("b", rank=3, samples=10, shapes=SHAPES))
    tensors = load_file(one.folder / "adapter_model.safetensors")
    opposite = {k: t * (-1 + share if "lora_B" in k else 1) for k, t in tensors.items()}
    save_file(opposite, other.folder / "adapter_model.safetensors")

    report = aggregate(
        [tmp_path / "round"], tmp_path / "out", AggregateOptions(method=method, verify=True)
    )

    assert report.verification is not None
    if share == 0.0 and METHODS[method].compress == "svd":
        assert all(row.rank == 0 for row in report.modules)
