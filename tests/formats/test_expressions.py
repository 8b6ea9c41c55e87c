"""What a config costs before anything is matched: expressions are measured before they are
compiled, and names are not compiled at all.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedlora_cli import InputError
from fedlora_cli.formats.peft import keys as keys_file
from fedlora_cli.formats.peft import patterns
from fedlora_cli.formats.peft.expressions import compiled_size
from fedlora_cli.formats.peft.keys import Keys
from fedlora_cli.formats.peft.patterns import MAX_COMPILED, Matcher, Targets

HERE = Path("adapter_config.json")
NAME = "model.layers.11.self_attn.q_proj"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every expression that reaches the libraries."""
    seen: list[str] = []
    real = patterns._compiled
    monkeypatch.setattr(
        patterns, "_compiled", lambda pattern: (seen.append(pattern), real(pattern))[1]
    )
    return seen


@pytest.mark.parametrize(
    "pattern",
    [
        "[Ā-\uffff]" * 200,  # `re` lists 65 000 characters for each
        "(?i:" + "[^\\u0100-\\uffff]" * 200 + ")",
        "[\\N{LATIN SMALL LETTER A WITH MACRON}-\\U0010ffff]" * 200,
        "(" * 25 + "q" + ")+" * 25,  # `regex` writes it 2 ** 25 times
        "(?:" * 25 + "q" + ")+?" * 25,
        "(?:" * 12 + "q" + "){2}" * 12,
        "(?:" * 12 + "q" + "){2,}" * 12,
        "(?:" * 60 + "q" + ")" * 60,  # one library calls itself for each
        "(?#[)" + "(?:" * 25 + "q" + ")+" * 25 + "(?#])",
        "[)]" + "(?:[(]" * 18 + "q" + ")+" * 18,
        "[a-z]" * 8_000,
        "(?:[]+]q){3000}" * 3,
    ],
)
def test_what_would_be_long_to_compile_is_not_compiled(pattern: str, compiled: list[str]) -> None:
    matcher = Matcher(HERE)

    for _ in range(3):  # nor is it looked at again for the next module
        with pytest.raises(
            InputError, match=r"is not a usable regular expression .*(come to|nested)"
        ):
            matcher.match(pattern, NAME)

    assert compiled == []


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("|".join(rf"model\.layers\.{i}\.self_attn\.q_proj" for i in range(1800)), True),
        ("|".join(f"model.layers.{i}.self_attn.[kv]_proj" for i in range(1500)), False),
        (
            r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|"
            r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))",
            True,
        ),
        (r"^((?!lm_head|vision).)*(q|k)_proj$", True),
        (r"model\.layers\.(?:[0-9]|1[0-5])\.[^.]+\.(?:q|v)_proj", True),
        ("[^一-龥]+", True),
    ],
)
def test_honest_expressions_are_compiled(pattern: str, matches: bool) -> None:
    assert compiled_size(pattern) < MAX_COMPILED
    found = Matcher(HERE).match(rf"(?:{pattern})\Z", NAME)

    assert (found is not None) is matches is (re.fullmatch(pattern, NAME) is not None)


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_many_expressions_are_bounded_together(count: int, compiled: list[str]) -> None:
    """As many are compiled as fit, however many more there are."""
    keys = Keys.of(Matcher(HERE), [f"q{number}.*" for number in range(count)])

    with pytest.raises(InputError, match="expressions that come to more than 200000 characters"):
        keys.first(NAME)
    with pytest.raises(InputError, match="200000 characters together; write names, or fewer"):
        keys.first(NAME)

    assert len(compiled) == 3_192


def test_a_bad_expression_is_compiled_once_for_all_modules(compiled: list[str]) -> None:
    targets = Targets(Matcher(HERE), "(q", None, None, (), ())
    for number in range(5):
        with pytest.raises(InputError, match=r"is not a usable regular expression"):
            targets.match(f"layers.{number}.q")

    assert len(compiled) == 1


@pytest.mark.parametrize("count", [100, 10_000])
def test_names_are_looked_up_and_not_matched(
    count: int, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PEFT, people and fedlora write them; the work for one module does not grow with them."""
    calls: Counter[str] = Counter()
    real = keys_file._dotted
    monkeypatch.setattr(
        keys_file, "_dotted", lambda text, dots: (calls.update(["looked"]), real(text, dots))[1]
    )
    plain = [f"model.layers.{number:05}.q_proj" for number in range(count)]
    for written in (plain, [f"^{re.escape(one)}" for one in plain], [f"{one}$" for one in plain]):
        calls.clear()
        keys = Keys.of(Matcher(HERE), written)

        assert keys.first(plain[-1]) == written[-1]
        assert keys.first("model.layers.00001.v_proj") is None
        assert calls["looked"] <= 2

    assert compiled == []


name = st.lists(
    st.sampled_from(["model", "layers", "h", "0", "1", "12", "q", "q_proj", "x-y", "a_b"]),
    min_size=1,
    max_size=5,
).map(".".join)
key = st.one_of(
    name,
    name.map(lambda one: f"^{one}"),
    name.map(re.escape),
    name.map(lambda one: f"^{re.escape(one)}$"),
    name.map(lambda one: one.replace("_", ".")),
    st.sampled_from(
        [".*q", r"h\.\d+.q", "q|h", "x?", ".", "..", "^", "$", "a.", r"\.q", "layers.1"]
    ),
)


@settings(deadline=None)
@given(st.lists(key, max_size=6, unique=True), name)
@example(["layers.0", "^layers_0$", "layersx0"], "layersx0")
@example(["a.b", "a_b"], "h.a_b")
@example([".*q", "q"], "h.q")
@example(["q", ".*q"], "h.q")
@example([r"h\.q", "h.q"], "h_q")
@example(["q", "^q"], "h.q")
@example(["^q", "q"], "q")
def test_keys_count_as_in_peft(keys: list[str], module: str) -> None:
    found = Keys.of(Matcher(HERE), keys).first(module)

    assert (module if found is None else found) == get_pattern_key(keys, module)


def test_names_with_dots_at_ever_other_places_are_matched_beyond_a_bound() -> None:
    """Each way to place dots is looked at once for a module; names beyond are expressions."""
    places = [
        format(number, "011b").replace("0", "a").replace("1", ".") for number in range(1, 1200)
    ]
    keys = Keys.of(Matcher(HERE), places)

    assert sum(len(ways) for ways in keys.names.values()) == 1_000
    assert len(keys.expressions) == 199
    assert keys.first("h." + places[5]) == get_pattern_key(places, "h." + places[5])
