"""Clients whose modules differ in name alone: neither half is averaged without the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.adapters import Spec, make
from support.peft_layers import llama, train

from fedlora_cli import AggregateOptions, InputError, aggregate, inspect
from fedlora_cli.clients.majority import Undecided
from fedlora_cli.clients.renames import renames

OLD, NEW, TEXT = "language_model.model.layers", "model.language_model.layers", "model.layers"
ENDS = ("0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj")


def client(
    root: Path, name: str, prefix: str, ends: tuple[str, ...] = ENDS, **spec: object
) -> Path:
    shapes = {f"{prefix}.{end}".lstrip("."): (12, 20) for end in ends}
    return make(root, Spec(name, rank=2, shapes=shapes, **spec)).folder


@pytest.mark.parametrize(
    ("most", "fewest"),
    [
        (NEW, OLD),
        (OLD, NEW),
        (TEXT, NEW),
        (TEXT, OLD),
        ("layers", "model.layers"),
        ("transformer.h", "h"),
        ("encoder.layer", "bert.encoder.layer"),
        ("model.layers", "some.wrapper.model.layers"),
    ],
)
@pytest.mark.parametrize("ends", [ENDS, ENDS[1:]], ids=["as many", "fewer"])
def test_the_fewer_under_another_name_are_at_fault(
    tmp_path: Path, most: str, fewest: str, ends: tuple[str, ...]
) -> None:
    for name in ("b", "c"):
        client(tmp_path / "round", name, most)
    odd = client(tmp_path / "round", "a", fewest, ends)

    refused = pytest.raises(InputError, match=r"is the same module as .*; train all clients on")
    with refused as error:
        aggregate(tmp_path / "round", tmp_path / "out")
    report = inspect(tmp_path / "round")
    left = aggregate(tmp_path / "round", tmp_path / "rest", AggregateOptions(on_bad_client="skip"))

    assert error.value.path == odd / "adapter_model.safetensors"
    assert error.value.found.startswith(tuple(f"{fewest}.{end} is the same" for end in ends))
    assert f" as {most}." in error.value.found
    assert not (tmp_path / "out").exists()
    assert [fault.where for fault in report.faults] == [str(odd / "adapter_model.safetensors")]
    assert [one.name for one in left.left_out] == ["a"]
    assert {row.name for row in left.modules} == {f"{most}.{end}" for end in ENDS}


def test_of_two_it_is_not_known_who_is_at_fault(tmp_path: Path) -> None:
    client(tmp_path / "round", "a", OLD)
    client(tmp_path / "round", "b", NEW)

    with pytest.raises(Undecided, match="is the same module as"):
        aggregate(tmp_path / "round", tmp_path / "out")
    with pytest.raises(InputError, match=r"is the same module as .* no client is left out"):
        aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(on_bad_client="skip"))


def test_a_wrapper_within_the_layers_is_seen_as_well(tmp_path: Path) -> None:
    client(tmp_path / "round", "a", "model.layers")
    ends = tuple(end.replace("self_attn", "wrapper.self_attn") for end in ENDS)
    client(tmp_path / "round", "b", "model.layers", ends)

    with pytest.raises(InputError, match="is the same module as"):
        aggregate(tmp_path / "round", tmp_path / "out")


def test_the_previous_adapter_is_one_of_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        client(tmp_path / "round", name, NEW)
        client(tmp_path / "older", name, OLD)
    aggregate(tmp_path / "older", tmp_path / "global")

    with pytest.raises(InputError, match="is the same module as"):
        aggregate(
            tmp_path / "round", tmp_path / "out", AggregateOptions(previous=tmp_path / "global")
        )


def test_heads_under_two_names_are_found(tmp_path: Path) -> None:
    for name, head in (("a", "score"), ("b", "model.score"), ("c", "score")):
        tensors = {f"{head}.weight": torch.ones(3, 4)}
        saved = {"modules_to_save": ["score"]}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors, config=saved))

    with pytest.raises(InputError, match=r"model\.score\.weight is the same module as score"):
        aggregate(tmp_path / "round", tmp_path / "out")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("encoder.layers", ENDS), ("decoder.layers", ENDS)),
        (("text_model.encoder.layers", ENDS), ("vision_model.encoder.layers", ENDS)),
        (("model.layers", ENDS[:1]), ("model.layers", ENDS[1:])),
        (("model.layers.0", ("self_attn.q_proj",)), ("model.layers.4", ("self_attn.q_proj",))),
        (("layers.0.experts.1", ("up_proj",)), ("layers.1.experts.0", ("up_proj",))),
        (("layers.0.mlp.experts.1", ("up_proj",)), ("layers.0.mlp", ("up_proj",))),
        (("layers.0", ("self_attn.q_proj",)), ("layers.0", ("cross_attn.q_proj",))),
        (("layers.0", ("attn.q_proj",)), ("layers.0", ("attn.v_proj",))),
    ],
)
def test_different_modules_stay_different(
    tmp_path: Path, one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]
) -> None:
    client(tmp_path / "round", "a", *one)
    client(tmp_path / "round", "b", *other)

    report = aggregate(tmp_path / "round", tmp_path / "out")

    assert len(report.modules) == len(one[1]) + len(other[1])


def test_who_holds_both_shows_that_there_are_two(tmp_path: Path) -> None:
    client(tmp_path / "round", "a", "model.layers")
    client(tmp_path / "round", "b", "model.tower.layers")
    both = {f"{prefix}.{ENDS[0]}": (12, 20) for prefix in ("model.layers", "model.tower.layers")}
    make(tmp_path / "round", Spec("c", rank=2, shapes=both))

    assert len(aggregate(tmp_path / "round", tmp_path / "out").modules) == 6


def test_modules_of_other_shapes_are_different_ones(tmp_path: Path) -> None:
    client(tmp_path / "round", "a", "model.layers")
    shapes = {f"model.tower.layers.{end}": (12, 24) for end in ENDS}
    make(tmp_path / "round", Spec("b", rank=2, shapes=shapes))

    assert len(aggregate(tmp_path / "round", tmp_path / "out").modules) == 6


def test_real_clients_of_which_one_checkpointed_its_layers(tmp_path: Path) -> None:
    """A wrapper that is known is taken off; the same in a word that is not known is refused."""
    from safetensors.torch import load_file, save_file

    for seed, name in enumerate("ab"):
        train(llama(), tmp_path / "round" / name, seed, r=2, target_modules=["q_proj", "up_proj"])
    plain = aggregate(tmp_path / "round", tmp_path / "plain")
    path = tmp_path / "round/b/adapter_model.safetensors"
    tensors = load_file(path)
    for word in ("_checkpoint_wrapped_module", "_of_mine"):
        wrapped = {
            key.replace(".self_attn.", f".{word}.self_attn."): tensor
            for key, tensor in tensors.items()
        }
        assert set(wrapped) != set(tensors)
        save_file(wrapped, path)
        if word == "_of_mine":
            with pytest.raises(InputError, match=r"\._of_mine\.self_attn.* is the same module as"):
                aggregate(tmp_path / "round", tmp_path / "not")
        else:
            report = aggregate(tmp_path / "round", tmp_path / "out")
            assert report.modules == plain.modules


def test_the_work_grows_with_the_names_and_not_with_their_pairs() -> None:
    """Many names of the same words, none of them held by two."""
    asked: list[int] = []

    def look(module: int) -> int:
        asked.append(module)
        return len(asked)  # nothing looks like anything else

    def compared(names: int) -> int:
        asked.clear()
        words = [f"{n % 7}".join("abcdefg"[n % 5 :]) for n in range(names)]
        held = [{f"x.{word}.w{n}.layers.0.q": n for n, word in enumerate(words)}]
        held += [{f"w{n}.x.{word}.layers.0.q": n for n, word in enumerate(words)}]
        held += [{f"y{n}.x.layers.0.q": n for n in range(names)}]
        assert renames(held, look) == []
        return len(asked)

    assert compared(400) <= 4.5 * compared(100)
