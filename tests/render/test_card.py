"""The model card as others render it: front matter that is YAML, and text that stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from support.adapters import Spec, make

from fedlora_cli import AggregateOptions, aggregate
from fedlora_cli.clients.reading import LeftOut
from fedlora_cli.reports.aggregate import AggregateReport
from fedlora_cli.reports.model_card import model_card
from fedlora_cli.text import printable

#: What renderers make more of than text: GitHub in the rendered page, others as they parse.
HOSTILE = [
    *("@octocat", "@org/team", "#1", "GH-1", "org/repo#1", "deadbeef", "a" * 40, "1234567"),
    *(":smile:", "www.example.com", "http://example.com", "https://e.x/?a=b&c", "ftp://e.x"),
    *("ann@example.com", "mailto:ann@example.com", "xmpp:a@b.c", "example.com", "README.md"),
    *("1.2.3.4", "//e.x", "*a*", "_a_", "__a__", "**a**", "~~a~~", "~a~", "==a==", "^a^"),
    *("$a$", "$`a`$", "$$a$$", "[a](http://e.x)", "![a](http://e.x/p.png)", "[a]: http://e.x"),
    *("[^1]", "[[a]]", "<http://e.x>", "<b>a</b>", "<img src=x onerror=alert(1)>", "<!--"),
    *("&lt;", "&#64;a", "<a@b.c>", "</td>", "a|b", r"a\|b", r"a\\|b", "|", "a\\", "\\"),
    *("`", "``", "`a`", "a``b`c", "`|`", "```", "(c)", "--", "...", '"a"', "# a", "- a", "1. a"),
    *("> a", "---", "a  b", " a", "a ", "\n# a", "\u202ea", "\N{GRINNING FACE}", "\u00a0"),
    *("\N{VARIATION SELECTOR-16}", "\u2028", "\u0085", "\x7f", "zo\u00eb", "\u5f20\u4e09"),
]

#: What would be linked, or drawn, in text that is no code.
MORE = re.compile(
    r"@\w|#\w|\bGH-\d|:\w+:|www\.|//|\w\.(?!json\b|safetensors\b|\d)\w|\b[0-9a-f]{7,40}\b|[*_~=^$]{1}"
    r"|--|\((?:c|r|tm|p)\)|\.\.",
    re.I,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> AggregateReport:
    folder = tmp_path_factory.mktemp("card")
    make(folder / "round", Spec("a", rank=2, samples=1))
    return aggregate(folder / "round", folder / "out", AggregateOptions(dry_run=True))


def card_of(report: AggregateReport, text: str) -> tuple[str, str]:
    """The front matter, and the rest, of a card in which the text stands wherever it can."""
    report = replace(
        report,
        base_model=text,
        clients=(replace(report.clients[0], name=text),),
        left_out=(LeftOut(text, text, text),),
        warnings=(text, f"tensors of {text} alone"),
    )
    _, front, rest = model_card(report).split("---\n", 2)
    return front, rest


def leaves(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        if token.children is None:
            yield token
        else:
            yield from leaves(token.children)


def shown(tokens: list[Token]) -> str:
    return "".join(one.content for one in leaves(tokens) if one.type in ("text", "code_inline"))


#: What a card is made of.
KNOWN = {"inline", "fence", "text", "code_inline", "softbreak"} | {
    f"{name}_{end}"
    for name in [
        "heading",
        "paragraph",
        "bullet_list",
        "list_item",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ]
    for end in ("open", "close")
}


def check(report: AggregateReport, text: str, renderer: MarkdownIt) -> None:
    """The text is shown as it is, but for the width of spaces, and as nothing else."""
    front, rest = card_of(report, text)
    known = yaml.safe_load(front)
    assert known["base_model"] == text
    assert known["tags"][0] == f"base_model:adapter:{text}"

    tokens = renderer.parse(rest)
    assert {one.type for one in leaves(tokens)} <= KNOWN, rest
    harmless = renderer.parse(card_of(report, "ann")[1])
    assert [one.type for one in tokens] == [one.type for one in harmless]
    for one in leaves(tokens):
        assert one.type != "text" or not MORE.search(one.content.replace("--method", ""))
    said = [" ".join(shown([one]).split()) for one in tokens if one.type == "inline"]
    words = printable(text)
    in_line = f"left out: {words}: {words} warning: {words} warning: tensors of {words} alone"
    assert " ".join(in_line.split()) in " ".join(said)
    in_cell = " ".join(re.sub(r"\\\|", r"\\\\x7c", words).split())
    assert in_cell in said[said.index("sha256") :]


#: Where it is installed, what finds addresses that nobody marked.
LINKIFY = ["linkify"] if find_spec("linkify_it") else []


@pytest.fixture(params=["gfm", *LINKIFY])
def renderer(request: pytest.FixtureRequest) -> MarkdownIt:
    """What GitHub reads; and the same with addresses that nobody marked, as other pages do it."""
    if request.param == "gfm":
        return MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return MarkdownIt("gfm-like", {"typographer": True}).enable(["replacements", "smartquotes"])


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_client_is_shown_as_more_than_text(
    report: AggregateReport, renderer: MarkdownIt, text: str
) -> None:
    check(report, text, renderer)
    check(report, f"x{text} {text}y", renderer)


pieces = st.one_of(
    st.sampled_from(HOSTILE), st.text(max_size=3), st.sampled_from("`*_|\\@#:<>[]()! ")
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(pieces, min_size=1, max_size=6))
def test_neither_is_any_mixture_of_it(report: AggregateReport, parts: list[str]) -> None:
    text = "".join(parts).encode("utf-8", "ignore").decode()
    assume(text)
    check(report, text, MarkdownIt("commonmark").enable(["table", "strikethrough"]))
