"""Adapters that are whole, and do not fit the other clients or the earlier rounds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import support.cli
import torch
from support.adapters import Spec, make
from support.damage import CONFIG, set_config

run = partial(support.cli.run, "aggregate")


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
    assert (
        "told: modules_to_save names lm_head, but the file has no tensor of them" in result.stderr
    )
    assert "quiet" not in result.stderr


def test_tensors_of_different_kinds_of_numbers_are_not_averaged(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.int8), ("b", torch.int64)):
        tensors = {"score.count": torch.ones(2, dtype=dtype)}
        fields = {"modules_to_save": ["score"]}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "score.count is int64 of shape [2], trained as score, but int8" in result.stderr


EMBEDDING = "model.embed_tokens"
ROWS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


def tokens(folder: Path, name: str, indices: list[int], width: int = 4) -> Path:
    """A client that trained these tokens."""
    rows = {ROWS: torch.ones(len(indices), width)}
    fields = {"trainable_token_indices": indices}
    return make(folder, Spec(name, rank=2, tensors=rows, config=fields, samples=1)).folder


def test_token_rows_of_one_embedding_have_one_width_whatever_tokens_they_are(
    tmp_path: Path,
) -> None:
    for name, own in (("b", [1]), ("c", [2]), ("d", [3, 4])):
        tokens(tmp_path / "round", name, own)
    assert run(str(tmp_path / "round"), "-o", str(tmp_path / "out")).exit_code == 0
    tokens(tmp_path / "round", "a", [5, 6], width=3)

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "other"))

    assert result.exit_code == 3
    found = "a/adapter_model.safetensors: model.embed_tokens is float of shape [3], a trained token"
    assert found in result.stderr


def embedding_in_full(folder: Path, name: str) -> Path:
    fields = {"modules_to_save": ["embed_tokens"]}
    tensors = {f"{EMBEDDING}.weight": torch.ones(8, 4)}
    return make(folder, Spec(name, rank=2, tensors=tensors, config=fields)).folder


def embedding_in_factors(folder: Path, name: str) -> Path:
    factors = {
        f"{EMBEDDING}.lora_embedding_A": torch.ones(2, 8),
        f"{EMBEDDING}.lora_embedding_B": torch.ones(4, 2),
    }
    fields = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    return make(folder, Spec(name, rank=2, tensors=factors, config=fields)).folder


@pytest.mark.parametrize(
    ("other", "found"),
    [(embedding_in_full, "is saved in full"), (embedding_in_factors, "has LoRA factors")],
)
def test_an_embedding_is_trained_by_tokens_or_in_another_way(
    tmp_path: Path, other: Callable[[Path, str], Path], found: str
) -> None:
    """PEFT 0.21 does not load an adapter that does both."""
    tokens(tmp_path / "round", "b", [1])
    other(tmp_path / "round", "c")
    make(tmp_path / "round", Spec("silent", rank=2))
    earlier = other(tmp_path / "earlier", "d")

    together = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    skipped = (str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--on-bad-client", "skip")
    tied = run(*skipped)
    tokens(tmp_path / "round", "a", [2])
    decided = run(*skipped, "--dry-run")
    shutil.rmtree(tmp_path / "round/c")
    after = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--previous", str(earlier))

    assert [one.exit_code for one in (together, tied, decided, after)] == [3, 3, 0, 3]
    assert f"{EMBEDDING} {found}, but has trained tokens in" in together.stderr
    assert "no client is left out" in tied.stderr
    assert f"c left out: adapter_model.safetensors: {EMBEDDING} {found}" in decided.stderr
    assert f"{EMBEDDING} {found}, but has trained tokens in" in after.stderr


def test_tokens_of_two_embeddings_must_be_told_apart(tmp_path: Path) -> None:
    """PEFT takes two entries of the same tokens for one where the base model ties its weights."""
    head = "lm_head.token_adapter.trainable_tokens_delta"

    def trained(name: str, key: str, short: str, indices: list[int]) -> None:
        rows = {key: torch.ones(len(indices), 4)}
        fields = {"trainable_token_indices": {short: indices}}
        make(tmp_path / "round", Spec(name, rank=2, tensors=rows, config=fields))

    trained("a", ROWS, "embed_tokens", [1, 2])
    trained("b", head, "lm_head", [1, 2])
    trained("c", head, "lm_head", [2])
    together = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    skipped = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--on-bad-client", "skip")
    trained("d", ROWS, "embed_tokens", [3])
    apart = run(str(tmp_path / "round"), "-o", str(tmp_path / "apart"))

    assert [one.exit_code for one in (together, skipped, apart)] == [3, 0, 0]
    assert "PEFT may treat the two as tied and drop one" in together.stderr
    assert f"a left out: adapter_model.safetensors: the trained tokens of {EMBEDDING}" in (
        skipped.stderr
    )


def test_tokens_above_an_embedding_that_was_saved_with_them_are_refused(tmp_path: Path) -> None:
    """As PEFT writes modules_to_save with a list of trainable_token_indices, and does not load."""
    for name, token in (("a", 1), ("b", 2)):
        tensors = {
            ROWS: torch.ones(1, 4),
            f"{EMBEDDING}.token_adapter.base_layer.weight": torch.ones(8, 4),
        }
        fields = {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [token]}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3, result.output
    assert "trained tokens of a module in modules_to_save;" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_few_say_for_all_is_told(tmp_path: Path) -> None:
    for name in "abcd":
        make(tmp_path / "round", Spec(name, rank=2, config={"task_type": "CAUSAL_LM"}))
    for name in "abc":
        set_config(tmp_path / "round" / name, base_model_name_or_path=None)
    for name in "ab":
        set_config(tmp_path / "round" / name, revision="main")

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    declared = run(str(tmp_path / "round"), "-o", str(tmp_path / "other"), "--base", "x")

    assert result.exit_code == 0, result.output
    assert "only d states the base model: tiny/base\n" in result.stderr
    assert "only a, b state the revision: main\n" in result.stderr
    assert "task type" not in result.stderr
    assert "base model" not in declared.stderr
