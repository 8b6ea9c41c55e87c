"""The global adapter at every client's rank: exact against dense SVDs, and what PEFT applies."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from makers import PREFIX, Spec, make, relative_error, truncated, written_update
from peft import PeftModel
from rounds import SHAPES, make_round
from safetensors.torch import load_file, save_file
from test_peft_models import CASES, adapted, delta_of, factors_of, save, train
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from fedlora_cli import (
    DistributeOptions,
    DistributeReport,
    InputError,
    Options,
    OutputError,
    UsageError,
    aggregate,
    distribute,
    read,
)
from fedlora_cli.cli import app

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

#: What the global adapter of these tests has: more modules than some clients, fewer than others.
GLOBAL = Spec("global", rank=9, samples=None, alpha=18, shapes=SHAPES)


def dense(folder: Path) -> dict[str, np.ndarray]:
    """The update of every module, as fedlora reads it, in float64."""
    found = {}
    for name, module in read(folder).modules.items():
        factors = module.read()
        found[name] = factors.scale * factors.B.double().numpy() @ factors.A.double().numpy()
    return found


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def factors(folder: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A of a module, as they are stored."""
    tensors = load_file(folder / WEIGHTS)
    return (
        tensors[f"{PREFIX}{module}.lora_B.weight"],
        tensors[f"{PREFIX}{module}.lora_A.weight"],
    )


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["distribute", *map(str, arguments)], prog_name="fedlora")


def test_every_client_applies_the_best_approximation_at_its_own_ranks_and_alphas(
    tmp_path: Path,
) -> None:
    """Ranks and alphas by module, rsLoRA, modules that are not square."""
    made = make_round(tmp_path)
    whole = make(tmp_path, GLOBAL)

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")

    assert [row.name for row in report.clients] == ["ann", "bob", "cy", "dee"]
    for client in made:
        given, theirs = read(tmp_path / "out" / client.folder.name), read(client.folder)
        for module in SHAPES:
            rank = client.factors[module][1].shape[0]
            assert given.modules[module].rank == rank
            assert given.modules[module].alpha == theirs.modules[module].alpha
            assert given.modules[module].scale == theirs.modules[module].scale
            expected = truncated(whole.update(module), rank)
            found = dense(tmp_path / "out" / client.folder.name)[module]
            assert relative_error(found, expected) < 2e-7
        for field in ("use_rslora", "lora_dropout", "task_type", "fan_in_fan_out"):
            theirs_says = config(client.folder).get(field)
            assert config(given.path)[field] == (theirs_says or type(config(given.path)[field])())


@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_for_every_rank_keeps_the_scaling(tmp_path: Path, rslora: bool) -> None:
    whole = make(tmp_path, replace(GLOBAL, alphas={"layers.1.fc": 5}, rslora=rslora))
    length = 3 if rslora else 9

    options = DistributeOptions(ranks=(8, 4, 4, 20))
    report = distribute(whole.folder, tmp_path / "out", options=options)

    assert [row.name for row in report.clients] == ["rank-4", "rank-8", "rank-20"]
    for rank in (4, 8, 20):
        found = dense(tmp_path / "out" / f"rank-{rank}")
        for module, given in read(tmp_path / "out" / f"rank-{rank}").modules.items():
            assert given.rank == rank
            assert given.scale == pytest.approx((5 if module == "layers.1.fc" else 18) / length)
            assert relative_error(found[module], truncated(whole.update(module), rank)) < 2e-7


@pytest.mark.parametrize("ranks", [(4, 8), (2, 9), (9, 30)])
def test_the_factors_of_a_lower_rank_are_the_first_of_a_higher_one(
    tmp_path: Path, ranks: tuple[int, int]
) -> None:
    """Leading directions first, in the same basis; a random row of A is the same for all."""
    whole = make(tmp_path, GLOBAL)

    distribute(whole.folder, tmp_path / "out", options=DistributeOptions(ranks=ranks))

    low, high = (tmp_path / "out" / f"rank-{rank}" for rank in ranks)
    for module in SHAPES:
        (B, A), (more_B, more_A) = factors(low, module), factors(high, module)
        torch.testing.assert_close(B, more_B[:, : ranks[0]])
        torch.testing.assert_close(A, more_A[: ranks[0]])
        lengths = more_B.norm(dim=0) * more_A.norm(dim=1)
        assert (lengths.diff() <= 1e-5).all()


def test_another_alpha_stretches_the_factors_and_not_the_update(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    for alpha in (4.0, 32.0):
        options = DistributeOptions(ranks=(4,), alpha=alpha)
        distribute(whole.folder, tmp_path / f"{alpha:g}", options=options)

    for module in SHAPES:
        updates = [written_update(tmp_path / name / "rank-4", module) for name in ("4", "32")]
        (B, A), (other_B, other_A) = (
            factors(tmp_path / name / "rank-4", module) for name in ("4", "32")
        )
        assert relative_error(updates[0], updates[1]) < 2e-7
        torch.testing.assert_close(B, other_B * 8**0.5)
        torch.testing.assert_close(A, other_A * 8**0.5)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("asked", [True, False])
def test_half_precision_is_written_within_its_rounding(
    tmp_path: Path, dtype: str, error: float, asked: bool
) -> None:
    """Because it was asked for, or because the client trains in it."""
    whole = make(tmp_path, GLOBAL)
    own = torch.float32 if asked else getattr(torch, dtype)
    make(tmp_path / "round", Spec("ann", rank=5, shapes=SHAPES, dtype=own))

    options = DistributeOptions(dtype=dtype if asked else None)
    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round", options)

    tensors = load_file(tmp_path / "out/ann" / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert report.clients[0].dtype == dtype
    for module in SHAPES:
        found = written_update(tmp_path / "out/ann", module)
        assert 0 < relative_error(found, truncated(whole.update(module), 5)) < error


def test_a_rank_above_the_updates_own_changes_nothing_and_leaves_no_dead_direction(
    tmp_path: Path,
) -> None:
    whole = make(tmp_path, GLOBAL)
    specs = [Spec("low", rank=4, shapes=SHAPES), Spec("high", rank=20, shapes=SHAPES)]
    make_round(tmp_path, specs)

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")

    assert [(row.padded, row.directions) for row in report.clients] == [(33, 60), (0, 12)]
    assert report.clients[0].kept_energy == pytest.approx(1)
    for module, (_, columns) in SHAPES.items():
        B, A = factors(tmp_path / "out/high", module)
        assert relative_error(
            written_update(tmp_path / "out/high", module), whole.update(module)
        ) < (2e-7)
        assert (B[:, 9:] == 0).all()
        assert (A[9:].abs().amax(dim=1) > 0).all()
        assert A[9:].abs().max() <= columns**-0.5


def test_the_report_says_what_share_of_the_energy_everyone_receives(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    make_round(tmp_path)

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")

    energies = {
        name: np.linalg.svd(whole.update(name), compute_uv=False)[:9] ** 2 for name in SHAPES
    }
    total = sum(one.sum() for one in energies.values())
    ranks = {"ann": (2, 2, 2), "bob": (5, 5, 5), "cy": (3, 3, 6), "dee": (4, 4, 4)}
    for row in report.clients:
        held = zip(energies.values(), ranks[row.name], strict=True)
        assert row.kept_energy == pytest.approx(sum(e[:r].sum() for e, r in held) / total)
        assert row.bytes == (tmp_path / "out" / row.name / WEIGHTS).stat().st_size
        assert row.parameters == sum(
            t.numel() for t in load_file(Path(row.path) / WEIGHTS).values()
        )
    modules = {row.name: row for row in report.modules}
    fc = energies["layers.1.fc"]
    assert modules["layers.1.fc"].least_kept == pytest.approx(fc[:2].sum() / fc.sum())
    assert modules["layers.1.fc"].most_kept == pytest.approx(fc[:6].sum() / fc.sum())
    np.testing.assert_allclose(np.square(modules["layers.1.fc"].singular_values), fc)
    assert (report.clients[0].alpha, report.clients[3].alpha) == (16, None)


def test_a_module_that_only_one_side_has_is_said_and_comes_out_right(tmp_path: Path) -> None:
    q, v, fc = SHAPES
    whole = make(tmp_path, replace(GLOBAL, shapes={q: SHAPES[q], v: SHAPES[v]}))
    for name in ("ann", "bea"):
        make(tmp_path / "round", Spec(name, rank=3, shapes={q: SHAPES[q], fc: SHAPES[fc]}))

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")

    assert f"ann, bea: without {v}, not adapted there" in report.warnings
    assert f"ann, bea: {fc} starts at zero, not being in the global adapter" in report.warnings
    found = dense(tmp_path / "out/ann")
    assert set(found) == {q, fc}
    assert relative_error(found[q], truncated(whole.update(q), 3)) < 2e-7
    assert not found[fc].any()
    B, A = factors(tmp_path / "out/ann", fc)
    assert not B.any()
    assert (A.abs().amax(dim=1) > 0).all()
    received, rest = (np.linalg.svd(whole.update(name))[1] ** 2 for name in (q, v))
    share = received[:3].sum() / (received.sum() + rest.sum())
    assert report.clients[0].kept_energy == pytest.approx(share)


def test_heads_are_copied_to_the_last_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    heads = {
        "classifier.weight": torch.randn(10, 12, generator=generator).half(),
        "classifier.steps": torch.tensor([7]),
    }
    saved = {"config": {"modules_to_save": ["classifier"]}}
    other = {name: torch.zeros_like(tensor) for name, tensor in heads.items()}
    whole = make(tmp_path, replace(GLOBAL, tensors=heads, **saved))
    make(tmp_path / "round", Spec("ann", rank=2, shapes=SHAPES, tensors=other, **saved))
    make(tmp_path / "round", Spec("bob", rank=2, shapes=SHAPES))

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")
    distribute(whole.folder, tmp_path / "ranks", options=DistributeOptions(ranks=(3,)))

    for folder in (tmp_path / "out/ann", tmp_path / "ranks/rank-3"):
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in heads.items():
            assert tensors[PREFIX + name].dtype == tensor.dtype
            assert torch.equal(tensors[PREFIX + name], tensor)
        assert config(folder)["modules_to_save"] == ["classifier"]
    assert not any("classifier" in key for key in load_file(tmp_path / "out/bob" / WEIGHTS))
    without = "bob: without classifier.steps, classifier.weight, not trained in full there"
    assert without in report.warnings


def test_a_head_that_the_global_adapter_lacks_stays_as_it_was(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    head = {"classifier.weight": torch.arange(12.0).reshape(3, 4)}
    saved = {"modules_to_save": ["classifier"]}
    make(tmp_path / "round", Spec("ann", rank=2, shapes=SHAPES, tensors=head, config=saved))

    report = distribute(whole.folder, tmp_path / "out", tmp_path / "round")

    tensors = load_file(tmp_path / "out/ann" / WEIGHTS)
    assert torch.equal(tensors[f"{PREFIX}classifier.weight"], head["classifier.weight"])
    said = "ann: classifier.weight stays as it was, not being in the global adapter"
    assert said in report.warnings


def test_another_base_model_is_written_down_only_if_it_was_declared(tmp_path: Path) -> None:
    whole = make(tmp_path, replace(GLOBAL, config={"base_model_name_or_path": "/mnt/base"}))
    make(tmp_path / "round", Spec("ann", rank=2, shapes=SHAPES))

    with pytest.raises(InputError, match=r"its base model is /mnt/base, but tiny/base in .*--base"):
        distribute(whole.folder, tmp_path / "out", tmp_path / "round")
    declared = DistributeOptions(base="hub/base")
    distribute(whole.folder, tmp_path / "out", tmp_path / "round", declared)
    distribute(whole.folder, tmp_path / "ranks", options=replace(declared, ranks=(2,)))

    for folder in (tmp_path / "out/ann", tmp_path / "ranks/rank-2"):
        assert config(folder)["base_model_name_or_path"] == "hub/base"


def test_the_same_bytes_for_any_number_of_jobs_and_order_of_clients(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    made = make_round(tmp_path)
    folders = [one.folder for one in made]

    for name, clients, jobs in (("one", folders, 1), ("two", folders[::-1], 5)):
        distribute(whole.folder, tmp_path / name, clients, DistributeOptions(jobs=jobs))

    for one in made:
        for file in (CONFIG, WEIGHTS):
            written = [tmp_path / out / one.folder.name / file for out in ("one", "two")]
            assert written[0].read_bytes() == written[1].read_bytes()


# What PEFT makes of it.


def loaded(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The adapter as a client loads it to train on; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)


def inputs(name: str, model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    if name == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4)}
    ids = torch.arange(2 * 9).reshape(2, 9)
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if name == "bert" else ids}


def gradients(layer: Any) -> torch.Tensor:
    """For every direction of a layer, the largest gradient of B's column and A's row."""
    if "default" in layer.lora_A:
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    else:
        B, A = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
    return A.grad.abs().amax(dim=1) + B.grad.abs().amax(dim=0)


@pytest.mark.parametrize("name", CASES)
def test_peft_trains_on_from_exactly_the_truncated_update(tmp_path: Path, name: str) -> None:
    """Every architecture: Conv1D, embeddings, rsLoRA, patterns, heads; and a rank above all."""
    case = CASES[name]
    torch.manual_seed(99)
    base = case.build()
    clients = train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global", Options(method="flexlora"))
    heads = {k: v for k, v in load_file(tmp_path / "global" / WEIGHTS).items() if "lora_" not in k}
    update = dense(tmp_path / "global")

    distribute(tmp_path / "global", tmp_path / "out", tmp_path / "round")
    distribute(tmp_path / "global", tmp_path / "ranks", options=DistributeOptions(ranks=(20,)))

    expected_ranks = {
        client.folder.name: {m: A.shape[0] for m, (_, A, _) in client.factors.items()}
        for client in clients
    }
    folders = [*(tmp_path / "out" / one for one in expected_ranks), tmp_path / "ranks/rank-20"]
    for folder in folders:
        model = loaded(base, folder)
        ranks = expected_ranks.get(folder.name) or dict.fromkeys(update, 20)
        layers = adapted(model)
        assert set(layers) == set(ranks)
        for module, rank in ranks.items():
            B, _, _ = factors_of(layers[module])
            assert B.shape[1] == rank
            expected = truncated(update[module], rank)
            assert relative_error(delta_of(layers[module]), expected) < 1e-5
        if folder.name in expected_ranks:
            theirs = {one.folder.name: one for one in clients}[folder.name]
            for module, (_, _, scale) in theirs.factors.items():
                assert factors_of(layers[module])[2] == pytest.approx(scale)
        own = load_file(folder / WEIGHTS)
        for key in (key for key in heads if key in own):
            assert torch.equal(own[key], heads[key])
        model(**inputs(name, base)).loss.backward()
        # An embedding learns only of the tokens that it has seen, all the others of everything.
        for layer in layers.values():
            assert gradients(layer).min() > 0


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_the_forward_pass_is_that_of_the_dense_weights(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    torch.manual_seed(5)
    base = case.build().eval()
    train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global")
    distribute(tmp_path / "global", tmp_path / "out", options=DistributeOptions(ranks=(3,)))

    model = loaded(base, tmp_path / "out/rank-3").eval()
    reference = copy.deepcopy(base)
    tensors = load_file(tmp_path / "out/rank-3" / WEIGHTS)
    with torch.no_grad():
        for module, update in dense(tmp_path / "global").items():
            weight = reference.get_submodule(module).weight
            delta = torch.from_numpy(truncated(update, 3)).float()
            weight += delta.T if module.endswith("embed_tokens") else delta
        for key, tensor in tensors.items():
            if "lora_" not in key and "classifier" in key:
                reference.get_parameter(key.removeprefix(PREFIX)).copy_(tensor)
        given = inputs(name, base)
        torch.testing.assert_close(model(**given).logits, reference(**given).logits)


def test_a_round_of_training_goes_on_from_what_was_handed_out(tmp_path: Path) -> None:
    """Aggregate, distribute, train with PEFT, save, aggregate again."""
    case = CASES["vit"]
    torch.manual_seed(1)
    base = case.build()
    train(case, base, tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "global")
    distribute(tmp_path / "global", tmp_path / "start", tmp_path / "round")

    before = {}
    for folder in sorted((tmp_path / "start").iterdir()):
        model = loaded(base, folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs("vit", base)).loss.backward()
            optimizer.step()
        save(model, tmp_path / "trained" / folder.name)
        before[folder.name] = dense(folder)
    options = Options(previous=tmp_path / "global", verify=True)
    report = aggregate([tmp_path / "trained"], tmp_path / "next", options)

    assert [row.rank for row in report.clients] == [2, 6]
    for name, updates in before.items():
        after = dense(tmp_path / "trained" / name)
        assert set(after) == set(updates)
        assert all(relative_error(after[module], updates[module]) > 1e-3 for module in updates)


# What goes wrong.


def test_clients_or_ranks_and_not_both(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    client = make(tmp_path, Spec("ann", rank=2, shapes=SHAPES))

    with pytest.raises(UsageError, match="neither it nor --rank is given; give one of them"):
        distribute(whole.folder, tmp_path / "out")
    with pytest.raises(UsageError, match="given with --rank; give one of them"):
        distribute(
            whole.folder, tmp_path / "out", client.folder, options=DistributeOptions(ranks=(2,))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (32,)}, "--rank: 32, where no module has more than 31 directions"),
        (
            {"ranks": (2,), "alpha": 2e12},
            "--alpha: .* is out of range; it must be a positive number, at most 1e",
        ),
        ({"ranks": (0,)}, "--rank: 0 is out of range"),
        ({"ranks": (2,), "alpha": 0.0}, "--alpha: 0.0 is out of range"),
        ({"ranks": (2,), "jobs": -1}, "--jobs: -1 is out of range"),
    ],
)
def test_numbers_out_of_range_are_usage_errors(tmp_path: Path, options, message: str) -> None:
    whole = make(tmp_path, GLOBAL)

    with pytest.raises(UsageError, match=message):
        distribute(whole.folder, tmp_path / "out", options=DistributeOptions(**options))
    assert not (tmp_path / "out").exists()


def test_an_alpha_that_nobody_would_read_again_is_refused(tmp_path: Path) -> None:
    """The scaling is kept: alpha grows with the rank."""
    whole = make(tmp_path, replace(GLOBAL, rank=1, alpha=1e12))

    with pytest.raises(UsageError, match=r"--alpha: 4e\+12 in rank-4"):
        distribute(whole.folder, tmp_path / "out", options=DistributeOptions(ranks=(4,)))


def test_overflow_names_the_client_and_the_module(tmp_path: Path) -> None:
    whole = make(tmp_path, replace(GLOBAL, alpha=1e12))
    make(tmp_path / "round", Spec("ann", rank=2, alpha=1e-3, shapes=SHAPES))

    options = DistributeOptions(dtype="float16")
    with pytest.raises(
        InputError, match=r"ann: layers\..*: its factors leave the range of float16"
    ):
        distribute(whole.folder, tmp_path / "out", tmp_path / "round", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global", "round"]


def test_clients_of_another_model_are_refused(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    make(tmp_path / "round", Spec("ann", rank=2, shapes={"layers.0.q_proj": (24, 41)}))

    with pytest.raises(InputError, match=r"layers\.0\.q_proj is linear 24 x 4"):
        distribute(whole.folder, tmp_path / "out", tmp_path / "round")


@pytest.mark.parametrize("place", ["round", "round/ann", "round/ann/out", "global/out", "."])
def test_output_inside_or_around_the_input_is_refused(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home"
    whole = make(home, GLOBAL)
    make(home / "round", Spec("ann", rank=2, shapes=SHAPES))

    with pytest.raises(InputError, match="the output would stand inside the input"):
        distribute(
            whole.folder, home / place, home / "round", replace(DistributeOptions(), force=True)
        )
    assert sorted(path.name for path in home.iterdir()) == ["global", "round"]


def test_output_at_the_place_of_a_linked_client_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    real = make(tmp_path / "elsewhere", Spec("ann", rank=2, shapes=SHAPES))
    (tmp_path / "round").mkdir()
    (tmp_path / "round/ann").symlink_to(real.folder)

    with pytest.raises(InputError, match="inside the input"):
        distribute(
            whole.folder,
            tmp_path / "elsewhere",
            tmp_path / "round",
            DistributeOptions(force=True),
        )
    assert (real.folder / WEIGHTS).exists()


def test_nothing_is_left_behind_when_the_third_adapter_fails(tmp_path: Path, monkeypatch) -> None:
    from fedlora_cli.formats import peft
    from fedlora_cli.rounds import handout

    written = []

    def full(adapter: Any, folder: Path, provenance: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(folder.name)
        peft.write(adapter, folder, provenance)

    class Full:
        FILES, WEIGHTS, NewAdapter, write = (
            peft.FILES, peft.WEIGHTS, peft.NewAdapter, staticmethod(full)
        )  # fmt: skip

    whole = make(tmp_path, GLOBAL)
    options = DistributeOptions(ranks=(2, 3, 4, 5), jobs=1)
    distribute(whole.folder, tmp_path / "old", options=DistributeOptions(ranks=(6,)))
    monkeypatch.setattr(handout, "peft", Full)

    for out in ("new", "old"):
        written.clear()
        with pytest.raises(OutputError, match="no space left on device"):
            distribute(whole.folder, tmp_path / out, options=replace(options, force=True))
    assert written == ["rank-2", "rank-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global", "old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["rank-6"]


def test_force_replaces_a_folder_of_adapters_and_nothing_else(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    out = tmp_path / "out"

    def hand_out(rank: int, *, force: bool) -> DistributeReport:
        return distribute(whole.folder, out, options=DistributeOptions(ranks=(rank,), force=force))

    hand_out(2, force=False)
    with pytest.raises(OutputError, match="it exists already; choose another folder, or give --f"):
        hand_out(3, force=False)
    hand_out(3, force=True)
    assert [path.name for path in out.iterdir()] == ["rank-3"]
    for foreign in ("notes.txt", "rank-3/optimizer.pt", "rank-9/notes.txt"):
        (out / foreign).parent.mkdir(exist_ok=True)
        (out / foreign).write_text("mine")
        with pytest.raises(OutputError, match=f"it holds {foreign}, which is not part of an"):
            hand_out(4, force=True)
        assert (out / foreign).read_text() == "mine"
        (out / foreign).unlink()
    (out / "link").symlink_to(whole.folder)
    with pytest.raises(OutputError, match="it holds link"):
        hand_out(4, force=True)
    (out / "link").unlink()
    (out / "rank-9").rmdir()
    hand_out(4, force=True)
    assert [path.name for path in out.iterdir()] == ["rank-4"]


def test_an_adapter_is_no_folder_of_adapters(tmp_path: Path) -> None:
    whole = make(tmp_path, GLOBAL)
    other = make(tmp_path, replace(GLOBAL, name="other"))

    with pytest.raises(OutputError, match="other: an adapter, not a folder of adapters"):
        distribute(whole.folder, other.folder, options=DistributeOptions(ranks=(2,), force=True))


# The command.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two clients, and what was made of them in `global`."""
    make(tmp_path / "round", Spec("ann", rank=2, samples=3, shapes=SHAPES))
    make(tmp_path / "round", Spec("bob", rank=6, samples=1, shapes=SHAPES))
    aggregate([tmp_path / "round"], tmp_path / "global")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_shows_what_everyone_receives(home: Path) -> None:
    result = run("global", "--like", "round/ann", "--like", "round/bob", "-o", "start")

    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (home / "start").iterdir()) == ["ann", "bob"]
    assert result.stdout.startswith("global: rank 6, 3 modules, handed out as 2 adapters\n")
    assert "100.0 %" in result.stdout
    assert "0 of 18" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert result.stderr == (
        "wrote: start\n"
        "next: train from these; then fedlora aggregate CLIENTS -o DIR --previous global\n"
    )


def test_tables_fit_80_columns_whatever_the_names_and_numbers(home: Path) -> None:
    for k in range(23):
        name = f"hospital-of-a-city-with-a-long-name-{k:03}"
        make(home / "many", Spec(name, rank=30, alpha=123456.789 + k, shapes=SHAPES))

    few, all_ = (
        run("global", "--like", "many", "-o", o, *v) for o, v in (("a", []), ("b", ["-v"]))
    )

    for result in (few, all_):
        assert result.exit_code == 0, result.output
        assert all(len(line) <= 80 for line in result.stdout.splitlines())
        assert "name-000" in result.stdout
    assert "and 3 more; -v shows all" in few.stdout
    assert "name-022" in all_.stdout


def test_ranks_may_be_repeated_and_have_commas(home: Path) -> None:
    result = run("global", "--rank", "2,4", "--rank", 8, "--rank", "4", "-o", "start", "-v")

    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (home / "start").iterdir()) == [
        "rank-2",
        "rank-4",
        "rank-8",
    ]
    assert "new: directions beyond those of the global update" in result.stdout
    assert "layers.0.v_proj" in result.stdout


def test_clients_may_come_on_stdin(home: Path) -> None:
    command = ["distribute", "global", "--like", "-", "-o", "start"]
    result = CliRunner().invoke(app, command, input="round/bob\n", prog_name="fedlora")

    assert result.exit_code == 0, result.output
    assert [path.name for path in (home / "start").iterdir()] == ["bob"]


def test_the_next_command_goes_on_as_the_global_adapter_was_made(home: Path) -> None:
    def advised(name: str, **options: Any) -> str:
        aggregate([home / "round"], home / name, Options(**options))
        said = run(name, "--rank", 2, "-o", f"start-{name}").stderr
        return said.split("fedlora aggregate CLIENTS -o DIR")[1].strip()

    assert advised("flex", method="flexlora") == "--method flexlora"
    assert advised("with", quorum=0.25) == "--quorum 0.25 --previous with"
    (home / "flex/fedlora.json").write_text('{"schema": "fedlora.aggregate/1", "clients": 3}')
    assert "--previous flex" in run("flex", "--rank", 2, "-o", "damaged").stderr


def test_quiet_says_nothing_and_json_is_one_document(home: Path) -> None:
    assert run("global", "--rank", 2, "-o", "quiet", "-q").output == ""
    result = run("global", "--like", "round", "-o", "start", "--json")

    document = json.loads(result.stdout, parse_constant=pytest.fail)
    assert document["schema"] == "fedlora.distribute/1"
    assert (document["source"], document["output"], document["rank"]) == ("global", "start", 6)
    assert [row["path"] for row in document["clients"]] == ["start/ann", "start/bob"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["global", "-o", "start"], 2, "--like: neither it nor --rank is given"),
        (["global", "-o", "start", "--rank", "2", "--like", "round"], 2, "given with --rank"),
        (["global", "-o", "start", "--rank", "two"], 2, "--rank: 'two' is no number"),
        (["global", "-o", "start", "--rank", "4,"], 2, "--rank: '' is no number"),
        (["global", "-o", "start", "--rank", "0"], 2, "--rank: 0 is out of range"),
        (["global", "--rank", "2"], 2, "--output"),
        (["nothing", "-o", "start", "--rank", "2"], 3, "nothing: no such folder"),
        (["global", "-o", "start", "--like", "nothing"], 3, "nothing: cannot be read"),
        (["global", "-o", "round", "--rank", "2"], 4, "round: it exists already"),
        (["global", "-o", "no/start", "--rank", "2"], 4, "its parent folder does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(
    home: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in home.iterdir()) == ["global", "round"]


def test_a_broken_global_adapter_is_refused(home: Path) -> None:
    tensors = load_file(home / "global" / WEIGHTS)
    tensors[f"{PREFIX}layers.1.fc.lora_A.weight"][0, 0] = float("nan")
    save_file(tensors, home / "global" / WEIGHTS)

    result = run("global", "--like", "round", "-o", "start")

    assert result.exit_code == 3
    assert "holds 1 NaN or infinite values" in result.stderr
    assert sorted(path.name for path in home.iterdir()) == ["global", "round"]


def test_handing_out_never_imports_peft_or_transformers(home: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys, fedlora_cli\n"
        "fedlora_cli.distribute('global', 'start', 'round')\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=home)
