"""The global adapter at every client's rank: exact against dense SVDs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.cli
import torch
from safetensors.torch import load_file, save_file
from support.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Spec,
    config,
    make,
    relative_error,
    truncated,
    written_update,
)
from support.distribution import GLOBAL, dense, factors, run
from support.rounds import SHAPES, make_round

from fedlora_cli import AggregateOptions, DistributeOptions, InputError, aggregate, distribute, read


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
    assert f"ann, bea: {fc} starts at zero, because the global adapter lacks it" in report.warnings
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
    said = "ann: classifier.weight stays as it was, because the global adapter lacks it"
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
    assert result.stdout.startswith("global: rank 6, 3 modules, distributed as 2 adapters\n")
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
    result = support.cli.run(*command, stdin="round/bob\n")

    assert result.exit_code == 0, result.output
    assert [path.name for path in (home / "start").iterdir()] == ["bob"]


def test_the_next_command_goes_on_as_the_global_adapter_was_made(home: Path) -> None:
    def advised(name: str, **options: Any) -> str:
        aggregate([home / "round"], home / name, AggregateOptions(**options))
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
        (["global", "-o", "start"], 2, "--like: neither --like nor --rank is given"),
        (["global", "-o", "start", "--rank", "2", "--like", "round"], 2, "given with --rank"),
        (["global", "-o", "start", "--rank", "two"], 2, "--rank: 'two' is no number"),
        (["global", "-o", "start", "--rank", "4,"], 2, "--rank: '' is no number"),
        (["global", "-o", "start", "--rank", "0"], 2, "--rank: 0 is out of range"),
        (["global", "--rank", "2"], 2, "--output"),
        (["nothing", "-o", "start", "--rank", "2"], 3, "nothing: no such folder"),
        (["global", "-o", "start", "--like", "nothing"], 3, "nothing: cannot be read"),
        (["global", "-o", "round", "--rank", "2"], 4, "round: it already exists"),
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

    changed = run("global", "--like", "round", "-o", "start")
    (home / "global/fedlora.json").unlink()
    result = run("global", "--like", "round", "-o", "start")

    assert changed.exit_code == result.exit_code == 3
    assert "its SHA-256 differs from the one in fedlora.json" in changed.stderr
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
