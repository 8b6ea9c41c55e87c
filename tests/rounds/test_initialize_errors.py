"""Round 0 of models that are large, strange, or not there, and options that do not fit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import WEIGHTS, Spec, make
from support.models import llama, vit
from support.starts import QV, Base, run, save_base, set_config
from transformers import LlamaConfig

from fedlora_cli import InitOptions, InputError, OutputError, UsageError, initialize
from fedlora_cli.formats.skeleton import make_skeleton
from fedlora_cli.libraries import muted


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return partial(save_base, tmp_path / "base")


# Large models, and strange ones.


def test_a_model_of_seventy_billion_parameters_is_never_allocated(tmp_path: Path) -> None:
    home = tmp_path / "large"
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(home)

    with muted():
        skeleton = make_skeleton(
            str(home), None, "AutoModelForCausalLM", "CAUSAL_LM", None, (), None
        )
    report = initialize(home, tmp_path / "out", options=InitOptions(ranks=(1,), task="CAUSAL_LM"))

    state = [*skeleton.model.parameters(), *skeleton.model.buffers()]
    assert sum(map(torch.Tensor.numel, state)) > 70e9
    assert {tensor.device.type for tensor in state} == {"meta"}
    assert {(one.target, one.shape, len(one.names)) for one in report.targets} == {
        ("q_proj", (8192, 8192), 80),
        ("v_proj", (1024, 8192), 80),
    }
    assert report.adapters[0].parameters == 80 * (8192 + 8192 + 1024 + 8192)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path, base: Base, monkeypatch) -> None:
    """Nor does anybody ask whether it should be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    home = base(llama)
    ran = tmp_path / "ran"
    (home / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    set_config(home, auto_map=classes)
    initialize(home, tmp_path / "one", options=replace(QV, task="CAUSAL_LM"))
    set_config(home, auto_map={"AutoModelForSeq2SeqLM": "theirs.Model"})
    with pytest.raises(InputError, match="AutoModelForSeq2SeqLM cannot be built from its config"):
        initialize(home, tmp_path / "two", options=replace(QV, task="SEQ_2_SEQ_LM"))
    set_config(home, auto_map=classes, model_type="theirs")
    with pytest.raises(InputError, match="its configuration cannot be read"):
        initialize(home, tmp_path / "three", options=replace(QV, task="CAUSAL_LM"))

    assert (tmp_path / "one").exists()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": None}, "its configuration names no model class; give --task"),
        ({"architectures": ["Trainer"]}, "its model class Trainer is no model of transformers"),
        ({"architectures": ["pipeline"]}, "its model class pipeline is no model of transformers"),
        ({"architectures": ["NoSuchModel"]}, "its model class NoSuchModel is no model of transf"),
        ({"architectures": ["BertModel"]}, "BertModel cannot be built from its configuration"),
        ({"num_attention_heads": 0}, "its configuration cannot be read"),
        ({"hidden_size": -4}, "cannot be built from its configuration"),
        ({"hidden_size": "wide"}, "its configuration cannot be read"),
        ({"model_type": "no such type"}, "its configuration cannot be read"),
    ],
)
def test_a_strange_configuration_is_one_line_and_exit_code_3(
    tmp_path: Path, base: Base, fields, message: str
) -> None:
    home = base(llama)
    set_config(home, **fields)

    result = run(home, "-o", tmp_path / "out", "--ranks", "2")

    assert (result.exit_code, result.stdout) == (3, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# What goes wrong.


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--like: neither --like nor --ranks is given; give one of them"),
        (["--ranks", "2", "--like", "clients"], 2, "--like: given with --ranks"),
        (["--ranks", "2,x"], 2, "--ranks: 'x' is no number"),
        (["--ranks", "0"], 2, "--ranks: 0 is out of range"),
        (["--ranks", "33"], 2, "--ranks: 33, where no module has more than 32 directions"),
        (["--ranks", "2", "--alpha", "4", "--scaling", "2"], 2, "--scaling: given together with"),
        (["--ranks", "2", "--alpha", "-4"], 2, "--alpha: -4.0 is out of range"),
        (["--ranks", "2", "--scaling", "1e12"], 2, "--alpha: 2e+12 in rank-2"),
        (["--ranks", "2", "--task", "CHAT"], 2, "--task: no task CHAT; use one of CAUSAL_LM"),
        (["--ranks", "2", "--num-labels", "0"], 2, "--num-labels: 0 is out of range"),
        (["--ranks", "2", "--num-labels", "3"], 2, "--num-labels: no head is trained in full"),
        (["--ranks", "2", "--seed", "-1"], 2, "--seed: -1 is out of range"),
        (["--ranks", "2", "--dropout", "1"], 2, "--dropout: 1.0 is out of range"),
        (["--ranks", "2", "--target-modules", "typo"], 2, "typo; name some of embed_tokens, q_"),
        (["--ranks", "2", "--target-modules", "q_proj,typo"], 2, "no module is named typo; name"),
        (["--ranks", "2", "--target-modules", "q_proj,,"], 2, "'q_proj,,' has an empty name"),
        (["--ranks", "2", "--target-modules", "norm"], 2, "--target-modules: "),
        (
            ["--ranks", "2", "--modules-to-save", "typo"],
            2,
            "no module is named typo; the outermost are model",
        ),
        (["--ranks", "2", "--task", "SEQ_2_SEQ_LM"], 3, "AutoModelForSeq2SeqLM cannot be built"),
        (["--like", "clients", "--target-modules", "q_proj"], 2, "given with --like; the clients"),
        (["--like", "clients", "--modules-to-save", "x"], 2, "given with --like; the clients"),
        (["--like", "clients"], 3, "no module is named layers.0.q_proj; give the base model of"),
        (["--like", "other"], 3, "is 4 x 4 there, and 32 x 32 in base; give the base model of"),
        (["--like", "nothing"], 3, "nothing: cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    tmp_path: Path, base: Base, monkeypatch, arguments: list[str], code: int, message: str
) -> None:
    base(llama)
    make(tmp_path / "clients", Spec("ann", rank=2))
    shapes = {"model.layers.0.self_attn.q_proj": (4, 4)}
    make(tmp_path / "other", Spec("ann", rank=2, shapes=shapes))
    monkeypatch.chdir(tmp_path)

    result = run("base", "-o", "out", *arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "clients", "other"]


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "no/such/base", "nobody/nothing"])
def test_a_base_model_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)

    result = run(name, "-o", "out", "--ranks", "2")

    assert result.exit_code == 3
    assert f"{name}: no such folder, and no such model can be downloaded" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_without_a_configuration_is_one_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()

    result = run("empty", "-o", "out", "--ranks", "2")

    assert result.exit_code == 3
    assert "empty: its configuration cannot be read" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_expression_that_is_none_is_refused(tmp_path: Path, base: Base) -> None:
    options = InitOptions(ranks=(2,), target_modules="(((")

    with pytest.raises(UsageError, match=r"--target-modules: .* name some of embed_tokens, q_proj"):
        initialize(base(llama), tmp_path / "out", options=options)


def test_an_architecture_that_peft_does_not_know_asks_for_names(tmp_path: Path, base: Base) -> None:
    found = "PEFT has no default for ViTForImageClassification; name some of q_proj, .* all-linear"
    with pytest.raises(UsageError, match=found):
        initialize(base(vit), tmp_path / "out", options=InitOptions(ranks=(2,)))


@pytest.mark.parametrize("place", ["base", "base/out", "clients", "clients/ann/out", "."])
def test_output_inside_or_around_the_input_is_refused(
    tmp_path: Path, base: Base, place: str
) -> None:
    home = base(vit)
    shapes = {"vit.layers.0.attention.q_proj": (32, 32)}
    make(tmp_path / "clients", Spec("ann", rank=2, shapes=shapes))

    relation = "contain" if place == "." else "be inside"
    with pytest.raises(InputError, match=f"the output would {relation} the input"):
        initialize(home, tmp_path / place, tmp_path / "clients", InitOptions(force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "clients"]


def test_nothing_is_left_behind_on_failure_and_force_replaces_adapters_only(
    tmp_path: Path, base: Base, monkeypatch
) -> None:
    from fedlora_cli.rounds import initialize as workflow

    home = base(llama)
    three = replace(QV, ranks=(2, 3, 4), jobs=1)
    initialize(home, tmp_path / "out", options=three)
    with pytest.raises(OutputError, match="give --force"):
        initialize(home, tmp_path / "out", options=three)

    def failing(skeleton: Any, seed: int, name: str, rank: int, scale: float) -> Any:
        if rank == 4:
            raise InputError(name, "broken", "mend it")
        return start(skeleton, seed, name, rank, scale)

    start = workflow.initial_factors
    monkeypatch.setattr(workflow, "initial_factors", failing)
    with pytest.raises(InputError, match="broken"):
        initialize(home, tmp_path / "out", options=replace(three, force=True, seed=5))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    before = (tmp_path / "out/rank-2" / WEIGHTS).read_bytes()
    (tmp_path / "out/rank-3/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds rank-3/mine\.txt"):
        initialize(home, tmp_path / "out", options=replace(three, force=True))
    assert (tmp_path / "out/rank-2" / WEIGHTS).read_bytes() == before
    (tmp_path / "out/rank-3/mine.txt").unlink()
    initialize(home, tmp_path / "out", options=replace(QV, force=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rank-3"]
