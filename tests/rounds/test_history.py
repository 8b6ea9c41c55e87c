"""`--rounds`: earlier global adapters found in a folder, and what they keep alive."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support.cli
from support import oracle
from support.adapters import Made, Spec, make, relative_error, truncated, written_update
from support.rounds import SHAPES

from fedlora_cli import AggregateOptions, DistributeOptions, InputError, aggregate, distribute, read

#: Mixed ranks and scalings; the holders of the highest rank are not in every round.
LOW = (
    Spec("ann", rank=2, samples=30, alpha=16, shapes=SHAPES),
    Spec("bob", rank=3, samples=50, alpha=7, rslora=True, shapes=SHAPES),
)
HIGH = Spec("cy", rank=6, samples=9, alpha=3, shapes=SHAPES)
BETA = 0.6


run = partial(support.cli.run, "aggregate")


def clients(home: Path, number: int | str, *specs: Spec) -> list[Made]:
    """The clients of a round, other ones in every round, in `home/round-N/clients`."""
    seed = sum(str(number).encode())
    folder = home / f"round-{number}/clients"
    return [make(folder, replace(spec, seed=seed)) for spec in specs]


def go(home: Path, number: int | str, **options: Any) -> Path:
    """Aggregate a round that has its clients with `--rounds`; the global adapter."""
    folder = home / f"round-{number}"
    chosen = AggregateOptions(rounds=home, **options)
    report = aggregate([folder / "clients"], folder / "global", chosen)
    assert report.rank is not None
    return folder / "global"


def asked(
    made: list[Made], module: str, earlier: list[Path], beta: float, method: str = "raflora"
) -> np.ndarray:
    """The dense update of a round: the method's own, and β times the last step."""
    given = [(*one.factors[module], one.samples) for one in made]
    before = [written_update(folder, module) for folder in earlier]
    zero = np.zeros(SHAPES[module])
    last, former = before[-1] if before else zero, before[-2] if len(before) > 1 else zero
    return oracle.aggregate(method, given, last if before else None) + beta * (last - former)


@pytest.mark.parametrize("method", ["raflora", "residual", "flexlora"])
def test_heavy_ball_over_three_rounds_is_exact(tmp_path: Path, method: str) -> None:
    """No step before the first round, from zero in the second, and from there on between two."""
    cohorts = [(*LOW, HIGH), LOW, (LOW[0], HIGH)]
    earlier: list[Path] = []
    for number, specs in enumerate(cohorts, start=1):
        made = clients(tmp_path, number, *specs)

        found = go(tmp_path, number, method=method, momentum=BETA, verify=True)

        for module in SHAPES:
            exact = asked(made, module, earlier, BETA if earlier else 0, method)
            expected = truncated(exact, 6)
            assert relative_error(written_update(found, module), expected) < 1e-6
            if len(earlier) > 1:
                without = truncated(asked(made, module, earlier, 0, method), 6)
                assert relative_error(expected, without) > 0.05
        earlier.append(found)


def test_the_second_round_is_the_plain_one_and_a_step_from_zero(tmp_path: Path) -> None:
    """By the commands alone: what plain aggregation gives, plus β ΔW_1."""
    clients(tmp_path, 1, *LOW, HIGH)
    first = go(tmp_path, 1, momentum=BETA)
    clients(tmp_path, 2, *LOW, HIGH)
    second = go(tmp_path, 2, momentum=BETA, rank=24)
    plain = tmp_path / "plain"
    aggregate([tmp_path / "round-2/clients"], plain, AggregateOptions(rank=24, previous=first))

    for module in SHAPES:
        expected = written_update(plain, module) + BETA * written_update(first, module)
        assert relative_error(written_update(second, module), expected) < 1e-6


def test_the_first_round_has_no_history_and_nothing_to_gain_from_it(tmp_path: Path) -> None:
    clients(tmp_path, 1, *LOW)
    folder = tmp_path / "round-1"

    options = AggregateOptions(rounds=tmp_path, momentum=BETA)
    report = aggregate([folder / "clients"], folder / "global", options)
    aggregate([folder / "clients"], tmp_path / "plain")

    assert not any("earlier round" in warning for warning in report.warnings)
    assert report.options == {}
    weights = "adapter_model.safetensors"
    one, other = (read(path).modules for path in (folder / "global", tmp_path / "plain"))
    assert all((one[m].read().B == other[m].read().B).all() for m in SHAPES)
    assert (folder / "global" / weights).exists()


def test_the_report_names_the_rounds_that_were_used(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        clients(tmp_path, number, *LOW)
        go(tmp_path, number, momentum=BETA)

    options = json.loads((tmp_path / "round-3/global/fedlora.json").read_text())["options"]
    assert options == {
        "--momentum": BETA,
        "--previous": "round-2/global",
        "--before-previous": "round-1/global",
    }


def test_without_momentum_the_round_before_the_last_is_not_even_read(tmp_path: Path) -> None:
    for number in (1, 2):
        clients(tmp_path, number, *LOW)
        go(tmp_path, number)
    (tmp_path / "round-1/global/adapter_model.safetensors").write_bytes(b"broken")
    clients(tmp_path, 3, *LOW)

    with pytest.raises(
        InputError, match=r"round-1/global/.*safetensors: changed since fedlora wrote it"
    ):
        go(tmp_path, 3, momentum=BETA)
    assert go(tmp_path, 3).exists()


def test_rounds_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """2 before 10; the round that is written may be the tenth."""
    made = {}
    for number in (1, 2, 9):
        clients(tmp_path, number, *LOW)
        made[number] = go(tmp_path, number)
    for number, last in ((10, 9), (11, 10)):
        clients(tmp_path, number, *LOW)
        go(tmp_path, number, method="residual")
        report = json.loads((tmp_path / f"round-{number}/global/fedlora.json").read_text())
        assert report["options"]["--previous"] == f"round-{last}/global"


def test_an_old_round_that_is_made_again_ignores_itself_and_what_came_later(
    tmp_path: Path,
) -> None:
    for number in (1, 2, 3, 4):
        clients(tmp_path, number, *LOW)
        go(tmp_path, number, method="residual", momentum=BETA)
    second = tmp_path / "round-2/global"
    before = {path.name: path.read_bytes() for path in second.iterdir()}

    go(tmp_path, 2, method="residual", momentum=BETA, force=True)

    assert {path.name: path.read_bytes() for path in second.iterdir()} == before


def test_a_round_without_a_global_adapter_is_passed_over(tmp_path: Path) -> None:
    clients(tmp_path, 1, *LOW)
    go(tmp_path, 1)
    clients(tmp_path, 2, *LOW)
    clients(tmp_path, 3, *LOW)
    go(tmp_path, 3)

    report = json.loads((tmp_path / "round-3/global/fedlora.json").read_text())
    assert report["options"]["--previous"] == "round-1/global"


def test_output_elsewhere_comes_after_all_rounds(tmp_path: Path) -> None:
    home = tmp_path / "run"
    for number in (1, 2):
        clients(home, number, *LOW)
        go(home, number)

    options = AggregateOptions(rounds=home, method="residual")
    aggregate([home / "round-1/clients"], tmp_path / "out", options)

    report = json.loads((tmp_path / "out/fedlora.json").read_text())
    assert report["options"]["--previous"] == "round-2/global"


def test_a_flat_folder_of_global_adapters_has_rounds_and_its_clients_are_none(
    tmp_path: Path,
) -> None:
    """run/g2, run/g10, and beside them clients and adapters of other tools."""
    home = tmp_path / "run"
    for spec in LOW:
        make(home, replace(spec, name=f"a-{spec.name}"))
    folders = [home / f"a-{spec.name}" for spec in LOW]
    make(home, Spec("foreign", rank=2, samples=None, shapes=SHAPES))
    chosen = AggregateOptions(rounds=home, method="residual", momentum=BETA)
    reports = [aggregate(folders, home / name, chosen) for name in ("g1", "g2", "g10", "g11")]

    assert reports[0].options == {}
    assert [report.options["--previous"] for report in reports[1:]] == [
        "run/g1", "run/g2", "run/g10",
    ]  # fmt: skip
    assert reports[3].options["--before-previous"] == "run/g2"


def test_a_folder_of_clients_alone_has_no_rounds(tmp_path: Path) -> None:
    clients(tmp_path, 1, *LOW)

    report = aggregate(
        [tmp_path / "round-1/clients"],
        tmp_path / "out",
        AggregateOptions(rounds=tmp_path / "round-1/clients"),
    )

    assert "no earlier round in clients: this counts as the first round" in report.warnings


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    clients(tmp_path, 1, *LOW)

    result = run(tmp_path / "round-1/clients", "-o", tmp_path / "o", "--rounds", tmp_path / "no")

    assert result.exit_code == 3
    assert "no such folder; name the folder that holds the rounds" in result.stderr


@pytest.mark.parametrize("flag", ["--previous", "--before-previous"])
def test_rounds_and_their_adapters_are_not_given_together(tmp_path: Path, flag: str) -> None:
    clients(tmp_path, 1, *LOW)
    home = tmp_path / "round-1"

    result = run(home / "clients", "-o", tmp_path / "o", "--rounds", tmp_path, flag, home)

    assert result.exit_code == 2
    assert "--rounds: given together with --previous or --before-previous" in result.stderr
    assert not (tmp_path / "o").exists()


def test_a_method_that_uses_no_history_is_content_with_it(tmp_path: Path) -> None:
    """One command for every method: nothing is complained of."""
    clients(tmp_path, 1, *LOW)
    clients(tmp_path, 2, *LOW)
    go(tmp_path, 1, method="flexlora")

    folder = tmp_path / "round-2"
    options = AggregateOptions(rounds=tmp_path, method="flexlora")
    report = aggregate([folder / "clients"], folder / "global", options)

    assert not any("previous" in warning for warning in report.warnings)


def test_the_next_round_is_the_same_command(tmp_path: Path) -> None:
    for number in (1, 2):
        clients(tmp_path, number, *LOW)
        folder = tmp_path / f"round-{number}"
        result = run(
            *(folder / "clients", "-o", folder / "global"),
            *("--rounds", tmp_path, "--momentum", BETA, "--quorum", 0.2),
        )
        assert result.exit_code == 0, result.output
        command = f"--momentum {BETA} --quorum 0.2 --rounds {tmp_path}"
        assert f"next round: fedlora aggregate CLIENTS -o DIR {command}\n" in result.stderr


# The holders of the highest rank are away.


def present(number: int) -> tuple[Spec, ...]:
    """Low ranks in every round, the highest in the first one and in the fifth."""
    return (*LOW, HIGH) if number in (1, 5) else LOW


def federation(home: Path, *, history: bool) -> list[Path]:
    """Five rounds: every client starts from its share of the last global adapter."""
    made: list[Path] = []
    for number in range(1, 6):
        folder = home / f"round-{number}"
        specs = present(number)
        for spec in specs:
            make(folder / "clients", replace(spec, rslora=False, seed=number))
        if made:
            like = folder / "clients"
            distribute(made[-1], folder / "start", like, DistributeOptions(jobs=1))
            shutil.rmtree(like)
            (folder / "start").rename(like)
            for spec in specs:
                count = like / spec.name / "fedlora.json"
                count.write_text(json.dumps({"samples": spec.samples}))
        chosen = AggregateOptions(rounds=home if history else None)
        report = aggregate([folder / "clients"], folder / "global", chosen)
        said = [text for text in report.warnings if text.startswith("no client has a rank above")]
        lost = not history and number in (2, 3, 4)
        assert said == (
            [
                "no client has a rank above 3, but clients of round-1 did; give --rounds or "
                "--previous to keep rank index 4-6"
            ]
            if lost
            else []
        )
        made.append(folder / "global")
    return made


def test_what_high_ranks_brought_is_there_when_they_return(tmp_path: Path) -> None:
    """Nobody trains in between, so that nothing may change: not the rank, not the energy, and the
    client of the highest rank is handed its directions again.
    """
    made = federation(tmp_path, history=True)

    assert [read(folder).rank for folder in made] == [6] * 5
    for module in SHAPES:
        first = written_update(made[0], module)
        for folder in made[1:]:
            assert relative_error(written_update(folder, module), first) < 1e-5
        back = read(tmp_path / "round-5/clients/cy").modules[module].read()
        returned = back.scale * back.B.double().numpy() @ back.A.double().numpy()
        tail = first - truncated(first, 3)
        assert np.linalg.norm(tail) > 0.1 * np.linalg.norm(first)
        assert relative_error(returned - truncated(returned, 3), tail) < 1e-4


def test_without_history_it_is_lost_and_every_round_says_so(tmp_path: Path) -> None:
    made = federation(tmp_path, history=False)

    assert [read(folder).rank for folder in made] == [6, 3, 3, 3, 6]
    for module in SHAPES:
        last, first = written_update(made[-1], module), written_update(made[0], module)
        assert relative_error(last, truncated(first, 3)) < 1e-4
        assert relative_error(last, first) > 0.1


def test_the_command_warns_of_what_is_lost(tmp_path: Path) -> None:
    for number in (1, 2):
        clients(tmp_path, number, *((*LOW, HIGH) if number == 1 else LOW))
        folder = tmp_path / f"round-{number}"
        result = run(folder / "clients", "-o", folder / "global")

    assert result.exit_code == 0
    assert "warning: no client has a rank above 3, but clients of round-1 did" in result.stderr


@pytest.mark.parametrize(
    ("name", "method", "warned"),
    [
        ("g2", "raflora", True),
        ("g2", "residual", True),
        ("g2", "flexlora", False),  # keeps nothing of the round before, with or without it
        ("g0", "raflora", False),  # comes before it
        ("other", "raflora", False),  # no round of that series
    ],
)
def test_only_a_round_of_the_same_series_is_missed(
    tmp_path: Path, name: str, method: str, warned: bool
) -> None:
    made = clients(tmp_path, 1, *LOW, HIGH)
    aggregate([one.folder for one in made], tmp_path / "g1")

    options = AggregateOptions(method=method, dry_run=True)
    report = aggregate([one.folder for one in made[:2]], tmp_path / name, options)

    assert any("but clients of g1 did" in text for text in report.warnings) == warned


@pytest.mark.parametrize("name", ["g{}", "round-{}/global"])
def test_a_neighbour_that_cannot_be_read_stops_nobody(tmp_path: Path, name: str) -> None:
    made = clients(tmp_path, 1, *LOW, HIGH)
    first, second = (tmp_path / name.format(number) for number in (1, 2))
    second.parent.mkdir(exist_ok=True)
    aggregate([one.folder for one in made], first)
    (first / "fedlora.json").write_text('{"schema": "fedlora.aggregate/1", "clients": 3}')

    report = aggregate([one.folder for one in made[:2]], second)

    assert not any("no client has a rank above" in text for text in report.warnings)
