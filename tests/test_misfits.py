"""Adapters that are whole, and do not fit the other clients or the earlier rounds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from damage import CONFIG
from makers import Spec, make
from typer.testing import CliRunner, Result

from fedlora_cli.cli import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["aggregate", *arguments], prog_name="fedlora")


def test_two_clients_of_one_name_are_refused(tmp_path: Path) -> None:
    for side in ("left", "right"):
        make(tmp_path / side, Spec("twin", rank=2))

    result = run(str(tmp_path / "left"), str(tmp_path / "right"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "a client named twin" in result.stderr


def test_a_module_trained_as_factors_here_and_in_full_there_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    tensors = {"layers.0.v_proj.weight": torch.ones(7, 20)}
    shapes = {"layers.0.q_proj": (12, 20)}
    saved = {"modules_to_save": ["v_proj"]}
    make(tmp_path / "round", Spec("b", rank=2, shapes=shapes, tensors=tensors, config=saved))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "layers.0.v_proj is saved in full, but" in result.stderr


def test_base_weights_that_differ_between_clients_are_refused(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        tensors = {"lm_head.weight": torch.full((5, 4), float(value))}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "its base weights lm_head.weight differ" in result.stderr


def test_a_declared_base_settles_different_names_of_it(tmp_path: Path) -> None:
    for name in "ab":
        fields = {"base_model_name_or_path": f"/home/{name}/llama"}
        make(tmp_path / "round", Spec(name, rank=2, config=fields))

    refused = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    declared = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--base", "meta/llama")

    assert refused.exit_code == 3
    assert "give --base to declare it" in refused.stderr
    assert declared.exit_code == 0, declared.output
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["base_model_name_or_path"] == "meta/llama"


def test_a_previous_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    make(tmp_path, Spec("old", rank=2, shapes={"layers.0.q_proj": (12, 99)}))

    previous = ("--previous", str(tmp_path / "old"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *previous)

    assert result.exit_code == 3
    assert "layers.0.q_proj is linear 12 x 99, but linear 12 x 20" in result.stderr


def test_ffa_with_an_A_of_each_client_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "-m", "ffa")

    assert result.exit_code == 3
    assert "lora_A of layers.0.q_proj is not the A of the other clients" in result.stderr


def test_entries_of_modules_to_save_without_a_tensor_are_not_written(tmp_path: Path) -> None:
    """PEFT adds names that the model does not have; one client must not decide for the others."""
    tensors = {"score.weight": torch.ones(3, 4)}
    make(tmp_path / "round", Spec("a", rank=2))
    fields = {"modules_to_save": ["classifier", "score"]}
    make(tmp_path / "round", Spec("b", rank=2, tensors=tensors, config=fields))

    assert run(str(tmp_path / "round"), "-o", str(tmp_path / "out")).exit_code == 0

    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] == ["score"]


def test_a_head_that_the_previous_adapter_trained_another_way_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    saved = {"modules_to_save": ["q_proj"]}
    tensors = {"layers.0.q_proj.weight": torch.ones(12, 20)}
    shapes = {"layers.0.v_proj": (7, 20)}
    make(tmp_path, Spec("old", rank=2, tensors=tensors, config=saved, shapes=shapes))

    previous = ("--previous", str(tmp_path / "old"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *previous)

    assert result.exit_code == 3
    assert "layers.0.q_proj is saved in full, but" in result.stderr


def test_copies_under_two_names_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    shutil.copytree(tmp_path / "round/a", tmp_path / "round/b")

    refused = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    allowed = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--allow-copies")

    assert refused.exit_code == 3
    assert "to the last byte; count every upload once, or give --allow-copies" in refused.stderr
    assert allowed.exit_code == 0
    assert "b has the same weights as a; both are counted" in allowed.stderr


def test_a_head_without_tensors_is_told_unless_peft_itself_put_it_there(tmp_path: Path) -> None:
    """PEFT lists classifier and score for BART and T5 too, which have neither."""
    for name, saved in (("quiet", ["classifier", "score"]), ("told", ["lm_head"])):
        fields = {"modules_to_save": saved}
        make(tmp_path / "round", Spec(name, rank=2, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "told: modules_to_save names lm_head, but has no tensor of them" in result.stderr
    assert "quiet" not in result.stderr


def test_tensors_of_different_kinds_of_numbers_are_not_averaged(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.int8), ("b", torch.int64)):
        tensors = {"score.count": torch.ones(2, dtype=dtype)}
        fields = {"modules_to_save": ["score"]}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "score.count is int64 of shape [2], trained as score, but int8" in result.stderr
