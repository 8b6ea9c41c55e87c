"""kohya's LoRA files: what is read from them, what is written, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support import oracle
from support.adapters import Spec, make, relative_error, truncated

from fedlora_cli import (
    METHODS,
    AggregateOptions,
    DiagnoseOptions,
    DistributeOptions,
    InputError,
    InspectOptions,
    aggregate,
    compare,
    diagnose,
    distribute,
    inspect,
    read,
)

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"

#: (out, in, *kernel) of the modules.
SHAPES: dict[str, tuple[int, ...]] = {TO_Q: (24, 20), CONV: (16, 6, 3, 3), TEXT: (18, 30)}
METADATA = {"ss_sd_model_name": "v1-5.safetensors", "ss_base_model_version": "sd_v1"}

Factors = dict[str, tuple[np.ndarray, np.ndarray, float]]


@dataclass(frozen=True)
class Client:
    """A file to make: alpha None leaves the tensor out, `frozen` gives all clients one A."""

    name: str
    rank: int
    alpha: float | None
    samples: int
    conv_rank: int = 0
    dtype: torch.dtype = torch.float32
    alpha_dtype: torch.dtype = torch.float32
    frozen: bool = False

    def rank_of(self, module: str) -> int:
        return (self.conv_rank or self.rank) if module == CONV else self.rank


#: Mixed ranks and alphas, one alpha missing, one an integer, one in half precision.
ROUND = (
    Client("ann", 2, 1.0, 30, alpha_dtype=torch.bfloat16),
    Client("bob", 5, None, 11, conv_rank=3),
    Client("cy", 4, 16, 50, alpha_dtype=torch.int64),
    Client("dee", 3, 2.5, 9, alpha_dtype=torch.float16),
)


def tensors_of(client: Client, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(client.name.encode()))
    tensors: dict[str, Any] = {}
    for module, (rows, *sides) in shapes.items():
        rank = client.rank_of(module)
        up = torch.randn(rows, rank, *(1 for _ in sides[1:]), generator=generator)
        tensors[f"{module}.lora_up.weight"] = up.to(client.dtype)
        if client.frozen:
            generator.manual_seed(0)
        down = torch.randn(8, *sides, generator=generator)[:rank].contiguous()
        tensors[f"{module}.lora_down.weight"] = down.to(client.dtype)
        if client.alpha is not None:
            tensors[f"{module}.alpha"] = torch.tensor(client.alpha, dtype=client.alpha_dtype)
    return tensors


def factors_in(file: Path) -> Factors:
    """B, A and alpha / dim of every module, as kohya's merge script takes them from a file."""
    tensors = load_file(file)
    result: Factors = {}
    for key in tensors:
        if "lora_down" in key:
            module = key[: key.index(".lora_down")]
            down = tensors[key].astype("f8")
            up = tensors[key.replace("lora_down", "lora_up")].astype("f8")
            scale = float(tensors.get(f"{module}.alpha", np.array(len(down)))) / len(down)
            B, A = up.reshape(len(up), -1), down.reshape(len(down), -1)
            result[module] = B, A, scale
    return result


def merged(file: Path, module: str, multiplier: float = 1.0) -> np.ndarray:
    """What a base weight of zeros becomes: W += multiplier * up @ down * alpha / dim."""
    B, A, scale = factors_in(file)[module]
    return multiplier * B @ A * scale


def make_round(root: Path, clients: tuple[Client, ...] = ROUND) -> tuple[Path, Path]:
    """The folder of the files, and a file with their sample counts."""
    folder = root / "round"
    folder.mkdir(parents=True)
    for client in clients:
        save_file(tensors_of(client), folder / f"{client.name}.safetensors", metadata=METADATA)
    counts = root / "counts.json"
    counts.write_text(json.dumps({client.name: client.samples for client in clients}))
    return folder, counts


def given(module: str, clients: tuple[Client, ...] = ROUND) -> list[Any]:
    """The clients as the oracle takes them; alphas from how they were made, not from the file."""
    result = []
    for client in clients:
        tensors = tensors_of(client)
        B = tensors[f"{module}.lora_up.weight"].double().flatten(1).numpy()
        A = tensors[f"{module}.lora_down.weight"].double().flatten(1).numpy()
        rank = client.rank_of(module)
        scale = 1.0 if client.alpha is None else client.alpha / rank
        result.append((B, A, scale, float(client.samples)))
    return result


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_file_holds_the_update_that_its_tensors_say(tmp_path: Path) -> None:
    folder, _ = make_round(tmp_path)
    for number, client in enumerate(ROUND):
        adapter = read(folder / f"{client.name}.safetensors")
        assert (adapter.format, list(adapter.modules)) == ("kohya", sorted(SHAPES))
        assert adapter.metadata.base_model == "v1-5.safetensors"
        for name, module in adapter.modules.items():
            B, A, scale, _ = given(name)[number]
            factors = module.read()
            assert module.shape == (SHAPES[name][0], int(np.prod(SHAPES[name][1:])))
            assert (module.rank, module.scale) == (client.rank_of(name), scale)
            assert module.alpha == (client.alpha or client.rank_of(name))
            update = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
            assert relative_error(update, scale * B @ A) < 1e-15
        assert adapter.modules[CONV].layout.sides == (6, 3, 3)


def test_headers_and_alphas_are_read_without_torch(tmp_path: Path) -> None:
    folder, _ = make_round(tmp_path)
    program = (
        "import sys; from pathlib import Path; from fedlora_cli.formats import read\n"
        f"assert read(Path({str(folder / 'dee.safetensors')!r})).modules[{TEXT!r}].alpha == 2.5\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_written_file_holds_what_the_method_asks_for(tmp_path: Path, method: str) -> None:
    """Against the dense float64 reference, read as kohya's merge script reads it."""
    clients = tuple(replace(one, frozen=method == "ffa") for one in ROUND)
    folder, counts = make_round(tmp_path, clients)
    report = aggregate(
        folder,
        tmp_path / "out",
        AggregateOptions(method=method, samples=counts, verify=True, jobs=1),
    )

    file = tmp_path / "out/lora.safetensors"
    assert set(factors_in(file)) == set(SHAPES)
    for module in SHAPES:
        expected = oracle.aggregate(method, given(module, clients))
        if METHODS[method].compress == "svd":
            expected = truncated(expected, 5)
        assert relative_error(merged(file, module), expected) < 1e-6
        assert len(factors_in(file)[module][1]) == report.rank
    assert report.verification is not None
    assert report.format == "kohya"


def test_the_written_folder_is_kohyas_and_says_so(tmp_path: Path) -> None:
    folder, counts = make_round(tmp_path)
    aggregate(folder, tmp_path / "out", AggregateOptions(samples=counts, dtype="float16"))

    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "fedlora.json", "lora.safetensors"]
    with safe_open(tmp_path / "out/lora.safetensors", "np") as file:
        metadata = file.metadata()
        assert {file.get_slice(f"{TO_Q}.lora_down.weight").get_dtype()} == {"F16"}
        assert file.get_slice(f"{TO_Q}.alpha").get_shape() == []
        assert file.get_slice(f"{CONV}.lora_up.weight").get_shape() == [16, 5, 1, 1]
        assert file.get_slice(f"{CONV}.lora_down.weight").get_shape() == [5, 6, 3, 3]
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "5",
        "ss_network_alpha": "5.0",
        **METADATA,
    }
    assert metadata.items() >= expected.items()
    assert json.loads(metadata["fedlora"])["method"] == "raflora"
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name" not in card
    assert "peft" not in card.lower()
    assert 'base_model: "v1-5.safetensors"' in card
    assert json.loads((tmp_path / "out/fedlora.json").read_text())["format"] == "kohya"


def test_a_scale_that_float32_cannot_hold_is_kept(tmp_path: Path) -> None:
    """All clients at alpha / r = 0.7: in float64, not even the last bit of it may change."""
    clients = (
        Client("a", 2, 1.4, 1, alpha_dtype=torch.float64),
        Client("b", 4, 2.8, 1, alpha_dtype=torch.float64),
    )
    folder, _ = make_round(tmp_path, clients)
    report = aggregate(folder, tmp_path / "out", AggregateOptions(dtype="float64", verify=True))

    assert report.scale == 0.7
    assert read(tmp_path / "out").modules[TEXT].scale == 0.7


def test_same_bytes_for_any_order_of_clients_and_jobs(tmp_path: Path) -> None:
    folder, counts = make_round(tmp_path)
    files = sorted(folder.iterdir())
    written = set()
    for number, (order, jobs) in enumerate(itertools.product([files, files[::-1]], [1, 2])):
        out = tmp_path / f"out{number}"
        aggregate(order, out, AggregateOptions(samples=counts, jobs=jobs))
        written.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))
    aggregate(folder, tmp_path / "whole", AggregateOptions(samples=counts))
    written.add(tuple(path.read_bytes() for path in sorted((tmp_path / "whole").iterdir())))

    assert len(written) == 1


def test_rounds_build_on_each_other(tmp_path: Path) -> None:
    """The previous adapter keeps rank indices alive; momentum adds the last step."""
    folder, counts = make_round(tmp_path)
    low = (ROUND[0], ROUND[3])
    files = [folder / f"{client.name}.safetensors" for client in low]
    (tmp_path / "low.json").write_text(json.dumps({c.name: c.samples for c in low}))
    aggregate(files, tmp_path / "first", AggregateOptions(samples=tmp_path / "low.json"))
    aggregate(folder, tmp_path / "second", AggregateOptions(samples=counts))
    options = AggregateOptions(
        samples=tmp_path / "low.json", previous=tmp_path / "second", verify=True
    )
    aggregate(files, tmp_path / "third", options)

    for module in SHAPES:
        before = merged(tmp_path / "second/lora.safetensors", module)
        expected = oracle.aggregate("raflora", given(module, low), before)
        found = merged(tmp_path / "third/lora.safetensors", module)
        assert relative_error(found, truncated(expected, 5)) < 1e-6

    flexlora = AggregateOptions(
        method="flexlora",
        samples=counts,
        previous=tmp_path / "second",
        before_previous=tmp_path / "first",
        momentum=0.5,
        verify=True,
    )
    aggregate(folder, tmp_path / "fourth", flexlora)
    for module in SHAPES:
        step = [merged(tmp_path / f"{one}/lora.safetensors", module) for one in ("second", "first")]
        expected = oracle.aggregate("flexlora", given(module)) + 0.5 * (step[0] - step[1])
        found = merged(tmp_path / "fourth/lora.safetensors", module)
        assert relative_error(found, truncated(expected, 5)) < 1e-6


def test_every_client_is_handed_its_own_rank_and_alpha(tmp_path: Path) -> None:
    folder, counts = make_round(tmp_path)
    aggregate(folder, tmp_path / "out", AggregateOptions(samples=counts))
    distribute(tmp_path / "out", tmp_path / "start", folder)

    whole = tmp_path / "out/lora.safetensors"
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == [c.name for c in ROUND]
    for client in ROUND:
        file = tmp_path / "start" / client.name / "lora.safetensors"
        for module, (_, A, scale) in factors_in(file).items():
            rank = client.rank_of(module)
            assert len(A) == rank
            assert scale == (1.0 if client.alpha is None else client.alpha / rank)
            best = truncated(merged(whole, module), rank)
            assert relative_error(merged(file, module), best) < 1e-6
    with safe_open(tmp_path / "start/bob/lora.safetensors", "np") as opened:
        assert opened.metadata()["ss_network_dim"] == "Dynamic"

    distribute(tmp_path / "out", tmp_path / "ranks", options=DistributeOptions(ranks=(2,)))
    assert read(tmp_path / "ranks/rank-2").format == "kohya"
    # What was handed out is a round of clients again, in folders of their own.
    report = aggregate(tmp_path / "start", tmp_path / "again", AggregateOptions(samples=counts))
    assert [row.name for row in report.clients] == [client.name for client in ROUND]


def test_the_reading_commands_take_files(tmp_path: Path) -> None:
    folder, counts = make_round(tmp_path)
    aggregate(folder, tmp_path / "out", AggregateOptions(samples=counts))

    diagnosis = diagnose(folder, DiagnoseOptions(samples=counts))
    assert [row.name for row in diagnosis.adapters] == [client.name for client in ROUND]
    assert diagnose(tmp_path / "out").subject == "adapter"
    assert len(compare(folder).methods) == len(METHODS)
    inspected = inspect(folder, InspectOptions(samples=counts, values=True))
    assert [one.samples for one in inspected.adapters] == [c.samples for c in ROUND]
    assert not inspected.faults
    shutil.copy(tmp_path / "out/lora.safetensors", tmp_path / "alone.safetensors")
    for place in (tmp_path / "out", tmp_path / "alone.safetensors"):
        [one] = inspect(place).adapters
        assert one.origin is not None
        assert one.origin.method == "raflora"


def test_clients_that_are_files_have_counts_in_one_file_only(tmp_path: Path) -> None:
    folder, _ = make_round(tmp_path)
    report = aggregate(folder, tmp_path / "out", AggregateOptions(dry_run=True))
    assert [row.name for row in report.clients] == ["ann", "bob", "cy", "dee"]
    assert any("no sample counts found" in warning for warning in report.warnings)

    for name in ("bob", "cy", "dee"):
        (folder / f"{name}.safetensors").unlink()
    (folder / "eve").mkdir()
    shutil.copy(folder / "ann.safetensors", folder / "eve/lora.safetensors")
    (folder / "eve/fedlora.json").write_text('{"samples": 3}')
    with pytest.raises(InputError, match=r"no sample count for ann.*in --samples"):
        aggregate(folder, tmp_path / "out")


def test_a_file_counts_once_and_links_lead_nowhere_else(tmp_path: Path) -> None:
    folder, _ = make_round(tmp_path)
    (tmp_path / "kept").mkdir()
    (folder / "dee.safetensors").rename(tmp_path / "kept/dee.safetensors")
    (folder / "dee.safetensors").symlink_to(tmp_path / "kept/dee.safetensors")
    with pytest.raises(InputError, match="a link that leads out of the folder"):
        aggregate(folder, tmp_path / "out")
    # Who names the link itself means it.
    assert aggregate([folder / "dee.safetensors"], tmp_path / "out").clients[0].name == "dee"

    (folder / "dee.safetensors").unlink()
    (folder / "eve.safetensors").hardlink_to(folder / "ann.safetensors")
    with pytest.raises(InputError, match="the same file as"):
        aggregate(folder, tmp_path / "two")
    (folder / "eve.safetensors").unlink()
    make(folder, Spec("ann", rank=2, samples=None))
    with pytest.raises(InputError, match="a client named ann"):
        aggregate(folder, tmp_path / "two")


def test_a_snapshot_of_the_hub_is_a_folder_of_files(tmp_path: Path) -> None:
    """In the cache of Hugging Face, every file is a link to a blob."""
    folder, _ = make_round(tmp_path)
    snapshot, blobs = tmp_path / "hub/snapshots/main", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True)
    folder.rename(blobs)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")

    report = aggregate(snapshot, tmp_path / "out", AggregateOptions(dry_run=True))
    assert [row.name for row in report.clients] == ["ann", "bob", "cy", "dee"]


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    folder, _ = make_round(tmp_path)
    make(folder, Spec("peft", rank=2, samples=None))

    with pytest.raises(InputError, match=r"in the format peft, but .* is in kohya"):
        aggregate(folder, tmp_path / "out")


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a client with some replaced, added or (None) taken away, by key's ending."""
    result = tensors_of(ROUND[2])
    for ending, tensor in tensors.items():
        key = f"{TO_Q}.{ending.replace('__', '.')}"
        result.pop(key, None)
        if tensor is not None:
            result[key] = tensor
    return result


ONES = torch.ones(4, 4)
BROKEN: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "LoHa": (
        changed(hada_w1_a=ONES, hada_w1_b=2 * ONES),
        "hada_w1_a and 1 more: LoHa; train plain",
    ),
    "LoKr": (changed(lokr_w1=ONES), "lokr_w1: LoKr; train plain LoRA"),
    "DoRA": (changed(dora_scale=ONES), "dora_scale: DoRA; train without dora_wd"),
    "Tucker": (changed(lora_mid__weight=ONES), "lora_mid.weight: a Tucker .*; train without"),
    "IA3": (changed(on_input=torch.tensor(True).to(torch.uint8)), "on_input: IA3; train plain"),
    "OFT": (changed(oft_blocks=ONES), "oft_blocks: OFT; train plain LoRA"),
    "full": (changed(diff=ONES), "diff: a module that was trained in full; train plain LoRA"),
    "bias": (changed(diff_b=ONES), "diff_b: a module that was trained in full"),
    "unknown": (changed(lora_sideways__weight=ONES), "lora_sideways.weight: not part of LoRA"),
    "diffusers": (
        changed(lora_A__weight=ONES, lora_B__weight=2 * ONES),
        "lora_A.weight and 1 more: names of PEFT or diffusers among .*; save one adapter in one",
    ),
    "no pair": (changed(lora_up__weight=None), f"{TO_Q} has no lora_up; save .* whole"),
    "only alpha": (
        changed(lora_up__weight=None, lora_down__weight=None),
        f"{TO_Q} has no lora_down; save the adapter again",
    ),
    "ranks": (changed(lora_up__weight=torch.ones(24, 3)), "do not fit; lora_down is"),
    "kernel": (changed(lora_up__weight=torch.ones(24, 4, 1, 1)), "do not fit; lora_down is"),
    "whole numbers": (changed(lora_up__weight=torch.ones(24, 4).int()), "dtype int32 and shape"),
    "vector": (changed(lora_up__weight=torch.ones(24)), r"shape \[24\]; save factors as"),
    "alpha 0": (changed(alpha=torch.tensor(0.0)), "alpha is 0; it must be a positive number"),
    "alpha -1": (changed(alpha=torch.tensor(-1)), "alpha is -1; it must be a positive number"),
    "alpha NaN": (changed(alpha=torch.tensor(float("nan"))), "alpha is nan; it must be"),
    "alpha inf": (
        changed(alpha=torch.tensor(float("inf")).bfloat16()),
        r"alpha is inf; it must be a positive number, at most 1e\+12",
    ),
    "alphas": (changed(alpha=torch.ones(4)), r"dtype float32 and shape \[4\]; save alpha as one"),
    "byte": (
        changed(alpha=torch.tensor(1, dtype=torch.uint8)),
        "dtype uint8 and .*; save alpha as one",
    ),
    "nothing": ({"model.weight": ONES}, "no LoRA tensors in it; save the adapter, or move"),
}


@pytest.mark.parametrize(("tensors", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path: Path, tensors, message) -> None:
    folder, _ = make_round(tmp_path)
    save_file(tensors, folder / "eve.safetensors")

    with pytest.raises(InputError, match=message) as caught:
        aggregate(folder, tmp_path / "out")
    assert str(folder / "eve.safetensors") in caught.value.where
    assert not (tmp_path / "out").exists()
    # And one fault of a file is one fault: nothing that only follows from it.
    assert len(inspect([folder / "eve.safetensors"]).faults) == 1


def test_metadata_of_megabytes_is_text_and_no_tensors(tmp_path: Path) -> None:
    """kohya writes how often every tag of a data set occurs: JSON in a string of JSON."""
    tags = {f'tag {n}: "x", \\[y]': n for n in range(200_000)}
    metadata = METADATA | {"ss_tag_frequency": json.dumps({"10_set": tags})}
    plain, file = tmp_path / "plain.safetensors", tmp_path / "tagged.safetensors"
    save_file(tensors_of(ROUND[0]), plain)
    save_file(tensors_of(ROUND[0]), file, metadata=metadata)
    assert len(metadata["ss_tag_frequency"]) > 5_000_000

    found, expected = read(file), read(plain)

    assert list(found.modules) == list(expected.modules)
    for name, module in found.modules.items():
        assert torch.equal(module.read().B, expected.modules[name].read().B)
    assert found.metadata.base_model == METADATA["ss_sd_model_name"]


def test_metadata_is_bounded_text(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(tensors_of(ROUND[0]), file, metadata={"ss_sd_model_name": "x" * 5000})
    with pytest.raises(InputError, match="ss_sd_model_name has 5000 characters"):
        read(file)
    save_file(tensors_of(ROUND[0]), file, metadata={"ss_sd_model_name": "None"})
    assert read(file).metadata.base_model is None


def test_other_files_are_no_clients(tmp_path: Path) -> None:
    """Beside PEFT's folders: what is no safetensors file, is hidden, or has PEFT's own name."""
    weights = make(tmp_path / "round", Spec("ann", rank=2)).folder / "adapter_model.safetensors"
    for name in ("notes.txt", ".b.safetensors", "c.safetensors.part"):
        shutil.copy(weights, tmp_path / "round" / name)

    assert len(aggregate(tmp_path / "round", tmp_path / "out").clients) == 1
    with pytest.raises(InputError, match="not a folder; name the folder that it lies in"):
        aggregate(weights, tmp_path / "two")
