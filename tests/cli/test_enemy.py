"""Names that speak to a terminal, to rich, to HTML or to Markdown: every output shows them as text.

The names of modules are restricted by the reader; those of clients, files and base models are not.
"""

from __future__ import annotations

import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from support.adapters import Spec, make
from support.cli import run
from support.damage import CONFIG, set_config
from typer.testing import Result

#: What a folder can be called: anything but a slash and NUL, in 255 bytes.
NAMES = (
    "[",
    "[red]",
    "[link=https:evil]x",
    "-rf",
    "a\x1b[2Jb",
    "a\x1b]8;;http:evil\x07b",
    "line\nbreak",
    "back\rward",
    "c1\x9b2J",
    "del\x7f",
    "sep\u2028arated",
    "\u202egnp.exe",
    "zero\u200bwidth",
    "<script>alert(1)<",
    "<img src=x onerror=alert(1)>",
    "a|b|c",
    "`rm -rf ~`",
    "![x](y)",
    "[click](javascript:alert(1))",
    "$\\frac{1}{0}$",
    "{{7*7}}{% x %}%s%n",
    "--- # *bold* __under__",
    "\"quoted'",
    "\N{SNOWMAN}" * 85,
)

#: What a config can say, and nobody may take for anything but text.
EVIL = "[/foo] </script><script>alert(1)</script> \x1b[2J\n---\n![x](http://evil) \u202e `|` $x_{$"


@pytest.fixture(scope="module")
def enemies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("[bold]<b>") / "round"
    for number, name in enumerate(NAMES):
        made = make(place, Spec(name, rank=1 + number % 3, shapes={"layers.0.q_proj": (6, 5)}))
        set_config(made.folder, base_model_name_or_path=EVIL, **{EVIL: 1})
    return place


def completed(*arguments: object, **environment: str) -> Result:
    result = run(*arguments, env=environment)
    assert result.exit_code in (0, 1), result.output
    return result


def is_harmless(text: str) -> bool:
    """Whether nothing in it is a control character, or turns the direction of writing."""
    return all(letter.isprintable() or letter == "\n" for letter in text)


class Tags(html.parser.HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.attributes |= {name for name, _ in attrs}


def check_page(path: Path) -> None:
    text, tags = path.read_text(), Tags()
    tags.feed(text)
    assert is_harmless(text)
    assert not tags.found & {"script", "img", "a", "iframe", "object", "b", "form"}
    assert not [name for name in tags.attributes if name.startswith("on")]


def check_picture(path: Path) -> None:
    text = path.read_text()
    assert is_harmless(text)
    for element in ET.fromstring(text).iter():
        assert element.tag.rpartition("}")[2] not in ("script", "a", "foreignObject")
        for name, value in element.attrib.items():
            assert not name.endswith("href") or value.startswith(("#", "data:image/png;"))


@pytest.mark.parametrize("command", ["inspect", "diagnose", "compare", "predict"])
def test_every_view_shows_names_as_text(enemies: Path, tmp_path: Path, command: str) -> None:
    page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
    detail = [] if command == "compare" else ["--verbose"]
    pictures = [] if command == "inspect" else ["--html", page, "--plot", plot]

    table = completed(command, enemies, *detail, *pictures)
    document = completed(command, enemies, "--json")

    assert is_harmless(table.output)
    assert is_harmless(document.stdout)
    json.loads(document.stdout)
    for shown in ("[red]", "a\\x1b[2Jb", "line\\nbreak", "\\u202egnp.exe"):
        assert shown in table.stdout or command in ("compare", "predict")
    if pictures:
        check_page(page)
        check_picture(plot)


def test_an_aggregation_shows_names_as_text(enemies: Path, tmp_path: Path) -> None:
    arguments = ("aggregate", enemies, "-o", tmp_path / "[red]\x1b[2J", "--base", EVIL)
    document = completed(*arguments, "--json", "--dry-run")
    table = completed(*arguments, "--verbose")

    assert is_harmless(table.output)
    assert is_harmless(document.output)
    assert "[red]\\x1b[2J" in table.stderr


@pytest.mark.parametrize("command", ["inspect", "diagnose"])
def test_on_a_terminal_with_colours_there_are_colours_and_no_more(
    enemies: Path, command: str
) -> None:
    output = completed(command, enemies, "-v", FORCE_COLOR="1", NO_COLOR="", TERM="xterm").output

    assert "\x1b[1m" in output
    assert is_harmless(re.sub(r"\x1b\[[0-9;]*m", "", output))


def test_the_card_and_the_report_hold_names_as_text(enemies: Path, tmp_path: Path) -> None:
    completed("aggregate", enemies, "-o", tmp_path / "out", "-q")
    written = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"]
    texts = {path.name: path.read_text() for path in written}

    for text in texts.values():
        assert is_harmless(text)
    card = texts["README.md"]
    front, body = card.split("\n---\n", 1)
    assert front.count("\n---") == 0
    code = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")  # is shown as it is
    assert not re.search(r"(?<!\\)[\[\]]|<", code.sub("", body))
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(NAMES)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert json.loads(texts[CONFIG])["base_model_name_or_path"] == EVIL


def test_adapters_are_handed_out_under_names_as_text(enemies: Path, tmp_path: Path) -> None:
    completed("aggregate", enemies, "-o", tmp_path / "out", "-q")
    handed = completed(
        "distribute", tmp_path / "out", "-o", tmp_path / "next", "--like", enemies, "-v"
    )

    assert is_harmless(handed.output)
    assert sorted(path.name for path in (tmp_path / "next").iterdir()) == sorted(NAMES)


def test_an_error_holds_names_as_text(tmp_path: Path) -> None:
    for name in NAMES:
        folder = make(tmp_path / "round", Spec(name, rank=2)).folder
        (folder / CONFIG).write_text(json.dumps({"peft_type": EVIL}))

    for command in (["inspect"], ["aggregate", "-o", str(tmp_path / "out")]):
        arguments = [*command, str(tmp_path / "round")]
        result = run(*arguments)
        assert result.exit_code in (1, 3)
        assert is_harmless(result.output)
        assert not (tmp_path / "out").exists()
