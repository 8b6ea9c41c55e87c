"""Clients of any size, with and without pieces that cancel, against every defence and route."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.adapters import CONFIG, PREFIX, WEIGHTS, relative_error, written_update
from support.routes import take

from fedlora_cli import AggregateOptions, AggregateReport, InputError, aggregate
from fedlora_cli.kernels.routes import ROUTES

Q, V = "layers.0.q_proj", "layers.0.v_proj"
SHAPES = {Q: (24, 30), V: (17, 30)}
OWN = "layers.1.fc"

#: Honest clients by their ranks; the attacker has the largest, which others have, too.
RANKS = (2, 4, 4, 6, 6)
RANK = max(RANKS)

_TOGETHER = AggregateOptions(quorum=0.5, missing="zero", clip_norm="auto")
KRUM = AggregateOptions(robust="multi-krum", attackers=1)
MEDIAN = AggregateOptions(robust="geometric-median")
TRUST = {
    "krum": KRUM,
    "median": MEDIAN,
    "recipe with krum": replace(_TOGETHER, robust="multi-krum", attackers=1),
    "recipe": replace(_TOGETHER, robust="geometric-median"),
}
DEFENCES = {
    "none": AggregateOptions(),
    "quorum": AggregateOptions(quorum=0.5),
    "max weight": AggregateOptions(max_weight=0.3),
    "clip": AggregateOptions(clip_norm="auto"),
    **TRUST,
}
METHODS = {
    method: AggregateOptions(method=method)
    for method in ("residual", "flexlora", "flora", "fedavg", "hetlora", "rbla")
}
ORDERED = {
    "svd": AggregateOptions(basis="svd"),
    "svd recipe": replace(TRUST["recipe"], basis="svd"),
}

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def upload(folder: Path, pairs: Pairs, alpha: float | None = None, dtype: str = "float32") -> None:
    folder.mkdir(parents=True)
    kind = getattr(torch, dtype)
    tensors = {}
    for module, (B, A) in pairs.items():
        tensors[f"{PREFIX}{module}.lora_B.weight"] = B.to(kind).contiguous()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = A.to(kind).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    rank = len(next(A for _, A in pairs.values()))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
        "base_model_name_or_path": "tiny/base",
    }
    (folder / CONFIG).write_text(json.dumps(config))


def signal(seed: int, rank: int, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Pairs:
    """What an honest client trains: a common signal with noise of its own, in SVD order."""
    common, rng = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    pairs = {}
    for module, shape in shapes.items():
        decay = torch.logspace(0, -1, shape[0])[:, None]
        noisy = decay * torch.randn(shape, generator=common)
        noisy = noisy + 0.2 * torch.randn(shape, generator=rng)
        U, s, Vh = torch.linalg.svd(noisy.double(), full_matrices=False)
        root = s[:rank].sqrt()
        pairs[module] = (U[:, :rank] * root, root[:, None] * Vh[:rank])
    return pairs


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("honest")
    for k, rank in enumerate(RANKS):
        upload(root / f"honest-{k}", signal(k, rank))
    return root


def outcome(folders: list[Path], output: Path, options: AggregateOptions) -> AggregateReport:
    return aggregate(folders, output, replace(options, jobs=1, verify=True))


def moved(found: Path, expected: Path, module: str = Q) -> float:
    return relative_error(written_update(found, module), written_update(expected, module))


# --- pieces that cancel ---------------------------------------------------------------------------


def cancelling(size: float, apart: float, seed: int = 90) -> Pairs:
    """An honest update with two more pieces, which leave this share of themselves."""
    pairs = {}
    for module, (B, A) in signal(seed, RANK - 2).items():
        b, a = torch.randn(B.shape[0], 1), torch.randn(1, A.shape[1])
        rows = torch.cat([A, a, a + apart * torch.randn(1, A.shape[1])])
        pairs[module] = (torch.cat([B, size * b, -size * b], dim=1), rows)
    return pairs


def one_module(size: float) -> Pairs:
    return {**signal(91, RANK), V: cancelling(size, 0.0)[V]}


def halves(size: float) -> Pairs:
    """b and -b / 2 twice, of other lengths."""
    pairs = {}
    for module, (B, A) in cancelling(size, 0.0).items():
        b, a = B[:, -2:-1], A[-2:-1]
        columns = torch.cat([B[:, :3], b, -(2.0**10) * b, -(2.0**10) * b], dim=1)
        pairs[module] = (columns, torch.cat([A[:3], a, a / 2**11, a / 2**11]))
    return pairs


CANCELLING = {
    "a pair to zero": (cancelling(1e13, 0.0), None),
    "a pair but for float32": (cancelling(2.0**50, 2e-7), None),
    "2^110": (cancelling(2.0**110, 2e-7), None),
    "one module": (one_module(1e13), None),
    "three pieces": (halves(1e13), None),
    "by lora_alpha": (cancelling(1.0, 0.0), 1e12),
}


@pytest.mark.parametrize("attack", CANCELLING)
def test_a_client_whose_pieces_cancel_is_named_and_left_out(
    attack: str, honest: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pairs, alpha = CANCELLING[attack]
    if attack == "by lora_alpha":  # nothing but what cancels, or the update would be large
        pairs = {m: (B[:, -2:], A[-2:]) for m, (B, A) in pairs.items()}
    upload(tmp_path / "round" / "zed", pairs, alpha)
    folders = [honest, tmp_path / "round"]
    module = V if attack == "one module" else Q

    with pytest.raises(InputError, match=rf"zed: the pieces of the update of {module} cancel"):
        outcome(folders, tmp_path / "out", AggregateOptions())
    left = AggregateOptions(on_bad_client="skip", min_clients=5)
    report = outcome(folders, tmp_path / "left", left)
    outcome([honest], tmp_path / "alone", AggregateOptions())

    assert [one.name for one in report.left_out] == ["zed"]
    assert f"the pieces of the update of {module} cancel" in report.left_out[0].reason
    assert moved(tmp_path / "left", tmp_path / "alone") == 0.0


@pytest.mark.parametrize("name", [*DEFENCES, *METHODS, *ORDERED])
def test_an_erasing_client_is_refused_under_every_choice(
    name: str, honest: Path, tmp_path: Path
) -> None:
    options = {**DEFENCES, **METHODS, **ORDERED}[name]
    upload(tmp_path / "zed", cancelling(1e13, 0.0))
    with pytest.raises(InputError, match=r"zed: the pieces of the update of .* cancel"):
        outcome([honest, tmp_path / "zed"], tmp_path / "out", options)


@pytest.mark.parametrize("route", ROUTES)
def test_an_erasing_client_is_refused_on_every_route(
    route: str, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(tmp_path / "zed", cancelling(1e13, 0.0))
    take(route, monkeypatch)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(InputError, match=r"zed: the pieces of the update of .* cancel"):
            outcome([honest, tmp_path / "zed"], tmp_path / "out", AggregateOptions(dtype=dtype))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [1e2, 3e4])
def test_what_cancels_in_part_leaves_the_others_as_they_are(
    route: str, size: float, honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As adapters converted from PiSSA do: the mean is that with the same update in SVD order."""
    pairs = cancelling(size, 1e-3 / size)
    upload(tmp_path / "zed", pairs)
    plain = {}
    for module, (B, A) in pairs.items():
        U, s, Vh = torch.linalg.svd(B.float().double() @ A.float().double(), full_matrices=False)
        root = s[:RANK].sqrt()
        plain[module] = (U[:, :RANK] * root, root[:, None] * Vh[:RANK])
    upload(tmp_path / "plain" / "zed", plain)
    options = AggregateOptions(method="flexlora", rank=17)
    outcome([honest, tmp_path / "plain" / "zed"], tmp_path / "expected", options)
    take(route, monkeypatch)

    outcome([honest, tmp_path / "zed"], tmp_path / "out", options)

    assert moved(tmp_path / "out", tmp_path / "expected") < 2e-6


def test_large_factors_without_an_update_erase_nothing(honest: Path, tmp_path: Path) -> None:
    """B is zero and A is huge: no piece of it is larger than zero, but in a mean of factors."""
    pairs = {m: (torch.zeros_like(B), 1e13 * A) for m, (B, A) in signal(92, RANK).items()}
    upload(tmp_path / "zed", pairs)
    plain = {m: (B, A / 1e13) for m, (B, A) in pairs.items()}
    upload(tmp_path / "plain" / "zed", plain)

    for name, options in {**DEFENCES, **METHODS, **ORDERED}.items():
        if name in ("fedavg", "hetlora", "rbla"):
            continue
        outcome([honest, tmp_path / "plain" / "zed"], tmp_path / f"{name}-expected", options)
        outcome([honest, tmp_path / "zed"], tmp_path / name, options)
        assert moved(tmp_path / name, tmp_path / f"{name}-expected") < 1e-6, name
    for name in ("fedavg", "rbla"):
        with pytest.raises(InputError, match=r"zed: its lora_A of .* times the median, too large"):
            outcome([honest, tmp_path / "zed"], tmp_path / name, METHODS[name])


def test_two_clients_that_cancel_each_other_do_not_erase_the_round(
    honest: Path, tmp_path: Path
) -> None:
    """Each of them is what it seems; only their sum is nothing."""
    noise = {m: (torch.randn(B.shape), A) for m, (B, A) in signal(93, RANK).items()}
    outcome([honest], tmp_path / "alone", AggregateOptions(method="flexlora", rank=17))
    for size in (1e3, 1e13):
        for name, sign in (("yan", 1), ("zed", -1)):
            pairs = {m: (sign * size * B, A) for m, (B, A) in noise.items()}
            upload(tmp_path / f"{size}" / name, pairs)
        folders, out = [honest, tmp_path / f"{size}"], tmp_path / f"out {size}"
        options = AggregateOptions(method="flexlora", rank=17)
        if size == 1e13:
            with pytest.raises(InputError, match=r"yan: its update of .* other clients cancel it"):
                outcome(folders, out, options)
            continue
        outcome(folders, out, options)
        whole = written_update(out, Q) * 7 / 5
        assert relative_error(whole, written_update(tmp_path / "alone", Q)) < 1e-5


# --- any size -------------------------------------------------------------------------------------


def scaled(size: float) -> Pairs:
    return {m: (-size * B, A) for m, (B, A) in signal(94, RANK).items()}


def both_factors(size: float) -> Pairs:
    return {m: (-(size**0.5) * B, size**0.5 * A) for m, (B, A) in signal(94, RANK).items()}


def split(size: float) -> Pairs:
    """An honest update, and the first and last rank index cancel: under weights of their own, they
    do not. As far as that is no fault by itself.
    """
    large = min(size, 1e5)
    pairs = {}
    for module, (B, A) in signal(95, RANK).items():
        b, a = torch.randn(B.shape[0], 1), torch.randn(1, A.shape[1])
        columns = torch.cat([large * b, B[:, 1:-1], -large * b], dim=1)
        pairs[module] = (columns, torch.cat([a, A[1:-1], a]))
    return pairs


def own_module(size: float) -> Pairs:
    B, A = signal(96, RANK, {OWN: (20, 20)})[OWN]
    return {**signal(97, RANK), OWN: (size * B, A)}


def own_ranks(size: float) -> Pairs:
    """Rank indices that nobody else has."""
    pairs = {}
    for module, (B, A) in signal(98, RANK + 4).items():
        pairs[module] = (torch.cat([B[:, :RANK], size * B[:, RANK:]], dim=1), A)
    return pairs


SIZED = {
    "scaled": scaled,
    "both factors": both_factors,
    "split": split,
    "own module": own_module,
    "own ranks": own_ranks,
}

#: Up to the largest float32, and with float64 as far as a norm is a number.
SIZES = [1.0, 1e2, 1e4, 1e7, 1e13, 1e14, 1e15, 1e20, 1e26, 1e37]
LARGER = [1e60, 1e100, 1e140]


@pytest.mark.parametrize("attack", SIZED)
@pytest.mark.parametrize("name", TRUST)
def test_trust_times_norm_is_bounded_for_every_size(
    name: str, attack: str, honest: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    alone = outcome([honest], tmp_path / "alone", AggregateOptions())
    typical = float(np.median([row.norm or 0.0 for row in alone.clients]))
    trusting = replace(TRUST[name], robust=None, attackers=None)
    outcome([honest], tmp_path / "expected", trusting)
    # What nobody else has is written as it is, if float32 holds it.
    lone = attack.startswith("own") and not TRUST[name].clip_norm
    for size in SIZES if lone else SIZES + LARGER:
        folder = tmp_path / f"{size}" / "zed"
        upload(folder, SIZED[attack](size), dtype="float64" if size in LARGER else "float32")
        report = outcome([honest, folder], tmp_path / f"out {size}", TRUST[name])

        row = next(row for row in report.clients if row.name == "zed")
        assert row.norm is not None
        assert row.trust is not None
        assert row.trust * row.norm <= 3.5 * typical
        # There weight does not depend on trust: it needs a clip.
        if not lone:
            far = moved(tmp_path / f"out {size}", tmp_path / "expected")
            assert far < (4.0 if attack == "split" else 1.0), (size, far)
        others = [row.trust for row in report.clients if row.name != "zed"]
        assert max(one for one in others if one is not None) > 0.5


@pytest.mark.parametrize("attack", SIZED)
def test_a_clip_holds_for_every_size(attack: str, honest: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    options = AggregateOptions(clip_norm="auto", max_weight=0.3)
    outcome([honest], tmp_path / "expected", options)
    for size in SIZES + LARGER:
        folder = tmp_path / f"{size}" / "zed"
        upload(folder, SIZED[attack](size), dtype="float64" if size in LARGER else "float32")
        report = outcome([honest, folder], tmp_path / f"out {size}", options)

        row = next(row for row in report.clients if row.name == "zed")
        typical = float(np.median([one.norm or 0.0 for one in report.clients]))
        assert row.norm is not None
        assert row.clip is not None
        assert row.norm * row.clip <= 2.0 * typical * (1 + 1e-9)
        assert moved(tmp_path / f"out {size}", tmp_path / "expected") < 1.5


def test_without_a_bound_the_size_is_a_warning(honest: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    for name, pairs in (("scaled", scaled(1e4)), ("split", split(1e5))):
        upload(tmp_path / name / "zed", pairs)
        report = outcome(
            [honest, tmp_path / name / "zed"], tmp_path / f"out {name}", AggregateOptions()
        )
        assert any("update of zed is" in one and "--clip-norm" in one for one in report.warnings)


def test_norms_beyond_their_squares_are_refused(honest: Path, tmp_path: Path) -> None:
    for number, size in enumerate((1e155, 1e200, 1e300)):
        folder = tmp_path / f"{number}" / "zed"
        upload(folder, both_factors(size), dtype="float64")
        for options in (AggregateOptions(), *TRUST.values()):
            with pytest.raises(InputError, match=r"zed: the update of .* is larger than any"):
                outcome([honest, folder], tmp_path / "out", options)
