"""The JSON documents: their schemas, the keys that others build on, and no NaN anywhere.

`PYTHONPATH=tests python tests/documents/test_documents.py` writes the schemas of today's reports.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import load_file, save_file
from support.adapters import Spec, make
from support.cli import run
from support.simulate_reports import PLAIN, arm, diverged, simulation

from fedlora_cli.reports import document
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.reports.compare import CompareReport
from fedlora_cli.reports.diagnose import DiagnoseReport
from fedlora_cli.reports.distribution import DistributeReport, InitReport
from fedlora_cli.reports.inspect import InspectReport
from fedlora_cli.reports.predict import PredictReport
from fedlora_cli.reports.schema import schema
from fedlora_cli.reports.simulate import SimulateReport, Spread

SAMPLES = Path(__file__).parents[2] / "samples"
SCHEMAS = Path(document.__file__).parent / "schemas"

REPORTS: dict[str, type] = {
    document.AGGREGATE_SCHEMA: AggregateReport,
    document.COMPARE_SCHEMA: CompareReport,
    document.DIAGNOSE_SCHEMA: DiagnoseReport,
    document.DISTRIBUTE_SCHEMA: DistributeReport,
    document.INIT_SCHEMA: InitReport,
    document.INSPECT_SCHEMA: InspectReport,
    document.PREDICT_SCHEMA: PredictReport,
    document.SIMULATE_SCHEMA: SimulateReport,
}


def home(name: str) -> Path:
    """Where the schema of that name is kept: `fedlora.diagnose/1` in `diagnose-1.json`."""
    return SCHEMAS / f"{name.removeprefix('fedlora.').replace('/', '-')}.json"


def text(name: str) -> str:
    return json.dumps(schema(name, REPORTS[name]), indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", REPORTS)
def test_the_kept_schemas_are_those_of_the_reports(name: str) -> None:
    """A key that is renamed shows here, and asks for a new version."""
    assert home(name).read_text() == text(name)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Clients without any update: where ratios would be no number."""
    for name, rank in (("ann", 2), ("bob", 4)):
        path = make(tmp_path / "empty", Spec(name, rank)).folder / "adapter_model.safetensors"
        save_file({k: v * ("lora_A" in k) for k, v in load_file(path).items()}, path)
    return tmp_path / "empty"


def printed(*arguments: object) -> dict[str, Any]:
    """The document of a command, which must be one, with numbers that JSON has."""
    command = [*map(str, arguments), "--json", "--quiet"]
    return checked(run(*command).stdout)


def checked(text: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    kept = json.loads(home(document["schema"]).read_text())
    jsonschema.Draft202012Validator.check_schema(kept)
    jsonschema.Draft202012Validator(kept).validate(document)
    return document


ROUND = SAMPLES / "round-01"

COMMANDS = [
    ("diagnose", ROUND),
    ("diagnose", ROUND, "--no-similarity"),
    ("diagnose", SAMPLES / "rounds/flexlora"),
    ("diagnose", SAMPLES / "rounds/raflora/round-03"),
    ("diagnose", ROUND / "clinic-a"),
    ("compare", ROUND),
    ("compare", ROUND, "--previous", SAMPLES / "rounds/raflora/round-01", "--quorum", 0.2),
    ("inspect", ROUND),
    ("inspect", ROUND / "clinic-b", "--values"),
    ("inspect", SAMPLES / "rounds/flexlora"),
    ("predict", ROUND),
    ("predict", "--ranks", "4,8,16", "--samples", "100,50,10", "--participation", 0.5),
    ("predict", "--cohort", "5x4"),
    ("predict", "--cohort", "5x4", "--rounds", 6),
    ("predict", ROUND, "--rounds", 6),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(map(str, c))[-40:])
def test_documents_are_valid(command: tuple[object, ...]) -> None:
    assert printed(*command)["schema"] == f"fedlora.{command[0]}/1"


#: Commands that write a folder: their documents.
WRITING = [
    ("distribute", SAMPLES / "rounds/raflora/round-03", "--like", ROUND),
    ("distribute", ROUND / "clinic-b", "--rank", "2,32"),
    ("init", SAMPLES / "base", "--ranks", "2,4", "--target-modules", "fc1,q_proj"),
    ("init", SAMPLES / "base", "--like", ROUND),
]


@pytest.mark.parametrize("command", WRITING, ids=lambda c: " ".join(map(str, c))[-40:])
def test_documents_of_what_is_written_are_valid(
    command: tuple[object, ...], tmp_path: Path
) -> None:
    document = printed(*command, "-o", tmp_path / "out")

    assert document["schema"] == f"fedlora.{command[0]}/1"


@pytest.mark.parametrize("command", ["diagnose", "compare", "inspect", "predict", "aggregate"])
def test_documents_are_valid_where_there_is_nothing_to_divide_by(
    command: str, empty: Path, tmp_path: Path
) -> None:
    output = ["-o", tmp_path / "out"] if command == "aggregate" else []

    assert printed(command, empty, *output)["schema"] == f"fedlora.{command}/1"
    if command == "aggregate":
        assert printed("diagnose", tmp_path / "out")["verdict"] is None
        handed = printed("distribute", tmp_path / "out", "--like", empty, "-o", tmp_path / "start")
        assert [row["kept_energy"] for row in handed["clients"]] == [None, None]
        assert {row["most_kept"] for row in handed["modules"]} == {None}


def test_the_shipped_simulations_are_valid() -> None:
    paths = sorted((SAMPLES / "simulations").glob("*.json"))

    assert len(paths) >= 5
    for path in paths:
        checked(path.read_text())


def test_the_keys_that_others_build_on() -> None:
    diagnosis = printed("diagnose", SAMPLES / "rounds/flexlora")
    forecast = printed("predict", "--ranks", "4,8", "--samples", "3,1")

    assert set(diagnosis) >= {"schema", "verdict", "shared_rank", "adapters", "trend"}
    assert set(diagnosis["adapters"][0]) >= {
        "path", "rank", "energy_ratio", "effective_rank", "stable_rank", "modules",
    }  # fmt: skip
    assert set(diagnosis["adapters"][0]["modules"][0]) >= {
        "name", "energy_ratio", "effective_rank", "stable_rank", "singular_values",
    }  # fmt: skip
    assert set(diagnosis["trend"]) >= {"rounds", "energy_ratio", "gamma", "r_squared"}
    assert len(diagnosis["trend"]["energy_ratio"]) == diagnosis["trend"]["rounds"] == 8
    assert set(forecast) >= {"schema", "ranks", "samples", "coverage", "methods"}
    assert set(forecast["methods"][0]) >= {"name", "column_sums", "gamma", "rounds_to_99"}
    assert forecast["coverage"] == [1] * 4 + [0.25] * 4


def test_simulations_are_valid_documents_without_nan() -> None:
    unknown = simulation([replace(PLAIN[0], norm=Spread(math.nan, math.inf))])
    lost = simulation([diverged(arm("raflora"), 1, 2, 3)])
    kept = json.loads(home("fedlora.simulate/1").read_text())
    jsonschema.Draft202012Validator.check_schema(kept)

    for report in (simulation(PLAIN), lost):
        written = document.to_json(report.to_dict())
        read = json.loads(written, parse_constant=pytest.fail)
        jsonschema.Draft202012Validator(kept).validate(read)
        assert set(read["arms"][0]) >= {"arm", "rate", "best", "accuracy", "energy_ratio", "rounds"}
    read = json.loads(document.to_json(unknown.to_dict()))
    assert read["arms"][0]["norm"] == {"mean": None, "sd": None}
    assert read["arms"][0]["rounds"][-1]["round"] == 20


def test_the_schema_would_notice_a_wrong_document() -> None:
    document = printed("diagnose", ROUND / "clinic-a")
    kept = json.loads(home("fedlora.diagnose/1").read_text())

    for wrong in (
        {key: value for key, value in document.items() if key != "verdict"},
        document | {"verdict": "fine"},
        document | {"shared_rank": "2"},
        document | {"adapters": [{}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(kept).validate(wrong)


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name in REPORTS:
        home(name).write_text(text(name))
