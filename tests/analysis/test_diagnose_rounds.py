"""Series of global adapters on disk: rates, verdicts and remarks on rounds of known course."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import PREFIX, Spec, make

from fedlora_cli import AggregateOptions, InputError, UsageError, aggregate
from fedlora_cli.analysis.diagnosis.diagnose import diagnose
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions

SAMPLES = Path(__file__).parents[2] / "samples"


def untrained_rounds(root: Path, ranks: dict[int, int], method: str, rounds: int) -> list[Path]:
    """Aggregate, truncate the global adapter to each client's rank, aggregate again."""
    names = {f"{rank}-{k}": rank for rank, number in ranks.items() for k in range(number)}
    shapes = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (33, 20)}
    clients = root / "clients-1"
    for name, rank in names.items():
        make(clients, Spec(name, rank=rank, alpha=2 * rank, samples=10 + rank, shapes=shapes))
    folders = []
    for t in range(1, rounds + 1):
        folder = root / f"round-{t}" / "global"
        folder.parent.mkdir()
        aggregate([clients], folder, AggregateOptions(method=method, allow_copies=True))
        folders.append(folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        clients = root / f"clients-{t + 1}"
        for name, rank in names.items():
            made = make(clients, Spec(name, rank=rank, alpha=2 * rank, samples=10 + rank,
                                      shapes=shapes))  # fmt: skip
            cut = {k: v[:, :rank] if "lora_B" in k else v[:rank] for k, v in tensors.items()}
            save_file({k: v.contiguous() for k, v in cut.items()},
                      made.folder / "adapter_model.safetensors")  # fmt: skip
    return folders


def concentrated(root: Path, name: str, rank: int, tail: float, samples: float) -> Path:
    """A client whose energy lies in its first two directions but for a share of about tail²."""
    made = make(root, Spec(name, rank=rank, alpha=rank, samples=samples, shapes={"m": (30, 40)}))
    U, _, Vh = np.linalg.svd(np.random.default_rng(7).standard_normal((30, 40)))
    s = np.where(np.arange(rank) < 2, 1.0, tail)
    save_file(
        {
            f"{PREFIX}m.lora_B.weight": torch.from_numpy(U[:, :rank] * s),
            f"{PREFIX}m.lora_A.weight": torch.from_numpy(Vh[:rank].copy()),
        },
        made.folder / "adapter_model.safetensors",
    )
    return made.folder


@pytest.mark.parametrize(
    "ranks", [{8: 4, 16: 3}, {2: 5, 4: 3, 8: 2}, {4: 1, 8: 9}, {2: 4, 4: 3, 8: 2, 16: 1}], ids=str
)
def test_rounds_without_training_collapse_at_the_predicted_rate_under_flexlora_alone(
    tmp_path: Path, ranks: dict[int, int]
) -> None:
    samples = {rank: number * (10 + rank) for rank, number in ranks.items()}
    beyond = sum(n for rank, n in samples.items() if rank > min(ranks)) / sum(samples.values())
    rounds = 24 if beyond > 0.8 else 10

    untrained_rounds(tmp_path / "flexlora", ranks, "flexlora", rounds)
    untrained_rounds(tmp_path / "raflora", ranks, "raflora", rounds)
    flexlora = diagnose([tmp_path / "flexlora"])
    raflora = diagnose([tmp_path / "raflora"])

    assert flexlora.subject == raflora.subject == "rounds"
    assert flexlora.trend is not None
    assert raflora.trend is not None
    assert flexlora.trend.gamma == pytest.approx(beyond**2, rel=0.01)
    assert flexlora.trend.predicted_gamma == pytest.approx(beyond**2)
    assert flexlora.trend.r_squared == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(
        flexlora.trend.predicted_energy_ratio, flexlora.trend.energy_ratio, atol=1e-6
    )
    assert flexlora.verdict == "collapsed"
    assert raflora.trend.gamma == pytest.approx(1, abs=1e-3)
    assert raflora.trend.gamma >= 0.999
    assert raflora.verdict == "healthy"


def test_a_collapse_is_seen_coming(tmp_path: Path) -> None:
    folders = untrained_rounds(tmp_path, {4: 2, 8: 3}, "flexlora", 14)

    verdicts = [diagnose(folders[:t]).verdict for t in range(1, 15)]

    order = ["at risk", "collapsing", "collapsed"]
    assert verdicts[0] == "at risk"  # by the weights alone, before any energy is lost
    assert set(verdicts) == set(order)
    assert verdicts == sorted(verdicts, key=order.index)


def test_clients_that_concentrate_by_themselves_are_no_collapse(tmp_path: Path) -> None:
    """ρ climbs to 0.999999 here, and nothing that these clients put there was lost."""
    rounds: dict[str, list[Any]] = {"raflora": [], "flexlora": []}
    for t in range(1, 9):
        clients = tmp_path / f"clients-{t}"
        for name, rank, samples in (("a", 2, 50), ("b", 6, 10), ("c", 6, 10)):
            concentrated(clients, name, rank, tail=0.5**t, samples=samples)
        for method, folders in rounds.items():
            folders.append(tmp_path / f"{method}-{t}")
            options = AggregateOptions(method=method, dtype="float64", allow_copies=True)
            aggregate([clients], folders[-1], options)

    kept = diagnose(rounds["raflora"])
    lost = diagnose(rounds["flexlora"])

    assert kept.energy_ratio > 0.9999
    assert kept.trend.gamma == pytest.approx(0.25, rel=0.01)
    assert kept.trend.kept[-1] == pytest.approx(1, abs=1e-6)
    assert kept.verdict == "healthy"
    assert lost.verdict == "collapsed"


def test_real_rounds_of_the_samples(tmp_path: Path) -> None:
    """Trained adapters: what the figures show and what the verdict says must be one thing."""
    flexlora, raflora = (diagnose([SAMPLES / "rounds" / m]) for m in ("flexlora", "raflora"))

    assert flexlora.verdict == "collapsed"
    assert flexlora.trend.energy_ratio == tuple(sorted(flexlora.trend.energy_ratio))
    assert flexlora.energy_ratio > 0.99
    assert raflora.verdict == "healthy"
    assert raflora.energy_ratio < 0.8
    assert raflora.trend.predicted_gamma == 1.0
    first = diagnose([SAMPLES / "rounds/flexlora/round-01"])
    assert (first.subject, first.verdict) == ("adapter", "at risk")


def test_a_round_in_which_nobody_holds_the_higher_ranks(tmp_path: Path) -> None:
    """With the previous adapter raFLoRA keeps them; FlexLoRA forgets them in one round."""
    reports = {}
    for method in ("raflora", "flexlora"):
        (first,) = untrained_rounds(tmp_path / method, {2: 1, 6: 1}, method, 1)
        low, second = tmp_path / method / "clients-2/2-0", tmp_path / f"{method}-2"
        aggregate([low], second, AggregateOptions(method=method, previous=first))
        reports[method] = diagnose([first, second])

    assert reports["raflora"].verdict == "healthy"
    before, after = reports["raflora"].trend.kept
    assert after == pytest.approx(before, abs=1e-6)
    assert reports["flexlora"].verdict == "collapsed"
    assert reports["flexlora"].energy_ratio == pytest.approx(1)
    assert reports["flexlora"].trend.predicted_gamma == 0


def test_rounds_of_other_tools_are_compared_with_the_first(tmp_path: Path) -> None:
    folders = [concentrated(tmp_path, f"round-{t}", 6, tail=0.2**t, samples=1) for t in (2, 1, 10)]
    for folder in folders:
        (folder / "fedlora.json").unlink()

    report = diagnose([tmp_path], DiagnoseOptions(subject="rounds", shared_rank=2))
    alone = diagnose([folders[0]], DiagnoseOptions(shared_rank=2))

    assert [row.name for row in report.adapters] == ["round-1", "round-2", "round-10"]
    assert report.verdict == "collapsed"
    assert "compared with the first round" in report.reason
    assert alone.verdict is None
    assert diagnose([tmp_path]).subject == "clients"


def test_what_they_are_is_told_by_the_files(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    make(tmp_path / "round", Spec("b", 4, samples=4))
    for t in (1, 2, 10):
        (tmp_path / "run" / f"round-{t}").mkdir(parents=True)
        aggregate([tmp_path / "round"], tmp_path / "run" / f"round-{t}" / "global")

    series = diagnose([tmp_path / "run"])
    given = diagnose([tmp_path / "run" / f"round-{t}" / "global" for t in (1, 10, 2)])

    assert series.trend is not None
    assert series.trend.names == ("round-1", "round-2", "round-10")
    assert any("keep the given order: round-1, round-10, round-2" in w for w in given.warnings)
    with pytest.raises(UsageError, match=r"1 of 3 adapters, such as .*/global, are global;"):
        diagnose([tmp_path / "round", tmp_path / "run/round-1/global"])
    with pytest.raises(InputError, match="no such file or directory"):
        diagnose([tmp_path / "nothing"])


def test_rounds_of_two_models_are_refused(tmp_path: Path) -> None:
    for name, shape in (("a", (9, 5)), ("b", (9, 6))):
        make(tmp_path / name, Spec("client", 2, shapes={"m": shape}))
        aggregate([tmp_path / name], tmp_path / f"global-{name}")

    with pytest.raises(InputError, match=r"m is 9 x 6, but 9 x 5 in .*global-a"):
        diagnose([tmp_path / "global-a", tmp_path / "global-b"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("clients", []), ("clients", "all"), ("clients", [1]), ("shared_rank", -1),
     ("shared_rank", True), ("method", None), ("options", []), ("modules", [3]), ("modules", {})],
)  # fmt: skip
def test_a_damaged_report_is_one_clear_error(tmp_path: Path, field: str, value: object) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    aggregate([tmp_path / "round"], tmp_path / "global")
    path = tmp_path / "global/fedlora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))

    with pytest.raises(InputError, match=r"fedlora\.json: (a client|\w+) is .*; take the file"):
        diagnose([tmp_path / "global"])


def test_a_shared_rank_with_nothing_beyond_it_is_no_verdict() -> None:
    for rank in (16, 99):
        with pytest.raises(UsageError, match=f"{rank}, where no adapter has more than rank 16"):
            diagnose(SAMPLES / "rounds/flexlora", DiagnoseOptions(shared_rank=rank))
        with pytest.raises(UsageError, match=f"{rank}, where no adapter has more than rank 16"):
            diagnose(SAMPLES / "round-01", DiagnoseOptions(shared_rank=rank))


def test_clients_of_one_rank_cannot_collapse(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(tmp_path / "round", Spec(name, 4))
    for t in (1, 2):
        aggregate(tmp_path / "round", tmp_path / f"global-{t}", AggregateOptions(method="flexlora"))

    report = diagnose([tmp_path / "global-1", tmp_path / "global-2"])

    assert report.verdict == "healthy"
    assert "no client has a rank above 4: no energy can be lost" in report.reason


def test_a_residual_federation_that_recovers_is_never_called_collapsed(tmp_path: Path) -> None:
    """Its first round has no previous adapter, and is FlexLoRA's."""
    make(tmp_path / "first", Spec("low", 2, samples=97))
    make(tmp_path / "first", Spec("high", 6, samples=3))
    folders = [tmp_path / "global-1"]
    aggregate(tmp_path / "first", folders[0], AggregateOptions(method="residual"))
    for t in range(2, 5):
        # The high-rank client brings more and more; what it brings is kept.
        clients = tmp_path / f"clients-{t}"
        make(clients, Spec("high", 6, samples=100 * 4**t))
        make(clients, Spec("low", 2, samples=97))
        folders.append(tmp_path / f"global-{t}")
        options = AggregateOptions(method="residual", previous=folders[-2], max_count_ratio=1000)
        aggregate(clients, folders[-1], options)

    assert {diagnose(folders[:t]).verdict for t in range(1, 5)} <= {"healthy", "at risk"}


def test_two_federations_in_one_series_are_noticed() -> None:
    both = diagnose([SAMPLES / "rounds/flexlora", SAMPLES / "rounds/raflora"])

    text = "\n".join(both.warnings)
    assert "two rounds are named round-01" in text
    assert "the method changes in round-01 from flexlora to raflora" in text
    assert not diagnose(SAMPLES / "rounds/flexlora").warnings


def test_momentum_is_not_predicted_by_weights(tmp_path: Path) -> None:
    folders = untrained_rounds(tmp_path / "run", {2: 1, 4: 1}, "flexlora", 2)
    third = tmp_path / "third"
    options = AggregateOptions(
        "flexlora", previous=folders[1], before_previous=folders[0], momentum=0.5
    )
    aggregate(tmp_path / "run/clients-3", third, options)

    report = diagnose([*folders, third])

    assert report.trend.predicted_energy_ratio[2] is None


def test_a_report_that_claims_enormous_ranks_costs_nothing(tmp_path: Path) -> None:
    folder = untrained_rounds(tmp_path, {2: 1, 4: 1}, "flexlora", 1)[0]
    path = folder / "fedlora.json"
    document = json.loads(path.read_text())
    for client in document["clients"]:
        client["rank"] = 2**24
    path.write_text(json.dumps(document))

    assert diagnose(folder).adapters[0].partitions[-1].last == 4
    document["clients"][0]["rank"] = 10**30
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="rank is 1000"):
        diagnose(folder)


def test_rounds_with_different_shared_ranks_take_the_smallest(tmp_path: Path) -> None:
    for t, ranks in ((1, (3, 6)), (2, (2, 6))):
        for rank in ranks:
            make(tmp_path / f"clients-{t}", Spec(f"c{rank}", rank))
        aggregate(tmp_path / f"clients-{t}", tmp_path / f"global-{t}")

    assert diagnose([tmp_path / "global-1", tmp_path / "global-2"]).shared_rank == 2


def test_gaps_and_what_is_left_out_of_a_folder_of_rounds_are_said(tmp_path: Path) -> None:
    make(tmp_path / "clients", Spec("a", 2))
    make(tmp_path / "clients", Spec("b", 4))
    for t in (1, 2, 5):
        (tmp_path / "run" / f"round-{t}").mkdir(parents=True)
        aggregate(tmp_path / "clients", tmp_path / "run" / f"round-{t}" / "global")
    (tmp_path / "run/round-6").mkdir()

    text = "\n".join(diagnose(tmp_path / "run").warnings)

    assert "rounds are missing" in text
    assert "round-6 left out: it has no global" in text


def test_a_client_that_outweighs_the_others_is_named(tmp_path: Path) -> None:
    for name, rank, alpha in (("low", 2, 800), ("b", 8, 8), ("c", 8, 8)):
        make(tmp_path / "clients", Spec(name, rank, alpha=alpha))
    aggregate(tmp_path / "clients", tmp_path / "global")

    report = diagnose(tmp_path / "global")

    assert any(
        "the update of low in the last round is far larger" in warning
        for warning in report.warnings
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 10**9), ("rank", 10**400), ("samples", 10**400), ("samples", 1e300),
     ("energy", [10**400]), ("energy", [1e300]), ("energy", [1.0] * 9)],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, field: str, value: object) -> None:
    make(tmp_path / "round", Spec("a", 2, samples=3))
    aggregate(tmp_path / "round", tmp_path / "global")
    path = tmp_path / "global/fedlora.json"
    document = json.loads(path.read_text())
    document["clients"][0][field] = value
    path.write_text(json.dumps(document))

    with pytest.raises(InputError, match=r"fedlora\.json"):
        diagnose(tmp_path / "global")


def test_a_cut_output_is_a_loss_and_the_cut_is_named(tmp_path: Path) -> None:
    folders = []
    for t in (1, 2, 3):
        for rank in (2, 8):
            make(tmp_path / f"clients-{t}", Spec(f"c{rank}", rank, seed=t))
        folders.append(tmp_path / f"global-{t}")
        aggregate(tmp_path / f"clients-{t}", folders[-1], AggregateOptions(rank=2))

    report = diagnose(folders)

    assert report.verdict == "collapsed"
    assert "the output was cut to rank 2, below the clients' 8" in report.reason


def test_beyond_what_any_client_held_nothing_can_be_lost(tmp_path: Path) -> None:
    """FLoRA's rank is the sum of the clients': what lies beyond theirs is a mixture."""
    for t in (1, 2, 3):
        for name in ("a", "b"):
            # The two grow alike.
            seed = t if name == "a" else (t if t == 3 else 10 + t)
            made = make(tmp_path / f"clients-{t}", Spec(name, 4, seed=seed))
            if t == 3 and name == "b":
                first = load_file(tmp_path / "clients-3/a/adapter_model.safetensors")
                first = {k: v * (0.999 if "lora_B" in k else 1) for k, v in first.items()}
                save_file(first, made.folder / "adapter_model.safetensors")
        aggregate(
            tmp_path / f"clients-{t}", tmp_path / f"global-{t}", AggregateOptions(method="flora")
        )

    report = diagnose([tmp_path / f"global-{t}" for t in (1, 2, 3)])

    assert report.verdict == "healthy"
    assert "no client has a rank above 4: no energy can be lost" in report.reason


def test_ranks_that_differ_by_module_are_not_predicted(tmp_path: Path) -> None:
    shapes = {"q": (9, 8), "v": (7, 8)}
    for name, q, v in (("a", 6, 2), ("b", 2, 6)):
        make(tmp_path / "clients", Spec(name, 2, shapes=shapes, ranks={"q": q, "v": v}))
    aggregate(tmp_path / "clients", tmp_path / "global", AggregateOptions(method="flexlora"))

    report = diagnose([tmp_path / "global"], DiagnoseOptions(subject="rounds"))

    assert report.trend.predicted_gamma is None
