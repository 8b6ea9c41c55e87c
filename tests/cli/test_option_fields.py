"""Options that a dataclass declares: the command line, the help and the checks that follow."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from fedlora_cli import (
    AggregateOptions,
    DiagnoseOptions,
    DistributeOptions,
    InitOptions,
    InspectOptions,
    PredictOptions,
    UsageError,
)
from fedlora_cli.cli.app import load
from fedlora_cli.cli.command import Given, Only, command
from fedlora_cli.cli.console import Printing
from fedlora_cli.options import SHARE, at_least, check_options, numbers, option, options_of


@dataclass(frozen=True)
class Cake:
    size: int = option(3, "Number of layers.", "-s", show_default=True, check=at_least(1))
    rates: tuple[float, ...] = option(
        (0.5,), "Shares of sugar.", "--sugar", text=str, parse=numbers, check=SHARE
    )
    shape: Literal["round", "square"] | None = option(None, "Shape.", panel="Look")
    secret: int = 7

    def __post_init__(self) -> None:
        check_options(self)


def called(annotation: Any, *arguments: str) -> Any:
    """The value of the parameter when the command is called with these arguments."""
    values: list[Any] = []

    def bake(*, cake, printing) -> None:
        values.append(cake)

    bake.__annotations__ = {"cake": annotation, "printing": Printing}
    app = typer.Typer()
    app.command()(command(bake))
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code:
        return result
    return values[0]


def test_fields_are_options_of_the_command() -> None:
    assert called(Cake) == Cake()
    assert called(Cake, "-s", "2", "--sugar", "0.25,1") == Cake(2, (0.25, 1.0))
    assert called(Cake, "--size", "2", "--shape", "square") == Cake(2, shape="square")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "0"], "--size: 0 is out of range; it must be 1 or more"),
        (["--sugar", "0.5,2"], "--sugar: 2.0 is out of range; it must be in [0, 1]"),
        (["--sugar", "sweet"], "--sugar: 'sweet' is no number; give numbers with commas"),
        (["--shape", "flat"], "'flat' is not one of"),
        (["--secret", "8"], "No such option"),
    ],
)
def test_a_wrong_value_is_a_usage_error(arguments: list[str], message: str) -> None:
    result = called(Cake, *arguments)

    assert result.exit_code == 2
    assert message in result.stderr


def test_some_options_may_be_taken_with_another_help() -> None:
    short = Annotated[Cake, Only("shape", "size", size="Layers.")]
    shown = called(short, "--sugar", "1"), called(short, "--size", "9")

    assert shown[0].exit_code == 2
    assert shown[1] == Cake(9)


def test_options_of_several_dataclasses_are_a_dictionary_of_those_given() -> None:
    annotation = Annotated[dict[str, Any], Given(Cake, PredictOptions)]

    assert called(annotation) == {}
    assert called(annotation, "-p", "0.5", "--sugar", "1") == {
        "participation": 0.5,
        "rates": (1.0,),
    }


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (AggregateOptions, {"target": "mystery"}, "--target: 'mystery' is out of range; .* vllm"),
        (AggregateOptions, {"split": None}, "--split: None is out of range; .* balanced, left"),
        (DiagnoseOptions, {"subject": "people"}, "--as: 'people' is out of range; .* clients, ro"),
        (DiagnoseOptions, {"jobs": -1}, "--jobs: -1 is out of range; it must be 0 or more"),
        (DistributeOptions, {"dtype": "int8"}, "--dtype: 'int8' is out of range"),
        (DistributeOptions, {"ranks": (2, 0)}, "--rank: 0 is out of range"),
        (InitOptions, {"ranks": (2, 0)}, "--ranks: 0 is out of range"),
        (InspectOptions, {"jobs": -1}, "--jobs: -1 is out of range"),
        (PredictOptions, {"participation": float("nan")}, "--participation: nan is out of range"),
    ],
)
def test_python_values_are_checked_like_those_of_the_command(
    kind: type, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**values)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aggregate", AggregateOptions),
        ("diagnose", DiagnoseOptions),
        ("distribute", DistributeOptions),
        ("init", InitOptions),
        ("inspect", InspectOptions),
        ("predict", PredictOptions),
    ],
)
def test_every_field_is_an_option_with_its_help(name: str, kind: type) -> None:
    shown = {parameter.name: parameter for parameter in load(name).params}
    specs = options_of(kind)

    assert [spec.name for spec in specs] == [each.name for each in fields(kind)]
    for spec in specs:
        assert shown[spec.name].help.startswith(spec.option.help)
        assert shown[spec.name].opts[0] == spec.option.flags[0].partition("/")[0]
