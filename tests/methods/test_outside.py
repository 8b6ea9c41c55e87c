"""Methods from outside: registered, installed, broken, and untrusted in all that they return."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.adapters import relative_error, truncated, written_update
from support.cli import run
from support.plugins import NORMED, OUTSIDE, outside, write_distribution
from support.rounds import SHAPES, expected_update, make_round

from fedlora_cli import (
    AggregateOptions,
    Factors,
    MethodError,
    UsageError,
    Weights,
    aggregate,
    by_holders,
    by_samples,
    compare,
    methods,
    predict,
    register,
)
from fedlora_cli.execution.calls import packed, unpacked
from fedlora_cli.methods import find, installed, listing, names

#: A module with a method, for distributions of tests.
GOOD = """
from fedlora_cli import Method, by_samples
METHOD = Method({name!r}, "s", "f", "arXiv:0", by_samples, {merge!r}, "svd", True)
"""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(methods, "_REGISTERED", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def installs(
    monkeypatch: pytest.MonkeyPatch, target: Path, name: str, text: str, *entries: str
) -> None:
    """Install the distribution `plug-NAME` 1.0 with these methods, all `plug_NAME:METHOD`."""
    module = f"plug_{name}"
    values = dict.fromkeys(entries, f"{module}:METHOD")
    write_distribution(target / name, f"plug-{name}", "1.0", {module: text}, values)
    monkeypatch.syspath_prepend(str(target / name))


# What a method from outside computes is right.


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("rank", [None, 3])
def test_a_registered_method_writes_the_update_of_the_oracle(
    tmp_path: Path, name: str, rank: int | None
) -> None:
    method, same = OUTSIDE[name]
    register(method)
    made = make_round(tmp_path)

    options = AggregateOptions(method=name, rank=rank, dtype="float64", verify=True)
    report = aggregate([one.folder for one in made], tmp_path / "out", options)

    assert report.method == name
    assert report.distribution is None
    for row in report.modules:
        whole = expected_update(made, row.name, same, None)
        expected = truncated(whole, rank or 6)  # the largest rank of a client is 6
        assert relative_error(written_update(tmp_path / "out", row.name), expected) < 1e-10
        energies = np.linalg.svd(whole, compute_uv=False) ** 2
        kept = energies[: rank or 6].sum() / energies.sum()
        assert row.kept_energy == pytest.approx(kept, rel=1e-9)


def test_a_rule_by_norm_with_the_sum_gets_the_norms(tmp_path: Path) -> None:
    """No built-in method needs norms before it truncates."""
    register(NORMED)
    made = make_round(tmp_path)

    options = AggregateOptions(method="normed", dtype="float64", verify=True)
    aggregate([one.folder for one in made], tmp_path / "out", options)

    for module in SHAPES:
        updates = [one.update(module) for one in made]
        sizes = [np.linalg.norm(update) for update in updates]
        whole = sum(size / sum(sizes) * update for size, update in zip(sizes, updates, strict=True))
        found = written_update(tmp_path / "out", module)
        assert relative_error(found, truncated(whole, 6)) < 1e-10


def of_holders(holdings: Any) -> Weights:
    return by_holders(holdings, 1.0)


@pytest.mark.parametrize("name", ["tensor", "factors", "cut"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_earlier_adapters_are_terms_beside_the_merge(
    tmp_path: Path, name: str, momentum: float
) -> None:
    method, _ = OUTSIDE[name]
    register(replace(method, name="own", rule=of_holders, uses_previous=True))
    made = make_round(tmp_path)
    clients = [one.folder for one in made]
    for earlier in ("first", "second"):
        options = AggregateOptions(method="flexlora", rank=9, dtype="float64")
        aggregate(clients[: 3 if earlier == "first" else 2], tmp_path / earlier, options)
    given = {"previous": tmp_path / "second"}
    if momentum:
        given["before_previous"] = tmp_path / "first"

    options = AggregateOptions(
        method="own", momentum=momentum, dtype="float64", verify=True, **given
    )
    report = aggregate(clients, tmp_path / "out", options)

    assert report.rank == 9
    for module in SHAPES:
        second, first = (written_update(tmp_path / one, module) for one in ("second", "first"))
        terms = [(*one.factors[module], one.samples) for one in made]
        whole = oracle.aggregate("residual", terms, second) + momentum * (second - first)
        found = written_update(tmp_path / "out", module)
        assert relative_error(found, truncated(whole, 9)) < 1e-9


def test_a_merge_that_is_not_truncated_is_written_as_it_is(tmp_path: Path) -> None:
    def largest(updates: Any, weights: Any) -> Factors:
        return max(updates, key=lambda update: update.rank)

    register(outside("largest", merge=largest, compress="none", basis_free=False))
    made = make_round(tmp_path)

    options = AggregateOptions(method="largest", verify=True, dtype="float64")
    report = aggregate([one.folder for one in made], tmp_path / "out", options)

    assert report.rank == 6
    for module, ranks in {"layers.0.q_proj": 5, "layers.1.fc": 6}.items():
        found = written_update(tmp_path / "out", module)
        [owner] = [one for one in made if one.factors[module][1].shape[0] == ranks]
        assert relative_error(found, owner.update(module)) < 1e-12


def test_the_merge_gets_factors_with_their_scaling_and_their_weights(tmp_path: Path) -> None:
    seen: dict[int, tuple[Any, Any]] = {}

    def watching(updates: Any, weights: Any) -> Any:
        seen[updates[0].shape[0]] = (updates, weights)
        return updates[0]

    register(outside("watching", merge=watching))
    made = make_round(tmp_path)
    aggregate([one.folder for one in made], tmp_path / "out", AggregateOptions(method="watching"))

    updates, weights = seen[24]  # the rows of q_proj
    for one, update, weight in zip(made, updates, weights, strict=True):
        B, A, scale = one.factors["layers.0.q_proj"]
        assert (update.B.dtype, update.A.dtype, update.scale) == (torch.float64,) * 2 + (1.0,)
        np.testing.assert_allclose(update.B.numpy(), scale * B, rtol=1e-12)
        np.testing.assert_array_equal(update.A.numpy(), A)
        np.testing.assert_allclose(weight.numpy(), np.full(A.shape[0], one.samples / 100))


def test_compare_measures_updates_outside_of_the_clients_factors(tmp_path: Path) -> None:
    def constant(updates: Any, weights: Any) -> torch.Tensor:
        return torch.arange(np.prod(updates[0].shape)).reshape(updates[0].shape).double()

    made = make_round(tmp_path)
    alone = compare([one.folder for one in made], AggregateOptions(rank=2)).methods
    register(outside("constant", merge=constant))

    report = compare([one.folder for one in made], AggregateOptions(rank=2))

    assert [row.name for row in report.methods][-1] == "constant"
    gap = 0.0
    for module, shape in SHAPES.items():
        update = truncated(np.arange(np.prod(shape), dtype=float).reshape(shape), 2)
        gap += float(np.linalg.norm(update - expected_update(made, module, "flexlora", None))) ** 2
    assert report.methods[-1].distance == pytest.approx(gap**0.5 / report.mean_norm, rel=1e-9)
    assert report.methods[-1].kept_energy == pytest.approx(1.0)  # the matrix has rank 2
    for with_it, without in zip(report.methods[:-1], alone, strict=True):
        for field in ("distance", "norm", "kept_energy"):
            expected = getattr(without, field)
            assert getattr(with_it, field) == (expected and pytest.approx(expected, abs=1e-9))


# What it returns is untrusted.

HUGE = torch.full((24, 40), 1e200, dtype=torch.float64)

UPDATES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "NoneType for layers.0.q_proj instead of Factors or a tensor"),
    "transposed": (torch.ones(40, 24), r"of shape \(40, 24\) instead of \(24, 40\)"),
    "flat": (torch.ones(24 * 40), r"of shape \(960,\) instead of \(24, 40\)"),
    "whole numbers": (torch.ones(24, 40, dtype=torch.int64), "in torch.int64 instead of floating"),
    "NaN": (torch.full((24, 40), torch.nan), "with a NaN, an infinity or an overflow"),
    "infinity": (torch.full((24, 40), torch.inf), "with a NaN, an infinity or an overflow"),
    "overflow": (HUGE, "with a NaN, an infinity or an overflow"),
    "sparse": (torch.ones(24, 40).to_sparse(), "as Tensor, which is no dense tensor"),
    "ranks that differ": (
        Factors(torch.ones(24, 3), torch.ones(2, 40)),
        r"the B of layers.0.q_proj of shape \(24, 3\) instead of \(24, 2\)",
    ),
    "another module": (
        Factors(torch.ones(24, 2), torch.ones(2, 41)),
        r"the A of layers.0.q_proj of shape \(2, 41\) instead of \(2, 40\)",
    ),
    "an infinite scale": (
        Factors(torch.ones(24, 2), torch.ones(2, 40), float("inf")),
        "the scale inf for layers.0.q_proj",
    ),
    "a product that overflows": (
        Factors(HUGE[:, :2].sqrt().sqrt() * 1e90, HUGE[:2].sqrt().sqrt() * 1e90),
        "an update of layers.0.q_proj that is not finite",
    ),
}


def aggregated(tmp_path: Path, **choices: Any) -> None:
    """Run the registered method `own` with these parts."""
    register(outside("own", **choices))
    clients = [one.folder for one in make_round(tmp_path)]
    aggregate(clients, tmp_path / "out", AggregateOptions(method="own", jobs=1))


@pytest.mark.parametrize("name", UPDATES)
def test_a_wrong_result_of_a_merge_is_an_error_that_names_the_method(
    tmp_path: Path, name: str
) -> None:
    result, found = UPDATES[name]
    with pytest.raises(MethodError, match=rf"^method own: it returned .*{found}.*; correct the"):
        aggregated(tmp_path, merge=lambda updates, weights: result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nothing", "ranks that differ", "an infinite scale", "flat"])
def test_a_wrong_result_of_a_compression_is_an_error(tmp_path: Path, name: str) -> None:
    result, found = UPDATES[name]
    found = "Tensor for .* instead of Factors" if name == "flat" else found.split(" or ")[0]
    with pytest.raises(MethodError, match=rf"^method own: it returned .*{found}"):
        aggregated(tmp_path, merge="sum", compress=lambda update, rank: result)


def test_a_compression_above_the_rank_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"it returned rank 14 for .* instead of 6 or less"):
        aggregated(tmp_path, merge="sum", compress=lambda update, rank: update)


def test_a_merge_above_the_rank_that_is_not_truncated_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"its merge has rank 24 .*above the 6 .*give --rank 24"):
        aggregated(tmp_path, merge=OUTSIDE["tensor"][0].merge, compress="none")


def fails(*arguments: Any) -> Any:
    raise ZeroDivisionError("no client left")


@pytest.mark.parametrize(
    ("choices", "step"),
    [
        ({"merge": fails}, "merge"),
        ({"merge": "sum", "compress": fails}, "compression"),
        ({"rule": fails}, "rule"),
    ],
)
def test_a_function_that_raises_is_one_line(
    tmp_path: Path, choices: dict[str, Any], step: str
) -> None:
    found = rf"method own: its {step} failed \(ZeroDivisionError: no client left\); report it"
    with pytest.raises(MethodError, match=found) as raised:
        aggregated(tmp_path, **choices)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)  # for --debug


def weighted(change: Any) -> Any:
    def rule(holdings: Any) -> Any:
        weights = by_samples(holdings)
        return change(weights.clients.copy(), weights.previous.copy())

    return rule


RULES: dict[str, tuple[Any, str]] = {
    "no weights": (lambda c, p: c, "clients of shape"),
    "transposed": (lambda c, p: Weights(c.T, p), r"clients of shape \(5, 4\) instead of \(4, 5\)"),
    "a previous too long": (lambda c, p: Weights(c, np.zeros(9)), r"previous of shape \(9,\)"),
    "negative": (lambda c, p: Weights(-c, p), "a weight that is negative or not finite"),
    "NaN": (lambda c, p: Weights(c * np.nan, p), "a weight that is negative or not finite"),
    "an infinity": (lambda c, p: Weights(c + np.inf, p), "a weight that is negative or not"),
    "beyond the rank": (lambda c, p: Weights(c + 0.1, p), "where a client lacks the rank index"),
    "text": (lambda c, p: Weights("all", p), "clients of shape"),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("merge", ["sum", OUTSIDE["tensor"][0].merge], ids=["sum", "function"])
def test_wrong_weights_are_an_error(tmp_path: Path, name: str, merge: Any) -> None:
    change, found = RULES[name]
    with pytest.raises(MethodError, match=rf"^method own: its rule returned .*{found}"):
        aggregated(tmp_path, rule=weighted(change), merge=merge, uses_norms=False)


def test_a_rule_that_hides_its_need_for_norms_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="a weight that is negative or not finite"):
        aggregated(tmp_path, rule=NORMED.rule, merge="sum", uses_norms=False)


# Names and fields.


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ({"name": "Own"}, r"^method Own: 'Own' is no name of a method; use at most 40 of"),
        ({"name": "a,b"}, "'a,b' is no name"),
        ({"name": ""}, "'' is no name"),
        ({"merge": "mean"}, "'mean' is no merge of a method; give one of sum, average, shared, or"),
        ({"compress": None}, "'None' is no compress of a method; give one of svd, none, or"),
        ({"rule": "by_samples"}, "'by_samples' is no rule"),
        ({"name": "raflora"}, "^method raflora: a method of this name is built in; choose another"),
    ],
)
def test_a_wrong_field_is_refused_at_once(choices: dict[str, Any], found: str) -> None:
    with pytest.raises(MethodError, match=found):
        register(outside(**{"name": "own", **choices}))
    assert "own" not in names()


def test_an_object_of_another_type_is_refused() -> None:
    with pytest.raises(MethodError, match="register: an object of type str is no method; give a"):
        register("raflora")


def test_a_registered_method_replaces_one_of_its_name() -> None:
    register(outside("own", summary="first"))
    register(outside("own", summary="second"))

    assert find("own").summary == "second"
    assert listing().methods["own"].summary == "second"


def test_an_unknown_method_is_told_the_nearest_of_all_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(outside("trimmed-mean"))
    installs(monkeypatch, tmp_path, "median", "raise SystemExit(3)", "coordinate-median")

    with pytest.raises(UsageError, match=r"trimmed_mean; did you mean trimmed-mean\?"):
        find("trimmed_mean")
    with pytest.raises(UsageError, match=r"did you mean coordinate-median\?"):
        find("coordinate-medium")  # it is not loaded for this


# Installed and broken.

BROKEN: dict[str, tuple[str, str]] = {
    "import error": (
        "import a_module_that_is_not_there",
        r"it cannot be loaded \(ModuleNotFoundError: No module named 'a_module_that_is_not_there'\)"
        "; reinstall or uninstall plug-bad 1.0",
    ),
    "syntax error": ("def merge(", r"it cannot be loaded \(SyntaxError"),
    "exit": ("raise SystemExit('no license')", r"it cannot be loaded \(SystemExit: no license\)"),
    "no such name": ("OTHER = 1", r"it cannot be loaded \(AttributeError"),
    "wrong type": ("METHOD = 'ties'", "an object of type str is no method"),
    "wrong merge": (GOOD.format(name="bad", merge="mean"), "'mean' is no merge of a method"),
    "another name": (GOOD.format(name="worse", merge="sum"), "plug_bad:METHOD is the method worse"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_distribution_is_named_and_breaks_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    text, found = BROKEN[name]
    installs(monkeypatch, tmp_path, "bad", text, "bad")
    clients = tmp_path / "round"
    make_round(tmp_path)

    refused = run("aggregate", clients, "-o", tmp_path / "out", "-m", "bad")
    assert refused.exit_code == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "plug-bad 1.0" in refused.stderr
    with pytest.raises(MethodError, match=found):
        find("bad")

    assert run("aggregate", clients, "-o", tmp_path / "out").exit_code == 0
    listed = run("methods", "--json")
    assert listed.exit_code == 0
    assert listed.stderr.count("plug-bad 1.0") >= 1
    assert '"bad"' not in listed.stdout
    report = compare(clients)
    assert report.methods[-1].name == "bad"
    assert "plug-bad 1.0" in (report.methods[-1].refused or "")
    assert "plug-bad 1.0" in predict([4, 8], [1, 1]).warnings[0]


def test_a_name_that_is_taken_is_named_and_breaks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installs(monkeypatch, tmp_path, "greedy", GOOD.format(name="raflora", merge="sum"), "raflora")

    assert find("raflora").source == "arXiv:2602.13486"
    listed = run("methods")
    assert listed.exit_code == 0
    found = "method raflora of plug-greedy 1.0: the name is taken by another method"
    assert found in " ".join(listed.stderr.split())


def test_two_distributions_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        installs(monkeypatch, tmp_path, name, GOOD.format(name="same", merge="sum"), "same")

    found = "method same of plug-one 1.0: plug-two 1.0 has a method of that name too; uninstall one"
    with pytest.raises(MethodError, match=found):
        find("same")
    with pytest.raises(MethodError, match="method same: a method of this name is installed"):
        register(outside("same"))


def test_an_installed_method_has_the_name_of_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installs(monkeypatch, tmp_path, "good", GOOD.format(name="good", merge="sum"), "good")
    make_round(tmp_path)

    assert find("good").distribution == "plug-good 1.0"
    report = aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(method="good"))
    assert report.distribution == "plug-good 1.0"
    assert '"distribution": "plug-good 1.0"' in (tmp_path / "out/fedlora.json").read_text()
    assert "plug-good 1.0" in (tmp_path / "out/README.md").read_text()
    assert compare(tmp_path / "round").distributions == {"good": "plug-good 1.0"}
    assert "good" in [row.name for row in predict([4, 8], [1, 1]).methods]


def test_a_worker_with_another_version_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installs(monkeypatch, tmp_path, "good", GOOD.format(name="good", merge="sum"), "good")
    sent = replace(find("good"), distribution="plug-good 2.0")

    with pytest.raises(MethodError, match=r"plug-good 2.0: the worker on .* has plug-good 1.0; in"):
        installed.check_same(sent)
    absent = replace(sent, name="absent")
    with pytest.raises(MethodError, match=r"the worker on .* has no such method; install the same"):
        installed.check_same(absent)


# Other processes.


def result_of(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program that registers a method and aggregates the round in its folder."""
    start = (
        "from fedlora_cli import AggregateOptions, FedloraError, aggregate, register\n"
        "from support.plugins import in_full, outside\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )


AGGREGATE = """
try:
    aggregate("round", "{cluster}", AggregateOptions(method="own", cluster={cluster!r}))
except FedloraError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "cluster", ["processes:1", pytest.param("local:1", marks=pytest.mark.long)]
)
def test_a_registered_function_of_a_module_travels(tmp_path: Path, cluster: str) -> None:
    make_round(tmp_path)
    program = "register(outside('own', merge=in_full))\nif __name__ == '__main__':\n    "
    program += "aggregate('round', 'here', AggregateOptions(method='own'))\n    aggregate('round', "
    program += f"'there', AggregateOptions(method='own', cluster={cluster!r}))"

    done = result_of(program, tmp_path)

    assert done.returncode == 0, done.stderr
    file = "adapter_model.safetensors"
    assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (
            "register(outside('own', merge=lambda updates, weights: updates[0]))",
            r"the functions of the method: they cannot be sent to other processes \(.*lambda.*\); "
            "define the functions of a method in a module that all workers can import",
        ),
        (
            "def rule(holdings):\n    return None\nregister(outside('own', rule=rule))",
            r"worker on .*: it cannot import a function \(.*'rule'.*\); define the functions",
        ),
    ],
    ids=["lambda", "main"],
)
def test_a_function_of_no_module_is_refused_in_one_line(
    tmp_path: Path, function: str, found: str
) -> None:
    make_round(tmp_path)
    program = f"{function}\n{AGGREGATE.format(cluster='processes:1')}"

    done = result_of(program, tmp_path)

    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert re.search(found, line), line
    assert not (tmp_path / "processes:1").exists()


def test_training_processes_register_what_this_process_has(tmp_path: Path) -> None:
    register(OUTSIDE["tensor"][0])
    register(outside("unused", merge=lambda updates, weights: updates[0]))

    sent = packed(methods.registered({"tensor", "raflora"}))
    methods._REGISTERED.clear()
    for method in unpacked(sent):
        register(method)

    assert find("tensor").merge is OUTSIDE["tensor"][0].merge
    assert names()[-1] == "tensor"
