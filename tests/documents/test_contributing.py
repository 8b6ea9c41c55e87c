"""The guide for contributors names paths, commands and options that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / ".github/CONTRIBUTING.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_every_path_in_the_guide_exists() -> None:
    paths = re.findall(r"`((?:fedlora_cli|tests|\.ci|pyproject|CHANGELOG)[\w./]*)`", GUIDE)
    real = [path for path in paths if "NAME" not in path]

    assert len(real) >= 15
    assert [path for path in real if not (ROOT / path).exists()] == []


def test_the_set_up_installs_groups_and_extras_that_exist() -> None:
    [command] = re.findall(r"^python -m pip install .*", GUIDE, re.M)

    for extra in re.findall(r"\[(\w+)\]", command):
        assert f"\n{extra} = [" in PROJECT
    for group in re.findall(r"--group (\w+)", command):
        assert f"\n{group} = [" in PROJECT.partition("[dependency-groups]")[2]


def test_the_marks_in_the_guide_are_registered() -> None:
    for mark in re.findall(r"`-m (\w+)`", GUIDE):
        assert f'"{mark}: ' in PROJECT
