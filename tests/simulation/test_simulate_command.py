"""`fedlora simulate` as a person meets it: options in, what is said, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import support.cli
from support.simulate_reports import PLAIN, arm, diverged, simulation

from fedlora_cli.reports.simulate import SimulateReport
from fedlora_cli.simulation import presets
from fedlora_cli.simulation import simulate as workflow
from fedlora_cli.simulation.options import SimulateOptions, Split


class Called:
    """The workflow, which remembers what it was called with."""

    def __init__(self, report: SimulateReport) -> None:
        self.report, self.output, self.options = report, Path(), SimulateOptions()

    def __call__(self, output: Path, options: SimulateOptions, stage: object) -> SimulateReport:
        self.output, self.options = output, options
        return self.report


@pytest.fixture
def called(monkeypatch) -> Called:
    called = Called(simulation(PLAIN))
    monkeypatch.setattr(workflow, "simulate", called)
    return called


run = partial(support.cli.run, "simulate", "-o", "run")

TEXTS = ("--task", "text-classification", "--model", "m", "--data", "d")


def names(called: Called) -> list[str]:
    return [one.name for one in called.options.arms]


def test_without_options_the_defaults_are_simulated(called: Called) -> None:
    result = run()

    assert result.exit_code == 0, result.output
    assert called.output == Path("run")
    assert called.options == presets.PRESETS["digits"]
    assert result.stdout.startswith("simulate: digits, 10 clients of ranks 4 to 32")
    assert "raflora-b0.8, every round" not in result.stdout
    assert result.stderr.splitlines() == [
        "warning: something to know",
        "wrote: run",
        "next: fedlora diagnose run/seed-0/flexlora-lr0.001",
    ]


@pytest.mark.parametrize(
    ("arguments", "arms"),
    [
        (("-m", "flexlora,raflora"), ["flexlora", "raflora"]),
        (("-m", "fedavg", "-m", "raflora:quorum=1:momentum=0.8"), ["fedavg", "raflora-q1-b0.8"]),
        (
            ("-m", "flexlora,raflora,hetlora", "--quorum", "0,1", "--momentum", "0,0.8"),
            ["flexlora", "flexlora-b0.8", "raflora-q0", "raflora-q0-b0.8", "raflora-q1",
             "raflora-q1-b0.8", "hetlora"],
        ),
        (
            ("-m", "raflora:quorum=0.3,raflora", "--quorum", "0.5"),
            ["raflora-q0.3", "raflora-q0.5"],
        ),
        (("-m", "residual:momentum=0.5,flexlora", "--momentum", "0.8"),
         ["residual-b0.5", "flexlora-b0.8"]),
        # the arms of the preset: flexlora, raflora, raflora with momentum 0.8
        (("--momentum", "0,0.5"), ["flexlora", "flexlora-b0.5", "raflora", "raflora-b0.5"]),
        (("--quorum", "0.5"), ["flexlora", "raflora-q0.5", "raflora-q0.5-b0.8"]),
    ],
)  # fmt: skip
def test_methods_are_crossed_with_the_choices_that_they_have(
    called: Called, arguments: tuple[str, ...], arms: list[str]
) -> None:
    assert run(*arguments, "-q").exit_code == 0
    assert names(called) == arms


def test_options_override_those_of_the_preset_and_the_rest_stays(
    called: Called, monkeypatch
) -> None:
    known = presets.PRESETS["roberta-20news"]
    given = ("--preset", "roberta-20news", "--rounds", 7, "--batch-size", 4, "--limit", 100)

    assert run(*given, "--cohort", "3x4,2x16", "--label", "topic", "-q").exit_code == 0

    setting, source = known.setting, known.setting.source
    changed = replace(
        setting,
        ranks=(4, 4, 4, 16, 16),
        source=replace(source, limit=100, label="topic"),
        training=replace(setting.training, batch_size=4),
    )
    assert called.options == replace(known, rounds=7, setting=changed)


def test_another_task_takes_nothing_of_the_model_and_the_data(called: Called) -> None:
    given = ("--task", "causal-lm", "--model", "m", "--data", "a.json", "--data", "b.json")

    assert run("--preset", "roberta-20news", *given, "-q").exit_code == 0

    source = called.options.setting.source
    assert (source.family, source.model, source.data) == ("causal-lm", "m", ("a.json", "b.json"))
    assert (source.label, source.target_modules) == (None, None)
    assert called.options.rates == presets.PRESETS["roberta-20news"].rates


def test_every_option_goes_where_it_belongs(called: Called) -> None:
    result = run(
        "--lr", "1e-3,2e-3", "--seeds", "4,7", "--rounds", 5, "--ranks", "2,4,8", "-p", 0.4,
        "--dirichlet", 0.1, "--holdings", -1, "--epochs", 3, "--batch-size", 8,
        "--scaling", 4, "--dropout", 0.1, "--device", "cuda", "-j", 3, "--threads", 2,
        "--score-every", 2, "--keep-clients", "--task", "causal-lm", "--model", "base",
        "--data", "d", "--config", "c", "--train-split", "tr", "--test-split", "te", "--input", "x",
        "--label", "y", "--target-modules", "q,v", "--modules-to-save", "score", "--max-length", 9,
        "--max-new-tokens", 8, "--limit", 50, "--dtype", "bfloat16", "-q",
    )  # fmt: skip

    assert (result.exit_code, result.output) == (0, "")
    options, setting = called.options, called.options.setting
    assert (options.rates, options.seeds, options.rounds) == ((1e-3, 2e-3), (4, 7), 5)
    assert (options.score_every, options.keep_clients, options.device) == (2, True, "cuda")
    assert (options.jobs, options.threads) == (3, 2)
    assert (setting.ranks, setting.participation) == ((2, 4, 8), 0.4)
    assert vars(setting.split) == {"dirichlet": 0.1, "classes": None, "holdings": -1}
    assert vars(setting.training) == {
        "epochs": 3, "batch_size": 8, "scaling": 4, "dropout": 0.1
    }  # fmt: skip
    assert vars(setting.source) == {
        "family": "causal-lm", "model": "base", "data": ("d",), "config": "c",
        "train_split": "tr", "test_split": "te", "input": "x", "label": "y",
        "target_modules": ("q", "v"), "modules_to_save": ("score",), "max_length": 9,
        "max_new_tokens": 8, "limit": 50, "dtype": "bfloat16", "client_column": None,
        "clients_from": None,
    }  # fmt: skip


def test_all_linear_is_no_name_of_a_module_and_seeds_may_be_counted(called: Called) -> None:
    text = ("--task", "causal-lm", "--model", "m", "--data", "d", "--target-modules", "all-linear")

    assert run(*text, "--seeds", 2, "-q").exit_code == 0
    assert called.options.setting.source.target_modules == "all-linear"
    assert called.options.seeds == (0, 1)


def test_own_clients_take_no_split_and_no_ranks_of_a_preset(called: Called) -> None:
    known = presets.PRESETS["roberta-20news"].setting

    assert run("--preset", "roberta-20news", "--client-column", "site", "-q").exit_code == 0
    setting = called.options.setting
    assert (setting.source.client_column, setting.source.fixed) == ("site", "--client-column")
    assert (setting.split, setting.ranks) == (Split(), ())
    assert (setting.source.model, setting.training) == (known.source.model, known.training)
    given = (*TEXTS, "--clients-from", "c.csv", "--cohort", "2x4,1x8")
    assert run(*given, "-q").exit_code == 0
    assert called.options.setting.ranks == (4, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "digit"), "no preset is called digit; use one of digits"),
        (("-m", "fedprox"), "unknown method fedprox"),
        (("-m", "raflora:beta=1"), "'raflora:beta=1' is not an arm; write raflora or"),
        (("-m", "raflora:quorum=a"), "'a' is no number"),
        (("-m", "raflora,,flexlora"), "'' is not an arm"),
        (("-m", "raflora,raflora"), "--method: a value twice; give each value once"),
        (("-m", "flexlora:quorum=0.5"), "the rule of flexlora has no quorum"),
        (("-m", "flexlora", "--quorum", "0.5"), "no given method can take it; add raflora"),
        (
            ("-m", "fedavg,raflora:momentum=0", "--momentum", "0.5"),
            "--momentum: no given method can take it",
        ),
        (("--quorum", "0,2"), "--quorum: 2.0 is out of range"),
        (("--momentum", "nan"), "--momentum: nan is out of range"),
        (("--lr", "1e-3;2e-3"), "--lr: '1e-3;2e-3' is no number"),
        (("--lr", "0"), "--lr: 0.0 is out of range"),
        (("--seeds", "0"), "--seeds: 0 is out of range; it must be from 1 to 1000"),
        (("--seeds", "0,x"), "--seeds: 'x' is no number"),
        (("--rounds", "0"), "--rounds: 0 is out of range"),
        (("--cohort", "8x"), "--cohort: '8x' is no group"),
        (("--cohort", "8x4:120"), "--cohort: sample counts in a simulation; write 8x4,6x8"),
        (("--cohort", "8x4", "--ranks", "4"), "--ranks: given together with --cohort"),
        (("--ranks", "4,0"), "0 is out of range; it must be ranks of 1 or more"),
        (("-p", "0"), "--participation: 0.0 is out of range"),
        (("--dirichlet", "nan"), "--dirichlet: nan is out of range"),
        (("--model", "m"), "--model: digits has no use for it; give the --task that it is for"),
        (("--dtype", "bfloat16"), "--dtype: digits has no use for it"),
        (("--classes", "2", "--dirichlet", "1"), "--classes: given together with --dirichlet"),
        (("--client-column", "site"), "--client-column: digits has no use for it; give the --task"),
        (("--clients-from", "c.csv"), "--clients-from: digits has no use for it; give the --task"),
        *(
            (
                (*TEXTS, fixing, "a", flag, "1"),
                f"{flag}: given together with {fixing}; give one of them",
            )
            for fixing in ("--client-column", "--clients-from")
            for flag in ("--dirichlet", "--classes", "--holdings")
        ),
        (
            (*TEXTS, "--client-column", "a", "--clients-from", "b"),
            "--clients-from: given together with --client-column; give one of them",
        ),
        (("--csv", "x.tsv"), "--csv: x.tsv has no known ending; use one of .csv"),
        (("-m", "flora"), "clients of flora merge the whole stack into their base model"),
        (("--task", "causal-lm"), "causal-lm needs both; give --model and --data"),
        (("--target-modules", "q,,v"), "--target-modules: 'q,,v' has an empty name"),
        (("--plot", "x.gif"), "--plot: x.gif has no known ending"),
    ],
)
def test_wrong_values_are_one_line_before_anything_is_trained(
    called: Called, arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)

    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert called.output == Path()


@pytest.mark.parametrize("arguments", [("--help",), ("-o", "run", "--lr", "x")])
def test_nothing_heavy_is_imported_for_help_or_a_wrong_value(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom fedlora_cli.cli import app\n"
        f"try: app(['simulate', *{arguments!r}])\n"
        "except SystemExit as stop: print(stop.code)\n"
        "heavy = {'torch', 'peft', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("0" if arguments == ("--help",) else "2")


def test_an_interruption_says_how_to_go_on(monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "simulate", interrupted)

    result = run()

    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "error: interrupted; the same command continues from the last whole rounds in run"
    ]


def test_all_that_can_be_written_is_named(called: Called, tmp_path: Path) -> None:
    plot, page = tmp_path / "a.svg", tmp_path / "a.html"

    result = run("--plot", plot, "--html", page, "--json")

    assert json.loads(result.stdout)["schema"] == "fedlora.simulate/1"
    wrote = [line for line in result.stderr.splitlines() if line.startswith("wrote: ")]
    assert wrote == ["wrote: run", f"wrote: {plot}", f"wrote: {page}"]
    assert plot.read_bytes().startswith(b"<?xml")
    html = page.read_text()
    assert html.index("something to know") < html.index("<svg")
    assert "raflora-b0.8, every round" in html


def test_verbose_shows_every_round(called: Called) -> None:
    assert "raflora-b0.8, every round" in run("-v").stdout


def test_where_nothing_came_to_its_end_there_is_nothing_next(called: Called) -> None:
    called.report = simulation([diverged(arm("raflora"), 1, 2, 3)])

    assert "next:" not in run().stderr
