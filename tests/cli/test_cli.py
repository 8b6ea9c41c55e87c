"""The command as a person and a pipeline meet it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import Spec, make
from support.cli import on_a_terminal, run

from fedlora_cli import METHODS, __version__, aggregate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    for name, rank, samples in (("ann", 2, 30), ("bob", 6, 10)):
        make(tmp_path / "round", Spec(name, rank=rank, samples=samples, alpha=2 * rank))
    return tmp_path / "round"


def test_the_result_is_on_stdout_and_the_rest_on_stderr(clients: Path, tmp_path: Path) -> None:
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "--verify")

    assert result.exit_code == 0
    assert "ρ = " in result.stdout
    assert "verified: the files hold the weighted sum within" in result.stdout
    assert "rank index 3-6 comes from bob alone, with weight 1.00 for 0.25" in result.stderr
    assert (
        f"next round: fedlora aggregate CLIENTS -o DIR --previous {tmp_path}/out" in result.stderr
    )
    assert "\x1b" not in result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_json_is_one_document_and_the_one_that_is_kept(clients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("aggregate", str(clients), "-o", str(out), "--json", "--verify")

    document = json.loads(result.stdout, parse_constant=pytest.fail)
    kept = json.loads((out / "fedlora.json").read_text())
    assert kept["output"] == "."
    assert [row["path"] for row in kept["clients"]] == ["../round/ann", "../round/bob"]
    assert [row["path"] for row in document["clients"]] == [f"{clients}/ann", f"{clients}/bob"]
    assert document == kept | {"output": str(out), "clients": document["clients"]}
    assert document["schema"] == "fedlora.aggregate/1"
    expected = {
        "method": str,
        "output": str,
        "shared_rank": int,
        "rank": int,
        "energy_ratio": float,
        "clients": list,
        "modules": list,
        "warnings": list,
    }
    for key, kind in expected.items():
        assert type(document[key]) is kind
    assert set(document["clients"][0]) >= {"name", "path", "rank", "samples", "weight"}
    for module in document["modules"]:
        assert set(module) >= {"name", "shape", "ranks", "rank", "energy_ratio", "kept_energy"}
        assert len(module["singular_values"]) == module["rank"] == 6
        assert module["ranks"] == [2, 6]


def test_a_dry_run_gives_the_same_document_without_what_only_tensors_tell(
    clients: Path, tmp_path: Path
) -> None:
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "--json", "-n")

    document = json.loads(result.stdout)
    assert (document["rank"], document["energy_ratio"]) == (6, None)
    assert [row["weight"] for row in document["clients"]] == [0.75, 0.25]
    assert "rank index 3-6 comes from bob alone" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_states_no_numbers_that_it_does_not_know(clients: Path, tmp_path: Path) -> None:
    command = ("aggregate", str(clients), "-o", str(tmp_path / "out"), "-n", "--energy", "0.9")
    shown = run(*command, "-v", "--explain").stdout

    assert "factors and writes files of the rank that --energy decides" in shown
    assert "--energy decides the rank first" in shown
    row = next(line.split() for line in shown.splitlines() if "layers.0.v_proj" in line)
    assert row[-3:] == ["-", "-", "-"]
    assert json.loads(run(*command, "--json").stdout)["work"]["write"] is None


def test_explain_says_why_there_are_no_routes(clients: Path, tmp_path: Path) -> None:
    command = ("aggregate", str(clients), "-o", str(tmp_path / "out"), "-n", "-m", "flora")
    says = "flora does not truncate: qr computes every module"

    assert says in run(*command, "--explain").stdout
    assert says not in run(*command).stdout


def test_quiet_says_nothing(clients: Path, tmp_path: Path) -> None:
    assert run("aggregate", str(clients), "-o", str(tmp_path / "out"), "-q").output == ""


def test_verbose_shows_every_module(clients: Path, tmp_path: Path) -> None:
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "-v")

    assert "layers.0.v_proj" in result.stdout
    assert "7 x 20" in result.stdout


@pytest.mark.parametrize(("flags", "separator"), [([], "\n"), (["-0"], "\0")])
def test_a_list_of_clients_may_come_on_stdin(
    clients: Path, tmp_path: Path, flags, separator
) -> None:
    listed = separator.join([str(clients / "bob"), str(clients / "ann"), ""])

    result = run("aggregate", "-", "-o", str(tmp_path / "out"), *flags, stdin=listed)

    assert result.exit_code == 0, result.output
    assert "2 clients" in result.stdout


def test_an_empty_list_on_stdin_is_a_usage_error(tmp_path: Path) -> None:
    result = run("aggregate", "-", "-o", str(tmp_path / "out"), stdin="")

    assert result.exit_code == 2
    assert "no folders in the list" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-"], b"a\0b\0", "a NUL-separated list; give --null"),
        (["-", "round"], b"", "- beside other folders"),
    ],
)
def test_a_wrong_list_on_stdin_is_a_usage_error(tmp_path: Path, arguments, stdin, message) -> None:
    result = run("aggregate", *arguments, "-o", "out", stdin=stdin)

    assert result.exit_code == 2
    assert message in result.stderr


def test_without_any_standard_input_a_list_is_empty(tmp_path: Path) -> None:
    command = f"{sys.executable} -m fedlora_cli aggregate - -o out <&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 2
    assert "no folders in the list" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_without_unicode_gets_ascii(clients: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "fedlora_cli", "aggregate", "round", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0
    assert "####" in done.stdout
    assert "rho = " in done.stdout
    assert "\\u" not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["round"],
        ["round", "-o", "out", "--rank", "0"],
        ["round", "-o", "out", "--rank", "two"],
        ["round", "-o", "out", "--basis", "cubic"],
        ["round", "-o", "out", "--method", "fedprox"],
        ["round", "-o", "out", "--no-such-option"],
        ["round", "-o", "out", "--rank", "2", "--energy", "0.9"],
    ],
)
def test_wrong_usage_is_exit_code_2(clients: Path, tmp_path: Path, monkeypatch, arguments) -> None:
    monkeypatch.chdir(tmp_path)

    result = run("aggregate", *arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


def test_an_existing_target_is_exit_code_4_and_force_replaces_it(
    clients: Path, tmp_path: Path
) -> None:
    command = ("aggregate", str(clients), "-o", str(tmp_path / "out"))

    assert run(*command).exit_code == 0
    refused = run(*command)
    assert (refused.exit_code, refused.stdout) == (4, "")
    assert "--force" in refused.stderr
    assert run(*command, "--force").exit_code == 0


def test_a_failed_verification_is_exit_code_5_and_nothing_is_written(
    clients: Path, tmp_path: Path, monkeypatch
) -> None:
    """A wrong weight anywhere is seen: here one factor is changed on its way to the disk."""
    from dataclasses import replace

    from fedlora_cli.formats import FORMATS, peft

    @contextmanager
    def careless(adapter: Any, folder: Path, provenance: Any) -> Iterator[Any]:
        first = next(iter(adapter.factors))
        with peft.writing(adapter, folder, provenance) as put:
            yield lambda name, one: put(
                name, replace(one, B=one.B * 1.00001) if name == first else one
            )

    monkeypatch.setitem(FORMATS, "peft", replace(FORMATS["peft"], writing=careless))
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "--verify")

    assert result.exit_code == 5
    assert "layers.0.q_proj is off by 1.0e-05, more than 4.8e-07" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


def test_an_interrupt_is_exit_code_130(clients: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedlora_cli.rounds.output.aggregate_part", interrupted)
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "-j", "1")

    assert result.exit_code == 130
    assert "interrupted; nothing is half written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


def test_being_ended_by_a_scheduler_is_said(clients: Path, tmp_path: Path, monkeypatch) -> None:
    def ended(*_: object) -> None:
        raise SystemExit(143)

    monkeypatch.setattr("fedlora_cli.rounds.output.aggregate_part", ended)
    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"), "-j", "1")

    assert result.exit_code == 143
    assert "error: ended by SIGTERM; nothing is half written" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    command = ("aggregate", str(tmp_path / "no"), "-o", str(tmp_path / "out"))

    assert "Traceback" not in run(*command).stderr
    assert "Traceback" in run(*command, "--debug").stderr


def test_methods_lists_the_table(tmp_path: Path) -> None:
    table = run("methods").stdout
    document = json.loads(run("methods", "--json").stdout)

    assert document["schema"] == "fedlora.methods/1"
    assert [row["name"] for row in document["methods"]] == list(METHODS)
    for method in METHODS.values():
        assert method.name in table
        assert method.summary in table
        assert method.source in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_version() -> None:
    assert run("--version").stdout == f"fedlora {__version__}\n"
    assert importlib.metadata.version("fedlora") == __version__


def test_help_imports_neither_torch_nor_peft_nor_matplotlib() -> None:
    """Nor does listing the methods; nobody waits a second for a page of text."""
    for arguments in (["--help"], ["aggregate", "-h"], ["init", "-h"], ["methods"]):
        program = (
            "import sys\n"
            "from fedlora_cli.cli import app\n"
            f"try: app({arguments!r}, prog_name='fedlora')\n"
            "except SystemExit as stop: assert not stop.code\n"
            "heavy = {'torch', 'peft', 'matplotlib', 'transformers', 'safetensors'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "fedlora" in done.stdout or "raflora" in done.stdout


def test_an_aggregation_never_imports_peft_or_transformers(clients: Path, tmp_path: Path) -> None:
    """They take many times as long to import as the whole job takes."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import fedlora_cli\n"
        f"fedlora_cli.aggregate([Path({str(clients)!r})], Path({str(tmp_path / 'out')!r}))\n"
        "assert not {'peft', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_public_names_are_all_there() -> None:
    import fedlora_cli

    for name in fedlora_cli.__all__:
        assert getattr(fedlora_cli, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'aggregrate'"):
        _ = fedlora_cli.aggregrate


def test_the_library_gives_what_the_command_gives(clients: Path, tmp_path: Path) -> None:
    run("aggregate", str(clients), "-o", str(tmp_path / "command"))
    aggregate([clients], tmp_path / "library")

    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "fedlora.json"):
        assert (tmp_path / "library" / name).read_bytes() == (
            tmp_path / "command" / name
        ).read_bytes()


def test_a_closed_pipe_is_no_traceback(clients: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m fedlora_cli aggregate round -o out --json | head -c 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)

    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/fedlora.json").exists()


def test_on_a_terminal_there_is_colour_and_with_no_color_there_is_none(
    clients: Path, tmp_path: Path
) -> None:
    bar = "\x1b[36m"

    assert bar in on_a_terminal(tmp_path, ["aggregate", "round", "-o", "one"])
    assert bar not in on_a_terminal(tmp_path, ["aggregate", "round", "-o", "two"], NO_COLOR="1")


def test_the_next_round_goes_on_as_this_one(clients: Path, tmp_path: Path) -> None:
    def advised(*options: str) -> str:
        out = tmp_path / "-".join(options)
        result = run("aggregate", str(clients), "-o", str(out), *options)
        assert result.exit_code == 0
        return result.stderr.split("next round: fedlora aggregate CLIENTS -o DIR")[1].strip()

    assert advised("-m", "flexlora") == "--method flexlora"
    residual = advised("-m", "residual", "--basis", "svd")
    assert residual.startswith("--method residual --basis svd --previous ")
    assert advised("--quorum", "0.25").startswith("--quorum 0.25 --previous ")
    assert advised("--rank", "3").startswith("--rank 3 --previous ")
    first, second = str(tmp_path / "-m-flexlora"), str(tmp_path / "--rank-3")
    earlier = ("--previous", second, "--before-previous", first, "--momentum", "0.8")
    result = run("aggregate", str(clients), "-o", str(tmp_path / "x"), "-m", "flexlora", *earlier)
    assert (
        f"--method flexlora --momentum 0.8 --previous {tmp_path}/x --before-previous {second}"
        in result.stderr
    )


def test_a_round_in_folders_of_its_own_is_found(clients: Path, tmp_path: Path) -> None:
    """run/round-1/clients and run/round-1/global."""
    home = tmp_path / "run/round-1"
    home.mkdir(parents=True)
    clients.rename(home / "clients")
    aggregate([home / "clients"], home / "global")

    lost = run("aggregate", str(tmp_path / "run"), "-o", str(tmp_path / "x"))
    beside = run("diagnose", str(home))
    file = run("aggregate", str(home / "global/README.md"), "-o", str(tmp_path / "x"))

    assert f"did you mean {home}/clients?" in lost.stderr
    assert "rounds: 1 of" in beside.stdout or "round-1: rank" in beside.stdout
    assert "not a folder; name the folder that it lies in" in file.stderr


def test_what_looks_wrong_about_an_aggregation_is_said(clients: Path, tmp_path: Path) -> None:
    previous = run(
        "aggregate", str(clients), "-o", str(tmp_path / "a"), "--previous", str(clients / "ann")
    )
    path = make(tmp_path / "zero", Spec("a", 2)).folder / "adapter_model.safetensors"
    save_file({k: v * ("lora_A" in k) for k, v in load_file(path).items()}, path)
    zero = run("aggregate", str(tmp_path / "zero"), "-o", str(tmp_path / "b"))

    (tmp_path / "a/fedlora.json").write_text('{"schema": "fedlora.aggregate/1", "clients": 3}')
    damaged = run(
        "aggregate", str(clients), "-o", str(tmp_path / "c"), "--previous", str(tmp_path / "a")
    )

    assert "is given as a global adapter, but has a sample count like a client" in previous.stderr
    assert damaged.exit_code == 0
    assert "like a client" not in damaged.stderr
    assert "the global update is zero in every module" in zero.stderr


def test_a_folder_that_cannot_be_looked_into_stops_nobody(clients: Path, tmp_path: Path) -> None:
    logs = clients / "logs"
    logs.mkdir()
    (logs / "self").symlink_to("self")

    result = run("aggregate", str(clients), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "logs left out: no adapter in it" in result.stderr
