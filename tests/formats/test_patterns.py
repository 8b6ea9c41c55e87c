"""Module names are matched by PEFT's own rules, which PEFT itself is asked for here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from fedlora_cli import InputError
from fedlora_cli.formats.peft.keys import Keys
from fedlora_cli.formats.peft.patterns import Matcher, Targets

HERE = Path("adapter_config.json")

part = st.sampled_from(["model", "layers", "h", "0", "1", "12", "attn", "q", "q_proj", "experts"])
name = st.lists(part, min_size=1, max_size=6).map(".".join)
pattern = st.one_of(
    name,
    st.sampled_from(
        [".*q", r".*\.q_proj", r"model\..*", r"layers\.\d+.*", "^model.q", "q|h", "x?"]
    ),
    st.sampled_from(["(?i:Q_PROJ)", r".*(?i:\.Q)", "model|model.*q"]),
)
#: A flag at the start holds for a whole expression, and is an error within another one.
flagged = st.sampled_from([r"(?i).*\.Q(_PROJ)?", "(?i)MODEL.*", "(?s)(?i).*H.*", r"(?a)\w+\.q"])
names = st.lists(name, min_size=1, max_size=3)


@given(st.lists(pattern, max_size=4, unique=True), name)
@example(["q", "attn.q"], "h.attn.q")
@example(["^h.q"], "model.h.q")
def test_patterns_resolve_as_in_peft(patterns: list[str], module: str) -> None:
    expected = get_pattern_key(patterns, module)
    found = Keys.of(Matcher(HERE), patterns).first(module)

    assert (module if found is None else found) == expected


@given(
    module=name,
    target=st.one_of(names, pattern, flagged),
    exclude=st.none() | names | pattern | flagged,
    layers=st.none() | st.lists(st.integers(0, 12), min_size=1, max_size=2),
    layers_pattern=st.none() | st.lists(st.sampled_from(["layers", "h"]), max_size=2),
    saved=st.none() | names,
)
def test_targets_are_those_of_peft(module, target, exclude, layers, layers_pattern, saved) -> None:
    if isinstance(target, str) or layers is None:
        layers, layers_pattern = None, None  # PEFT refuses the combination
    config = LoraConfig(
        target_modules=target,
        exclude_modules=exclude,
        layers_to_transform=layers,
        layers_pattern=layers_pattern,
        modules_to_save=saved,
    )
    ours = Targets(
        matcher=Matcher(HERE),
        target=target if isinstance(target, str) else frozenset(target),
        exclude=exclude if exclude is None or isinstance(exclude, str) else frozenset(exclude),
        layers=tuple(layers) if layers else None,
        layers_pattern=tuple(layers_pattern or ()),
        saved=tuple(saved or ()),
    )

    found = check_target_module_exists(config, module)
    excluded = type(found).__name__ == "_ExcludedModule"
    assert ours.match(module) == (bool(found) and not excluded)


@pytest.mark.parametrize("own", ["(?i)Q_PROJ", "q_proj(?i)", "(?s).*q"])
def test_flags_within_another_expression_are_what_they_are_to_peft(own: str) -> None:
    """An error since Python 3.11, told in the words of the config."""
    try:
        expected = get_pattern_key([own], "h.q_proj") == own
    except re.error:
        cure = "PEFT puts it inside another expression: write .*"
        message = rf"^adapter_config.json: '{re.escape(own)}' is not a usable .*; {cure}"
        with pytest.raises(InputError, match=message):
            Keys.of(Matcher(HERE), [own]).first("h.q_proj")
        lists = Targets(Matcher(HERE), frozenset({"q_proj"}), None, (0,), (own,), ())
        saved = Targets(Matcher(HERE), "h.q_proj", None, None, (), (own,))
        for targets in (lists, saved):
            with pytest.raises(InputError, match=message):
                targets.match("h.q_proj")
    else:
        assert (Keys.of(Matcher(HERE), [own]).first("h.q_proj") == own) == expected


@pytest.mark.parametrize("own", ["(?i:Q_PROJ)", "(?i:h.)q_proj|x", r"(q|v)_proj"])
def test_flags_of_a_part_are_taken_within_another_expression(own: str) -> None:
    assert get_pattern_key([own], "h.q_proj") == own
    assert Keys.of(Matcher(HERE), [own]).first("h.q_proj") == own


@pytest.mark.parametrize("own", ["h.q)|(x", "h.q_proj(?#", "[[:alpha:].]*"])
def test_an_expression_means_what_it_means_alone(own: str) -> None:
    """It is no text to be put into another one, and no expression of another language."""
    with pytest.raises(InputError, match=f"{re.escape(repr(own))} is not a usable regular expr"):
        Targets(Matcher(HERE), own, None, None, (), ()).match("h.q_proj")


def test_the_first_pattern_of_layers_that_matches_decides() -> None:
    lists = Targets(Matcher(HERE), frozenset({"q"}), None, (1,), ("h|x", "h"), ())
    config = LoraConfig(target_modules=["q"], layers_to_transform=[1], layers_pattern=["h|x", "h"])

    assert bool(check_target_module_exists(config, "h.1.q")) is lists.match("h.1.q") is False


def test_expressions_that_do_not_end_are_stopped_all_together() -> None:
    """One limit for a whole file: many slow matches are no way around it."""
    matcher = Matcher(HERE, seconds_left=1.0)

    def many() -> None:
        for number in range(1000):
            matcher.match(f"(a|aa)+{number}", "a" * 26)

    with pytest.raises(InputError, match=r"take too long, .*; write them without nested repet"):
        many()

    with pytest.raises(InputError, match="take too long"):
        matcher.match("a", "a")  # what would end is not tried any more


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "(" * 3000 + "a" + ")" * 3000,
        "b+|(?R)",
        "a{99999999999999999999}",
        # Python refuses to make a number of so many digits.
        f"a{{{'9' * 5000}}}",
        f"a{{0,{'9' * 5000}}}",
    ],
)
def test_an_expression_that_cannot_be_used_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="is not a usable regular expression"):
        Matcher(HERE).match(f"({pattern})$", "layers.0.q_proj")


def test_an_expression_of_any_length_is_refused() -> None:
    with pytest.raises(InputError, match="an expression of 100001 characters"):
        Matcher(HERE).match("a" * 100_001, "a")


@pytest.mark.parametrize(
    "pattern",
    [
        "(((a{1000}){1000}){1000})",
        "a{4000000000}",
        "(?:[ab]{3000}){3000}",
        f"(?:{'a|' * 40_000}b){{3}}",
        "(?x:a{1 0 0 0 0 0 0 0 0})",
        "(?:aaaaaaaa){e<=8}",
    ],
)
def test_an_expression_is_not_written_out_at_any_length(pattern: str) -> None:
    """The library copies what stands under a count, into more memory than there is."""
    with pytest.raises(InputError, match="is not a usable regular expression"):
        Matcher(HERE).match(pattern, "layers.0.q_proj")


def test_many_quick_expressions_are_stopped_as_well() -> None:
    matcher = Matcher(HERE, seconds_left=0.05)

    with pytest.raises(InputError, match="take too long"):
        Keys.of(matcher, [f"q{n}.*" for n in range(100_000)]).first("layers.0.v_proj")
