"""Every route writes the same update and the same report."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import Spec, make, relative_error, written_update
from support.cli import run
from support.rounds import SHAPES, expected_update, make_round
from support.routes import take

from fedlora_cli import AggregateOptions, aggregate
from fedlora_cli.kernels.leading import Unresolved
from fedlora_cli.kernels.routes import ROUTES


def spectra(report: Any) -> np.ndarray:
    rows = [*(row.singular_values for row in report.modules), *(c.energy for c in report.clients)]
    found = [report.energy_ratio, report.flexlora_energy_ratio, report.flexlora_norm, report.norm]
    return np.concatenate([*map(np.array, rows), [*found, report.kept_energy]])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "options",
    [
        AggregateOptions(),
        AggregateOptions(rank=3, missing="zero", max_weight=0.5),
        AggregateOptions(method="flexlora", rank=4, basis="svd"),
        AggregateOptions(method="residual", clip_norm="auto"),
    ],
    ids=["default", "cut", "flexlora", "residual"],
)
def test_every_route_writes_the_same_update_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, options: AggregateOptions
) -> None:
    make_round(tmp_path)
    exact = aggregate([tmp_path / "round"], tmp_path / "exact", replace(options, verify=True))
    taken: list[str] = []
    plain = ROUTES[route]
    watched = lambda *given: (taken.append(route), plain(*given))[1]  # noqa: E731
    monkeypatch.setitem(ROUTES, route, watched)
    take(route, monkeypatch)

    found = aggregate([tmp_path / "round"], tmp_path / "found", replace(options, verify=True))

    assert len(taken) >= len(SHAPES)
    for module in SHAPES:
        expected = written_update(tmp_path / "exact", module)
        assert relative_error(written_update(tmp_path / "found", module), expected) < 5e-7
    np.testing.assert_allclose(spectra(found), spectra(exact), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_sums_earlier_adapters_and_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """With terms that cancel, and a module that mostly the previous adapter holds."""
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "one")
    aggregate(
        [tmp_path / "round"], tmp_path / "two", AggregateOptions(previous=tmp_path / "one", rank=6)
    )
    options = AggregateOptions(
        method="residual",
        previous=tmp_path / "two",
        before_previous=tmp_path / "one",
        momentum=0.9,
        quorum=0.7,
        verify=True,
    )
    options = replace(options, method="raflora")
    aggregate([tmp_path / "round"], tmp_path / "exact", options)
    take(route, monkeypatch)

    aggregate([tmp_path / "round"], tmp_path / "found", options)

    for module in SHAPES:
        expected = written_update(tmp_path / "exact", module)
        assert relative_error(written_update(tmp_path / "found", module), expected) < 1e-6


@pytest.mark.parametrize("route", ["gram", "dense", "factored"])
def test_an_unresolved_module_takes_the_route_qr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    made = make_round(tmp_path)
    take(route, monkeypatch)

    def refused(*_: object, **__: object) -> None:
        raise Unresolved("as a test")

    for kernel in ("gram", "dense", "factored"):
        monkeypatch.setattr(f"fedlora_cli.kernels.{kernel}.leading", refused)
    report = aggregate([tmp_path / "round"], tmp_path / "out")

    for module in SHAPES:
        expected = expected_update(made, module, "raflora", report.rank)
        assert relative_error(written_update(tmp_path / "out", module), expected) < 2e-7


@pytest.mark.parametrize("route", ROUTES)
def test_an_update_beyond_all_norms_is_refused_on_every_route(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    for name in ("ann", "bob"):
        folder = make(tmp_path / "round", Spec(name, rank=2, shapes={"m": (9, 7)})).folder
        path = folder / "adapter_model.safetensors"
        tensors = {key: one.double() for key, one in load_file(path).items()}
        if name == "bob":
            tensors = {key: one * 1e300 for key, one in tensors.items()}
        save_file(tensors, path)
    take(route, monkeypatch)

    result = run("aggregate", tmp_path / "round", "-o", tmp_path / "out")

    assert result.exit_code == 3
    assert "bob" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_large_module_is_summed_client_by_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[Path, str]]
) -> None:
    """A client's factors are read after those of the previous client are summed."""
    shapes = {"m": (9, 7)}
    for number in range(5):
        make(tmp_path / "round", Spec(f"c{number}", rank=3, shapes=shapes, seed=number))
    take("dense", monkeypatch)
    from fedlora_cli.kernels import dense

    seen: list[int] = []
    plain = dense.accumulate

    def accumulate(terms: Any, *given: Any, **more: Any) -> Any:
        def watched() -> Any:
            for term in terms:
                seen.append(len(reads))
                yield term

        return plain(watched(), *given, **more)

    monkeypatch.setattr(dense, "accumulate", accumulate)
    aggregate([tmp_path / "round"], tmp_path / "out", AggregateOptions(rank=2, verify=True))

    assert seen == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_auto_and_cpu_write_the_same_bytes(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU by either name; a GPU gives the same update in other bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_round(tmp_path)
    aggregate([tmp_path / "round"], tmp_path / "plain")
    aggregate([tmp_path / "round"], tmp_path / "there", AggregateOptions(device=device))

    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_energy_and_the_rank_that_it_gives_write_the_same_weights(tmp_path: Path) -> None:
    make_round(tmp_path)
    found = aggregate([tmp_path / "round"], tmp_path / "found", AggregateOptions(energy=0.9))
    assert found.rank is not None
    aggregate([tmp_path / "round"], tmp_path / "given", AggregateOptions(rank=found.rank))

    weights = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("found", "given")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def explained(folder: Path, *flags: str) -> dict[str, Any]:
    command = ["aggregate", str(folder), "-o", str(folder.parent / "out"), "--json", *flags]
    result = run(*command, "--force", "-j", "2")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_explain_shows_the_route_of_every_module(tmp_path: Path) -> None:
    make_round(tmp_path)
    work = explained(tmp_path / "round", "--explain", "--dry-run")["work"]

    assert sum(row["modules"] for row in work["routes"]) == len(SHAPES)
    assert {row["route"] for row in work["routes"]} == {"qr"}
    assert all(set(row["others"]) == set(ROUTES) - {"qr"} for row in work["routes"])
    assert explained(tmp_path / "round", "--explain")["work"] == work
    assert explained(tmp_path / "round", "--dry-run")["work"] == {**work, "routes": []}
    assert "work" not in explained(tmp_path / "round")
    assert "work" not in json.loads((tmp_path / "out" / "fedlora.json").read_text())


def test_the_estimated_memory_grows_with_the_modules_in_flight(tmp_path: Path) -> None:
    """The number of modules does not matter; more clients add a little for headers."""
    from fedlora_cli.rounds.preparation import prepare
    from fedlora_cli.rounds.work import estimate_work

    def cohort(name: str, modules: int, ranks: list[int]) -> None:
        shapes = {f"layers.{i}.q": (512, 512) for i in range(modules)}
        for k, rank in enumerate(ranks):
            make(tmp_path / name, Spec(f"c{k}", rank=rank, shapes=shapes, seed=k))

    def memory(name: str, jobs: int) -> int:
        plan = prepare([tmp_path / name], tmp_path / "out", AggregateOptions(rank=8)).plan
        return estimate_work(plan, jobs).memory

    cohort("few", 16, [64, 64])
    cohort("many modules", 48, [64, 64])
    cohort("many clients", 16, [16] * 8)

    assert memory("few", 4) > memory("few", 1)
    for other in ("many modules", "many clients"):
        assert memory("few", 2) <= memory(other, 2) < 1.02 * memory("few", 2)


@pytest.mark.parametrize("ranks", [[2], [2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_the_estimated_memory_includes_the_comparison_of_clients(
    tmp_path: Path, ranks: list[int]
) -> None:
    """`--robust` compares all pairs of clients, at each level, for each module in flight."""
    from fedlora_cli.aggregation.bounds import bounded
    from fedlora_cli.rounds.preparation import prepare
    from fedlora_cli.rounds.work import estimate_work

    for k in range(160):
        make(tmp_path / "round", Spec(f"c{k:03}", rank=ranks[k % len(ranks)], shapes={"q": (9, 8)}))

    def told(jobs: int, robust: str | None) -> int:
        options = AggregateOptions(rank=4, robust=robust)
        plan = prepare([tmp_path / "round"], tmp_path / "out", options).plan
        return estimate_work(plan, jobs).memory

    plan = prepare(
        [tmp_path / "round"], tmp_path / "out", AggregateOptions(rank=4, robust="geometric-median")
    ).plan
    tracemalloc.start()
    bounded(plan, 1, lambda done, total: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    more = told(1, "geometric-median") - told(1, None)

    assert peak < 1.1 * more
    assert more < 2.5 * peak
    assert told(4, "geometric-median") - told(1, "geometric-median") > 2.9 * more
