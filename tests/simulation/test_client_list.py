"""Files that list the clients with their rows: their forms, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora_cli.errors import InputError
from fedlora_cli.simulation.client_list import ClientList, in_order, read_client_list


def kept(folder: Path, text: str, name: str = "clients.json") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_three_forms_give_the_same_rows(tmp_path: Path) -> None:
    lines = "row,client\n4,site-10\n0,site-2\n3,ann\n2,site-2\n"
    lists = {"site-10": [4], "site-2": [0, 2], "ann": [3]}
    full = {name: {"rank": 2 * len(name), "rows": rows} for name, rows in lists.items()}
    files = [
        kept(tmp_path, lines, "clients.csv"),
        kept(tmp_path, "\ufeff" + lines.partition("\n")[2], "bare.csv"),
        kept(tmp_path, json.dumps(lists)),
        kept(tmp_path, json.dumps(full), "ranks.txt"),
    ]

    read = [read_client_list(file) for file in files]

    for one in read:
        assert list(one.rows.items()) == [("ann", (3,)), ("site-2", (0, 2)), ("site-10", (4,))]
        assert one.by_row(6) == ("site-2", "", "site-2", "ann", "site-10", "")
    assert [list(one.ranks.items()) for one in read] == [
        [], [], [], [("ann", 6), ("site-2", 12), ("site-10", 14)]
    ]  # fmt: skip


@given(st.lists(st.sampled_from(["ann", "bob", "eve", ""]), min_size=5, max_size=40))
def test_rows_and_clients_are_each_others_inverse(names: list[str]) -> None:
    rows = {
        name: tuple(k for k, other in enumerate(names) if other == name)
        for name in in_order(name for name in names if name)
    }

    assert ClientList("file", rows, {}).by_row(len(names)) == tuple(names)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "no clients; list two clients or more"),
        ({"ann": [0]}, "a single client; list two clients or more"),
        ({"ann": [0], "bob": []}, "no rows for bob; list whole numbers from 0 on"),
        ({"ann": [0], "bob": 3}, "the client bob has no list of rows; write"),
        ({"ann": [0], "bob": {"rank": 4}}, "the client bob has no list of rows; write"),
        ({"ann": {"rows": [0], "alpha": 3}, "bob": [1]}, "the client ann has alpha; write"),
        ({"ann": [0], "bob": [-1]}, "row -1 of bob; list whole numbers from 0 on"),
        ({"ann": [0], "bob": [True]}, "row True of bob"),
        ({"ann": [0], "bob": [1.0]}, "row 1.0 of bob"),
        ({"ann": [0], "bob": ["1"]}, "row '1' of bob"),
        ({"ann": {"rank": 0, "rows": [0]}, "bob": [1]}, "rank 0 of ann; give a whole number"),
        ({"ann": {"rank": "4", "rows": [0]}, "bob": [1]}, "rank '4' of ann"),
        (
            {"ann": {"rank": 4, "rows": [0]}, "bob": [1]},
            "no rank for bob, but for other clients; give every client a rank, or none",
        ),
        ({"ann": [0], "../bob": [1]}, "the client '../bob' cannot be the name of a folder"),
        ({"ann": [0], ".bob": [1]}, "the client '.bob' cannot be the name of a folder"),
        ({"ann": [0], "": [1]}, "the client '' cannot be the name of a folder"),
        ({"ann": [0], "bob ": [1]}, "the client 'bob ' cannot be the name of a folder"),
        ({"ann": [0], "b\nb": [1]}, "cannot be the name of a folder"),
        ({"ann": [0], "é" * 101: [1]}, "cannot be the name of a folder"),
        ({"Zoë": [0], "zoe\u0308": [1]}, "differ only in case or spelling of letters"),
    ],
)
def test_wrong_lists_are_one_line(document: Any, message: str, tmp_path: Path) -> None:
    file = kept(tmp_path, json.dumps(document))

    with pytest.raises(InputError, match=r"clients\.json: ") as caught:
        read_client_list(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("client,row\nann,0\nbob,1\n", r"line 1 is 'client,row'; write lines `row,client`"),
        ("0,ann\n1\n", r"line 2 is '1'; write lines"),
        ("0,ann\n1,\n", r"line 2 is '1,'; write lines"),
        ("0,ann\n-1,bob\n", r"line 2 is '-1,bob'"),
        ("0,ann\n1.0,bob\n", r"line 2 is '1.0,bob'"),
        ("0,ann,4\n1,bob,4\n", r"line 1 is '0,ann,4'"),
        ('0,"ann\n', r"not CSV"),
        ("0,ann\n1,ann\n", r"a single client; list two"),
        ("", r"no clients; list two"),
    ],
)
def test_wrong_lines_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_client_list(kept(tmp_path, text, "clients.csv"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot be read \(no such file"):
        read_client_list(str(tmp_path / "none.csv"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"ann": (0, 1), "bob": (2, 5)}, "row 5 of bob, but the training split has 5 rows"),
        ({"ann": (0, 1), "bob": (10**30,)}, "but the training split has 5 rows; count the rows"),
        ({"ann": (0, 1), "bob": (1, 2)}, "row 1 is listed for ann, and again for bob"),
        ({"ann": (0, 0), "bob": (1, 2)}, "row 0 is listed for ann, and again for ann"),
    ],
)
def test_rows_that_do_not_exist_or_exist_once_are_refused(
    rows: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ClientList("clients.json", rows, {}).by_row(5)
