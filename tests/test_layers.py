"""Imports point strictly down the layers that the README draws."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedlora_cli"


def drawn_layers() -> dict[str, int]:
    """The README's layers: name of a module or package to its line, counted from the top."""
    block = re.search(r"<!-- layers -->\n```text\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    layers: dict[str, int] = {}
    for number, line in enumerate(block[1].splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0]
        for name in names.split(" | "):
            assert name not in layers, f"{name} has two layers"
            layers[name] = number
    return layers


def module_name(path: Path) -> str:
    """The name that the drawing uses: `aggregation.plan`, `rounds` for its __init__, `__init__`."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def home(module: str, layers: dict[str, int]) -> str:
    """The longest drawn name that the module stands under."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in layers:
            return ".".join(parts[:end])
    raise AssertionError(f"{module} has no layer in the README")


def imports(path: Path) -> set[str]:
    """Every module of the package that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "fedlora_cli":
                inside = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                found.add(next((one for one in inside if one in MODULES), "__init__"))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_below_it(module: str) -> None:
    layers = drawn_layers()
    own = home(module, layers)
    for target in imports(MODULES[module]):
        other = home(target, layers)
        inside = own == other and own == module and target != module  # a package and its members
        assert inside or layers[own] < layers[other], f"{module} may not import {target}"


def test_every_drawn_name_exists() -> None:
    assert set(drawn_layers()) <= set(MODULES)


def test_the_drawing_would_notice_an_upward_and_a_sideways_import() -> None:
    layers = drawn_layers()

    assert layers["aggregation.plan"] < layers["cohort"]
    assert layers["formats"] == layers["methods"]
    assert home("methods.raflora", layers) == home("methods.flexlora", layers) == "methods"
