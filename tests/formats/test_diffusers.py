"""LoRA files of diffusers and its relatives: what is read, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from support import oracle
from support.adapters import Spec, make, relative_error, truncated
from support.diffusers_files import (
    KEY,
    NAME,
    ROUND,
    SHAPES,
    Alphas,
    Client,
    applied,
    factors,
    make_round,
    metadata_of,
    save,
    tensors_of,
)
from support.stores import Store

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
from fedlora_cli.files import safetensors
from fedlora_cli.files.locations import location

STYLES: tuple[Alphas, ...] = ("rank", "tensors", "metadata")
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MODULES = {f"{part}.{name}": shape for part, own in SHAPES.items() for name, shape in own.items()}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def given(key: str, alphas: Alphas, *, frozen: bool = False) -> list[Any]:
    """The clients as the oracle takes them; alphas from how they were made, not from the file."""
    module = key.partition(".")[2]
    result = []
    for client in ROUND:
        B, A = factors(client, module, MODULES[key], frozen=frozen)
        B, A = B.double().flatten(1).numpy(), A.double().flatten(1).numpy()
        result.append((B, A, client.scale_of(module, alphas), float(client.samples)))
    return result


@pytest.mark.parametrize("alphas", STYLES)
def test_a_file_holds_the_update_that_loaders_apply(tmp_path: Path, alphas: Alphas) -> None:
    make_round(tmp_path, alphas)
    for number, client in enumerate(ROUND):
        adapter = read(tmp_path / client.name)
        assert (adapter.format, set(adapter.modules)) == ("diffusers", set(MODULES))
        loaders = applied(tmp_path / client.name / NAME)
        for key, module in adapter.modules.items():
            B, A, scale, _ = given(key, alphas)[number]
            found = module.read()
            update = found.scale * found.B.double().numpy() @ found.A.double().numpy()
            assert relative_error(update, scale * B @ A) < 1e-15
            assert relative_error(loaders[key], scale * B @ A) < 1e-15
            assert module.alpha == client.alpha_of(key, alphas)


#: Names of one linear layer and one convolution as tools write them.
PREFIXES = ("unet", "transformer", "diffusion_model", "transformer.base_model.model", "prior")


@pytest.mark.parametrize("prefix", [*PREFIXES, "text_encoder", "text_encoder_2", "transformer_2"])
@pytest.mark.parametrize("alphas", STYLES[:2])
def test_every_component_keeps_its_names(tmp_path: Path, prefix: str, alphas: Alphas) -> None:
    shapes = {prefix: {"blocks.0.to_k": (12, 9), "conv_in": (6, 4, 3, 3), "patch": (6, 2, 1, 2, 2)}}
    for client in ROUND:
        save(tmp_path / f"in/{client.name}.safetensors", tensors_of(client, alphas, shapes))
    aggregate(tmp_path / "in", tmp_path / "out", AggregateOptions(verify=True))

    tensors = load_file(tmp_path / "out" / NAME)
    endings = ["lora_A.weight", "lora_B.weight", *(["alpha"] if alphas == "tensors" else [])]
    names = [f"{prefix}.{module}" for module in shapes[prefix]]
    assert set(tensors) == {f"{name}.{ending}" for name in names for ending in endings}
    assert tensors[f"{prefix}.patch.lora_A.weight"].shape == (5, 2, 1, 2, 2)
    assert tensors[f"{prefix}.conv_in.lora_B.weight"].shape == (6, 5, 1, 1)


def test_a_component_that_was_saved_alone_has_bare_names(tmp_path: Path) -> None:
    """As `unet.save_lora_adapter` writes it: the metadata without a component, too."""
    shapes = {"": SHAPES["unet"]}
    for client in ROUND:
        path = tmp_path / "in" / client.name / NAME
        save(path, tensors_of(client, "metadata", shapes), metadata_of(client, shapes))
    report = aggregate(
        tmp_path / "in", tmp_path / "out", AggregateOptions(method="flexlora", verify=True)
    )

    found = applied(tmp_path / "out" / NAME)
    assert set(found) == set(SHAPES["unet"])
    for name, update in found.items():
        clients = [applied(tmp_path / "in" / one.name / NAME)[name] for one in ROUND]
        assert relative_error(update, truncated(np.mean(clients, axis=0), report.rank)) < 1e-6


@pytest.mark.parametrize("alphas", STYLES)
@pytest.mark.parametrize("method", METHODS)
def test_the_written_file_holds_what_the_method_asks_for(
    tmp_path: Path, method: str, alphas: Alphas
) -> None:
    folder = make_round(tmp_path / "in", alphas, frozen=method == "ffa")
    report = aggregate(
        folder, tmp_path / "out", AggregateOptions(method=method, verify=True, jobs=1)
    )

    found = applied(tmp_path / "out" / NAME)
    assert set(found) == set(MODULES)
    for key, update in found.items():
        expected = oracle.aggregate(method, given(key, alphas, frozen=method == "ffa"))
        if METHODS[method].compress == "svd":
            expected = truncated(expected, 5)
        assert relative_error(update, expected) < 1e-6
    assert report.format == "diffusers"


@pytest.mark.parametrize("alphas", STYLES)
def test_alphas_stand_where_the_clients_have_them(tmp_path: Path, alphas: Alphas) -> None:
    aggregate(make_round(tmp_path / "in", alphas), tmp_path / "out")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "fedlora.json",
        NAME,
    ]
    with safe_open(tmp_path / "out" / NAME, "np") as file:
        metadata, keys = file.metadata(), set(file.keys())
    assert any(key.endswith(".alpha") for key in keys) == (alphas == "tensors")
    assert (KEY in metadata) == (alphas == "metadata")
    if alphas == "metadata":
        fields = json.loads(metadata[KEY])
        assert (fields["unet.r"], fields["unet.lora_alpha"]) == (5, 5)
        # conv_in alone would be taken for the end of another name.
        assert isinstance(fields["unet.target_modules"], str)
        # transformers 5 has no text_model any more: the name must select the module in both.
        assert fields["text_encoder.target_modules"] == ["encoder.layers.0.self_attn.q_proj"]
    assert "library_name: diffusers" in (tmp_path / "out/README.md").read_text()
    assert json.loads(metadata["fedlora"])["method"] == "raflora"


@pytest.mark.parametrize("alphas", STYLES)
def test_every_client_is_handed_its_own_rank_and_scale(tmp_path: Path, alphas: Alphas) -> None:
    folder = make_round(tmp_path / "in", alphas)
    aggregate(folder, tmp_path / "out")
    distribute(tmp_path / "out", tmp_path / "start", folder)

    whole = applied(tmp_path / "out" / NAME)
    for client in ROUND:
        handed = read(tmp_path / "start" / client.name)
        found = applied(tmp_path / "start" / client.name / NAME)
        assert set(found) == set(MODULES)
        for key, update in found.items():
            module = key.partition(".")[2]
            assert handed.modules[key].rank == client.rank_of(module)
            assert handed.modules[key].scale == client.scale_of(module, alphas)
            assert relative_error(update, truncated(whole[key], client.rank_of(module))) < 1e-6
    # What was handed out is a round of clients again.
    for client in ROUND:
        shutil.copy(folder / client.name / "fedlora.json", tmp_path / "start" / client.name)
    aggregate(tmp_path / "start", tmp_path / "next", AggregateOptions(previous=tmp_path / "out"))


def test_an_alpha_that_the_files_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = make_round(tmp_path / "in", "rank")
    aggregate(folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"alpha 7 at rank 2; leave out --alpha"):
        distribute(tmp_path / "out", tmp_path / "start", options=DistributeOptions((2,), alpha=7))
    assert not (tmp_path / "start").exists()


def test_the_reading_commands_take_them(tmp_path: Path) -> None:
    folder = make_round(tmp_path / "in", "metadata")
    aggregate(folder, tmp_path / "out")

    assert len(diagnose(folder, DiagnoseOptions()).adapters) == len(ROUND)
    assert diagnose(tmp_path / "out").subject == "adapter"
    assert len(compare(folder).methods) == len(METHODS)
    inspected = inspect(folder, InspectOptions(values=True))
    assert [one.samples for one in inspected.adapters] == [client.samples for client in ROUND]
    assert not inspected.faults
    [one] = inspect(tmp_path / "out").adapters
    assert one.origin is not None
    assert one.origin.method == "raflora"


def test_headers_and_alphas_are_read_without_torch(tmp_path: Path) -> None:
    make_round(tmp_path, "tensors")
    program = (
        "import sys; from pathlib import Path; from fedlora_cli.formats import read\n"
        f"assert read(Path({str(tmp_path / 'bob')!r})).modules[{TO_Q!r}].alpha == 10\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


ENDINGS = {
    "attention layers of the training scripts": (".lora.up.weight", ".lora.down.weight"),
    "text encoders of the training scripts": (
        ".lora_linear_layer.up.weight",
        ".lora_linear_layer.down.weight",
    ),
    "PEFT": (".lora_B.weight", ".lora_A.weight"),
}


@pytest.mark.parametrize("endings", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("alphas", STYLES)
def test_factors_have_three_spellings(tmp_path: Path, endings: Any, alphas: Alphas) -> None:
    client = ROUND[1]
    fields = metadata_of(client) if alphas == "metadata" else None
    path = save(tmp_path / "in/bob" / NAME, tensors_of(client, alphas, endings=endings), fields)
    expected = applied(save(tmp_path / "x" / NAME, tensors_of(client, alphas), fields))
    aggregate(path, tmp_path / "out", AggregateOptions(dtype="float64"))

    found = applied(tmp_path / "out" / NAME)
    assert set(found) == set(MODULES)
    assert all(relative_error(found[key], expected[key]) < 1e-12 for key in found)


def kohya(client: Client) -> dict[str, torch.Tensor]:
    B, A = factors(client, "to_q", (24, 20), frozen=False)
    return {"lora_unet_to_q.lora_up.weight": B, "lora_unet_to_q.lora_down.weight": A}


@pytest.mark.parametrize("place", ["a.safetensors", f"a/{NAME}", "a/lora.safetensors"])
def test_the_content_tells_the_format_not_the_name(tmp_path: Path, place: str) -> None:
    for name, tensors in {"kohya": kohya(ROUND[0]), "diffusers": tensors_of(ROUND[0])}.items():
        path = save(tmp_path / name / place, tensors)
        for named in {path, tmp_path / name / place.split("/")[0]}:
            assert read(named).format == name
            aggregate(named, tmp_path / f"{name}-out", AggregateOptions(force=True))
            written = sorted(one.name for one in (tmp_path / f"{name}-out").iterdir())
            assert (NAME in written) == (name == "diffusers")


def test_two_adapters_in_one_folder_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a" / NAME, tensors_of(ROUND[0]))
    save(tmp_path / "a/lora.safetensors", kohya(ROUND[0]))
    with pytest.raises(InputError, match=f"both lora.safetensors and {NAME} in it; keep one"):
        read(tmp_path / "a")


@pytest.mark.parametrize("kind", ["peft", "kohya", *STYLES])
def test_a_header_is_parsed_once(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "peft":
        make(tmp_path / "in", Spec("ann", rank=2))
    elif kind == "kohya":
        save(tmp_path / "in/ann.safetensors", kohya(ROUND[0]))
    else:
        make_round(tmp_path / "in", kind, ROUND[:1])
    parsed: list[object] = []
    original = safetensors._header

    def counted(path: Any) -> Any:
        parsed.append(path)
        return original(path)

    monkeypatch.setattr(safetensors, "_header", counted)
    [place] = (tmp_path / "in").iterdir()
    read(place)
    assert len(parsed) == 1


ODD: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "kohya": (
        kohya(ROUND[0]),
        None,
        r"in the format kohya, but .* is in diffusers; give adapters of one format",
    ),
    "another prefix": (
        tensors_of(ROUND[0], shapes={"diffusion_model": SHAPES["unet"]}),
        None,
        r"its key prefix is diffusion_model\., but unet\. in .*; save the adapters of all clients",
    ),
    "SimpleTuner's prefix": (
        tensors_of(ROUND[0], shapes={"unet.base_model.model": SHAPES["unet"]}),
        None,
        r"its key prefix is unet\.base_model\.model\., but unet\. in ",
    ),
    "alphas": (
        tensors_of(ROUND[0], "tensors"),
        None,
        r"its alpha source is \.alpha tensors, but the rank in .*; save the adapters of all",
    ),
    "metadata": (
        tensors_of(ROUND[0]),
        metadata_of(ROUND[0]),
        r"its alpha source is lora_adapter_metadata, but the rank in ",
    ),
}


@pytest.mark.parametrize(("tensors", "fields", "message"), ODD.values(), ids=ODD)
def test_clients_agree_on_one_way(tmp_path: Path, tensors, fields, message) -> None:
    folder = make_round(tmp_path / "in", "rank")
    save(folder / "eve" / NAME, tensors, fields)
    (folder / "eve/fedlora.json").write_text('{"samples": 5}')
    with pytest.raises(InputError, match=message) as caught:
        aggregate(folder, tmp_path / "out")
    assert str(folder / "eve") in caught.value.where
    assert not (tmp_path / "out").exists()
    report = aggregate(folder, tmp_path / "out", AggregateOptions(on_bad_client="skip"))
    assert [one.name for one in report.left_out] == ["eve"]


def test_clients_may_adapt_different_components(tmp_path: Path) -> None:
    save(tmp_path / "in/a" / NAME, tensors_of(ROUND[0], shapes={"unet": SHAPES["unet"]}))
    both = {"text_encoder": SHAPES["text_encoder"]}
    save(tmp_path / "in/b" / NAME, tensors_of(ROUND[1], shapes=both))
    aggregate(tmp_path / "in", tmp_path / "out")
    assert set(applied(tmp_path / "out" / NAME)) == set(MODULES)


def changed(**tensors: torch.Tensor | None) -> dict[str, Any]:
    """The tensors of a client with some replaced, added or (None) taken away, by key's ending."""
    result = tensors_of(ROUND[2])
    for ending, tensor in tensors.items():
        key = f"{TO_Q}.{ending.replace('__', '.')}"
        result.pop(key, None)
        if tensor is not None:
            result[key] = tensor
    return result


def old(*names: str) -> dict[str, torch.Tensor]:
    """Factors under names that end as they did in 2023."""
    return {
        f"{name}.{way}.weight": torch.ones(4, 4) + k
        for name in names
        for k, way in enumerate(("down", "up"))
    }


def fields(**changes: Any) -> dict[str, Any]:
    return metadata_of(ROUND[2]) | {key.replace("__", "."): value for key, value in changes.items()}


ONES = torch.ones(4, 4)
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "2023": (
        old("unet.down_blocks.0.attn1.processor.to_q_lora", "unet.mid.processor.to_out_lora"),
        None,
        r"to_q_lora.down.weight and 3 more: names that diffusers gave in 2023; .*save_lora_adapter",
    ),
    "2023 text": (
        old("text_encoder.text_model.layers.0.to_q_lora"),
        None,
        "names that diffusers gave in 2023",
    ),
    "XLabs": (
        old("double_blocks.0.processor.qkv_lora1", "single_blocks.0.processor.proj_lora"),
        None,
        r"qkv_lora1.down.weight and 3 more: names of XLabs; convert .*FluxPipeline.lora_state_dict",
    ),
    "PEFT": (
        {f"base_model.model.{key}": one for key, one in tensors_of(ROUND[0]).items()},
        None,
        r"and 3 more: a name of PEFT, which stores alpha in a separate file; "
        r".*with its adapter_config.json, as adapter_model.safetensors",
    ),
    "no component": (
        {"layers.0.q_proj.lora_A.weight": ONES, "layers.0.q_proj.lora_B.weight": 2 * ONES},
        None,
        r"layers.0.q_proj: a name that begins with no component.*; save .*save_lora_weights",
    ),
    "two models": (
        tensors_of(ROUND[0]) | tensors_of(ROUND[0], shapes={"transformer": {"x.to_q": (4, 4)}}),
        None,
        r"names that begin with transformer\. and with unet\.; save one adapter",
    ),
    "DoRA": (changed(lora_magnitude_vector=torch.ones(24)), None, "magnitude_vector: DoRA; train"),
    "DoRA of others": (changed(dora_scale=ONES), None, "dora_scale: DoRA; train without use_dora"),
    "lora_bias": (
        changed(lora_B__bias=torch.ones(24)),
        None,
        "lora_B.bias: a bias on lora_B; train",
    ),
    "LoKr": (changed(lokr_w1=ONES), None, "lokr_w1: LoKr; train plain LoRA"),
    "LoHa": (changed(hada_w1_a=ONES), None, "hada_w1_a: LoHa; train plain LoRA"),
    "embedding": (changed(lora_embedding_A=ONES), None, "factors of an embedding; train linear"),
    "adapter name": (changed(lora_A__default__weight=ONES), None, "an adapter's name inside"),
    "control": (
        changed(norm_q__weight=torch.ones(4)),
        None,
        "norm_q.weight: a norm, as control LoRA",
    ),
    "unknown": (changed(weight=ONES), None, "to_q.weight: not part of LoRA; train plain LoRA"),
    "kohya inside": (
        tensors_of(ROUND[2]) | kohya(ROUND[2]),
        None,
        "names of PEFT or diffusers among those of kohya's scripts; save one adapter in one file",
    ),
    "two spellings": (changed(lora__down__weight=ONES), None, "are one factor; save one adapter"),
    "no B": (changed(lora_B__weight=None), None, f"{TO_Q} has no lora_B; save the adapter again"),
    "ranks": (changed(lora_B__weight=torch.ones(24, 3)), None, "do not fit; lora_A is"),
    "some alphas": (
        changed(alpha=torch.tensor(2.0)),
        None,
        r"no \.alpha of .* and 1 more, but of .*to_q; save it",
    ),
    "alpha 0": (
        tensors_of(ROUND[2], "tensors") | {f"{TO_Q}.alpha": torch.tensor(0.0)},
        None,
        "alpha is 0; it must be a positive",
    ),
    "both": (
        tensors_of(ROUND[2], "tensors"),
        fields(),
        r"alphas in tensors, .* and in lora_adapter_metadata; keep one of them",
    ),
    "r": (
        tensors_of(ROUND[2]),
        fields(unet__r=9),
        "has rank 4, but lora_adapter_metadata gives it 9",
    ),
    "alpha -1": (
        tensors_of(ROUND[2]),
        fields(unet__lora_alpha=-1),
        "lora_adapter_metadata of unet: lora_alpha is -1; it must be a positive number",
    ),
    "targets": (
        tensors_of(ROUND[2]),
        fields(text_encoder__target_modules=["k_proj"]),
        "target_modules in lora_adapter_metadata does not match it; correct",
    ),
    "use_dora": (
        tensors_of(ROUND[2]),
        fields(unet__use_dora=True),
        "of unet: dora is trained, too",
    ),
    "bias": (
        tensors_of(ROUND[2]),
        fields(unet__bias="all"),
        "of unet: bias is trained, too; train",
    ),
    "heads": (
        tensors_of(ROUND[2]),
        fields(unet__modules_to_save=["conv_out"]),
        "of unet: more than factors is trained, too; train plain LoRA",
    ),
    "LoKr's config": (
        tensors_of(ROUND[2]),
        fields(unet__peft_type="LOKR"),
        "peft_type is LOKR; only",
    ),
    "QALoRA": (tensors_of(ROUND[2]), fields(unet__use_qalora=True), "of unet: .*QALoRA"),
    "half": (
        tensors_of(ROUND[2]),
        {key: one for key, one in fields().items() if key.startswith("unet.")},
        "lora_adapter_metadata of text_encoder: no field of text_encoder; save it with",
    ),
    "two scalings": (
        tensors_of(ROUND[2]),
        fields(unet__use_rslora=True),
        "use_rslora is true for one component in lora_adapter_metadata, and false for another",
    ),
    "no list": (
        tensors_of(ROUND[2]),
        fields(unet__rank_pattern=[1]),
        "rank_pattern is .*an object",
    ),
}


@pytest.mark.parametrize(("tensors", "said", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, tensors, said, message) -> None:
    path = save(tmp_path / "eve" / NAME, tensors, said)

    with pytest.raises(InputError, match=message) as caught:
        aggregate(tmp_path / "eve", tmp_path / "out")
    assert caught.value.path == path
    assert not (tmp_path / "out").exists()
    # And one fault of a file is one fault: nothing that only follows from it.
    assert len(inspect([tmp_path / "eve"]).faults) == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 1, "unet.r": 2}'])
def test_metadata_is_a_json_object(tmp_path: Path, text: str) -> None:
    from safetensors.torch import save_file

    save_file(tensors_of(ROUND[0]), tmp_path / NAME, metadata={KEY: text})
    with pytest.raises(InputError, match=f"{KEY}: (not valid JSON|a JSON list)"):
        read(tmp_path)
    assert len(inspect([tmp_path]).faults) == 1


@pytest.mark.parametrize("name", [NAME, "lora.safetensors"])
def test_a_damaged_file_is_one_fault(tmp_path: Path, name: str) -> None:
    """Whose format nobody can tell: that is no second fault."""
    folder = make_round(tmp_path / "in", "rank")
    path = save(folder / "eve" / name, tensors_of(ROUND[0]))
    path.write_bytes(path.read_bytes()[:-4])
    (folder / "eve/fedlora.json").write_text('{"samples": 5}')

    assert [fault.where for fault in inspect(folder).faults] == [str(path)]


def test_unknown_fields_are_said(tmp_path: Path) -> None:
    save(tmp_path / NAME, tensors_of(ROUND[2]), fields(unet__use_new=True, unet__use_old=None))
    [note] = read(tmp_path).notes
    assert "may change the meaning of the tensors: unet.use_new" in note
    assert "use_old" not in note


def test_same_bytes_for_any_order_of_clients_and_jobs(tmp_path: Path) -> None:
    folders = sorted(make_round(tmp_path / "in", "metadata").iterdir())
    written = set()
    for number, (order, jobs) in enumerate(((folders, 1), (folders[::-1], 2))):
        out = tmp_path / f"out{number}"
        aggregate(order, out, AggregateOptions(jobs=jobs))
        written.add(tuple(path.read_bytes() for path in sorted(out.iterdir())))
    assert len(written) == 1


@pytest.mark.parametrize("alphas", STYLES)
def test_clients_in_object_storage(
    tmp_path: Path, alphas: Alphas, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_round(tmp_path / "in", alphas)
    aggregate(folder, tmp_path / "out")
    store = Store()
    store.put(folder, "bucket/round")
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: store)
    read(location("s3://bucket/round/bob"))
    ranges = [key for method, key in store.asked if method == "cat_file"]
    assert sum(key.startswith(f"bucket/round/bob/{NAME}[0:") for key in ranges) == 1
    aggregate("s3://bucket/round", tmp_path / "far")

    assert (tmp_path / "far" / NAME).read_bytes() == (tmp_path / "out" / NAME).read_bytes()
