"""`fedlora inspect`: what is in adapters, how they differ, and all faults at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import PREFIX, Spec, make
from support.cli import on_a_terminal, run
from support.corpus import CORPUS
from support.damage import CONFIG, WEIGHTS, Q, header, set_config, set_tensors, with_value

ROOT = Path(__file__).parents[2]
V = f"{PREFIX}layers.0.v_proj"

#: Faults that only the values show, not the headers.
IN_VALUES = {fault for fault in CORPUS if fault.startswith("values: ")}


#: Cases that are wrong in both modules, or in two ways.
MORE_FAULTS = {
    "config: rank not as in the config": 2,
    "config: an expression that takes Python's matcher for ever": 2,
    "factors: no LoRA at all": 2,
}


def lines(*arguments: object) -> list[str]:
    """The faults that `inspect` prints, each one once, in exit code 3."""
    result = run("inspect", *map(str, arguments))
    assert result.exit_code == 3, result.output
    found = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(set(found)) == len(found)
    assert "Traceback" not in result.output
    return found


def document(*arguments: object) -> dict[str, Any]:
    result = run("inspect", *map(str, arguments), "--json")
    found: dict[str, Any] = json.loads(result.stdout, parse_constant=pytest.fail)
    assert (result.exit_code == 3) == bool(found["faults"])
    return found


def refusal(*arguments: object) -> str:
    """The one line with which `aggregate` refuses."""
    out = Path(str(arguments[0])).parent / "out"
    result = run("aggregate", *map(str, arguments), "-o", str(out))
    assert result.exit_code == 3, result.output
    return result.stderr.splitlines()[-1]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    for name, rank, samples in (("ann", 2, 30), ("bob", 6, 10)):
        make(tmp_path / "round", Spec(name, rank=rank, samples=samples, alpha=2 * rank))
    return tmp_path / "round"


@pytest.fixture
def globally(cohort: Path, tmp_path: Path) -> Path:
    assert run("aggregate", str(cohort), "-o", str(tmp_path / "global")).exit_code == 0
    return tmp_path / "global"


@pytest.mark.parametrize("fault", CORPUS)
def test_where_aggregate_refuses_inspect_finds_that_very_fault_and_no_consequence(
    tmp_path: Path, fault: str
) -> None:
    for name in ("good", "bad"):
        make(tmp_path / "round", Spec(name, rank=3, samples=10))
    CORPUS[fault][0](tmp_path / "round/bad")
    values = ["--values"] if fault in IN_VALUES else []

    found = lines(tmp_path / "round", *values)

    assert refusal(tmp_path / "round") in found
    assert len(found) == MORE_FAULTS.get(fault, 1), found


@pytest.mark.parametrize(("one", "other"), list(pairwise(CORPUS)))
def test_what_aggregate_says_of_two_bad_clients_is_among_the_faults_of_both(
    tmp_path: Path, one: str, other: str
) -> None:
    for name in ("good", "bad", "worse"):
        make(tmp_path / "round", Spec(name, rank=3, samples=10))
    CORPUS[one][0](tmp_path / "round/bad")
    CORPUS[other][0](tmp_path / "round/worse")

    found = lines(tmp_path / "round", "--values")

    assert refusal(tmp_path / "round") in found
    assert len(found) >= 2


@pytest.mark.parametrize("fault", sorted(IN_VALUES))
def test_headers_alone_do_not_show_what_is_in_the_values(tmp_path: Path, fault: str) -> None:
    made = make(tmp_path, Spec("bad", rank=3))
    CORPUS[fault][0](made.folder)

    assert run("inspect", str(made.folder)).exit_code == 0
    assert run("inspect", str(made.folder), "--values").exit_code == 3


def test_all_faults_of_an_adapter_are_found_at_once(tmp_path: Path) -> None:
    """Config fields, a header entry, modules and other tensors, each on its own."""
    shapes = {f"layers.{i}.q_proj": (12, 20) for i in range(4)}
    bad = make(tmp_path, Spec("bad", rank=3, shapes=shapes)).folder

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{PREFIX}layers.0.q_proj.lora_A.weight"] = torch.ones(4, 20)
        tensors[f"{PREFIX}layers.1.q_proj.lora_A.weight"] = torch.ones(3, 20, dtype=torch.int32)
        tensors[f"{PREFIX}layers.1.q_proj.lora_B.weight"] = torch.ones(12, 3, dtype=torch.int32)
        tensors[f"{PREFIX}layers.2.q_proj.lora_A.weight"] = torch.ones(5, 20)
        tensors[f"{PREFIX}layers.2.q_proj.lora_B.weight"] = torch.ones(12, 5)
        tensors[f"{PREFIX}extra.weight"] = torch.ones(2)

    set_tensors(bad, damage)
    header(lambda h: h[f"{PREFIX}layers.3.q_proj.lora_A.weight"].update(dtype="F8_E4M3"))(bad)
    set_config(bad, lora_alpha=-1, use_rslora="no", task_type="EVIL", use_qalora=True)
    (bad / "fedlora.json").write_text('{"samples": -5}')

    found = "\n".join(lines(bad))

    for expected in (
        "layers.0.q_proj: lora_A [4, 20] and lora_B [12, 3] differ in rank",
        "layers.1.q_proj.lora_A.weight has dtype int32",
        "layers.1.q_proj.lora_B.weight has dtype int32",
        "layers.2.q_proj has rank 5, but adapter_config.json gives it 3",
        "layers.3.q_proj.lora_A.weight has dtype F8_E4M3",
        "lora_alpha is -1",
        "use_rslora is 'no'",
        "task_type is 'EVIL'",
        "use_qalora: QALoRA",
        "samples: -5 samples",
    ):
        assert found.count(expected) == 1, expected
    # The strange tensor may belong to QALoRA, the missing half of layer 3 is the one of dtype F8.
    assert len(found.splitlines()) == 10


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / CONFIG).unlink(), ["cannot be read (no such", "lora_B but no lora_A"]),
        (lambda f: set_config(f, peft_type="IA3"), ["peft_type is 'IA3'", "lora_B but no lora_A"]),
        (lambda f: set_config(f, r=0), ["r is 0", "lora_B but no lora_A"]),
        (
            lambda f: (set_config(f, r=0), (f / WEIGHTS).write_bytes(b"")),
            ["r is 0", "only 0 bytes long"],
        ),
        (
            lambda f: (set_config(f, r=0), (f / WEIGHTS).rename(f / "adapter_model.bin")),
            ["a pickle, which is never opened", "r is 0"],
        ),
        (
            lambda f: set_config(f, target_modules="(a|aa)+!" + "q" * 100_000),
            ["lora_B but no lora_A", "an expression of 1000"],
        ),
    ],
)
def test_what_cannot_be_read_hides_neither_the_faults_of_the_rest_nor_adds_its_own(
    tmp_path: Path, damage, expected
) -> None:
    bad = make(tmp_path, Spec("bad", rank=3)).folder
    set_tensors(bad, lambda tensors: tensors.pop(f"{Q}.lora_A.weight"))
    damage(bad)

    found = lines(bad)

    assert len(found) == len(expected)
    for line, text in zip(found, expected, strict=True):
        assert text in line


def test_a_cohort_of_which_nothing_can_be_read_is_shown(tmp_path: Path) -> None:
    for name in ("ann", "bob"):
        (make(tmp_path / "round", Spec(name, 2)).folder / WEIGHTS).write_bytes(b"")
    done = run("inspect", str(tmp_path / "round"))
    assert done.exit_code == 3
    assert done.stdout.startswith("2 adapters: no module could be read\n")


def test_all_faults_of_a_cohort_are_found_at_once(tmp_path: Path) -> None:
    place = tmp_path / "round"
    make(place, Spec("a", rank=2, config={"revision": "one"}))
    make(place, Spec("b", rank=2, config={"base_model_name_or_path": "other"}, samples=None))
    fields = {"base_model_name_or_path": "third", "revision": "two", "task_type": "CAUSAL_LM"}
    make(place, Spec("c", rank=2, config=fields, shapes={"layers.0.q_proj": (12, 99)}))
    make(place, Spec("d", rank=2, config={"task_type": "SEQ_CLS", "r": 9}))
    make(tmp_path / "twin", Spec("d", rank=2))
    (place / "e").mkdir()
    (place / "e/fedlora.json").write_text('{"samples": 3}')
    (place / "f").symlink_to("gone")
    (place / "g").symlink_to("a")
    (tmp_path / "empty").mkdir()

    found = lines(place, tmp_path / "twin", tmp_path / "empty", tmp_path / "nowhere")

    expected = [
        "f: a broken link",
        "e: a client's sample count, but no adapter",
        "empty: no adapters in it",
        "nowhere: cannot be read (no such",
        "g: the same folder as",
        "layers.0.q_proj has rank 2, but adapter_config.json gives it 9",
        "layers.0.v_proj has rank 2, but adapter_config.json gives it 9",
        "no sample count for b, while other clients have one",
        "a client named d, like",
        "layers.0.q_proj is linear 12 x 99, but linear 12 x 20",
        "b: its base model is other, but tiny/base",
        "c: its base model is third, but tiny/base",
        "c: its revision is two, but one",
        "d: its task type is SEQ_CLS, but CAUSAL_LM",
    ]
    for text in expected:
        assert sum(text in line for line in found) == 1, text
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("ann,x\nbob,1,2\nann,1\nann,2\nzoe,1", ["'x'", "3 columns", "names ann again", "for zoe"]),
        ('{"ann": -1, "bob": true, "zoe": 1}', ["ann: -1", "bob: True", "for zoe"]),
        ('{"zoe": 1, "yan": 2}', ["for yan", "for zoe", "no count for ann", "no count for bob"]),
        ("{", ["not valid JSON"]),
    ],
)
def test_all_faults_of_the_sample_counts_are_found(
    cohort: Path, tmp_path: Path, content: str, expected: list[str]
) -> None:
    (tmp_path / "counts").write_text(content)

    found = lines(cohort, "--samples", tmp_path / "counts")

    if expected[-1].startswith("no count"):  # only where every count is one
        assert [text in line for text, line in zip(expected[:2], found, strict=False)]
        expected = expected[:2]
    assert len(found) == len(expected)
    for line, text in zip(found, expected, strict=True):
        assert text in line


def test_a_refused_client_is_not_said_to_be_no_client(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text('{"ann": 1, "bob": 2, "gone": 3}')
    (cohort / "gone").symlink_to("nothing")

    found = lines(cohort, "--samples", tmp_path / "counts.json")

    assert len(found) == 1
    assert "a broken link" in found[0]


def test_what_aggregate_takes_has_no_fault(cohort: Path) -> None:
    result = run("inspect", str(cohort), "--values")

    assert run("aggregate", str(cohort), "-o", str(cohort.parent / "out")).exit_code == 0
    assert (result.exit_code, result.stderr) == (0, "")
    assert "no faults: every tensor is finite" in result.stdout


def test_the_sample_round_has_no_fault() -> None:
    found = document(ROOT / "samples/round-01", "--values")

    assert found["faults"] == []
    assert [one["samples"] for one in found["adapters"]] == [157, 53, 245, 108, 239, 54, 67, 154]
    assert [one["what"] for one in found["differences"]] == ["rank"]


def test_a_declared_base_and_counts_settle_what_they_settle_for_aggregate(tmp_path: Path) -> None:
    for name in "ab":
        fields = {"base_model_name_or_path": f"/home/{name}/llama"}
        make(tmp_path / "round", Spec(name, rank=2, config=fields, samples=None))
    (tmp_path / "counts.csv").write_text("a,1\nb,2\n")

    assert len(lines(tmp_path / "round")) == 1
    counted = ("--base", "meta/llama", "--samples", tmp_path / "counts.csv")
    found = document(tmp_path / "round", *counted)
    assert found["faults"] == []
    assert [one["samples"] for one in found["adapters"]] == [1, 2]


def test_one_wrong_count_does_not_hide_the_others(cohort: Path) -> None:
    (cohort / "bob/fedlora.json").write_text('{"samples": "many"}')

    found = document(cohort)

    assert [one["samples"] for one in found["adapters"]] == [30, None]
    assert len(found["faults"]) == 1


def test_an_adapter_is_described(tmp_path: Path) -> None:
    spec = Spec(
        "one",
        rank=4,
        samples=12,
        alpha=6,
        rslora=True,
        ranks={"layers.1.q_proj": 2},
        shapes={"layers.0.q_proj": (12, 20), "layers.1.q_proj": (12, 20), "up_proj": (30, 12)},
        tensors={"score.weight": torch.ones(3, 4)},
        config={"modules_to_save": ["score"], "task_type": "SEQ_CLS", "revision": "v1"},
        dtype=torch.bfloat16,
    )
    folder = make(tmp_path, spec).folder

    (adapter,) = document(folder)["adapters"]

    assert adapter["name"], adapter["path"] == ("one", str(folder))
    facts = ("base_model", "revision", "task_type", "rslora", "rank", "samples", "origin")
    expected = ["tiny/base", "v1", "SEQ_CLS", True, 4, 12.0, None]
    assert [adapter[name] for name in facts] == expected
    assert adapter["parameters"] == 4 * 32 + 2 * 32 + 4 * 42 + 12
    assert adapter["bytes"] == (folder / WEIGHTS).stat().st_size
    groups = [(g["target"], g["shape"], g["rank"], g["alpha"]) for g in adapter["modules"]]
    assert groups == [
        ("q_proj", [12, 20], 4, 6),
        ("q_proj", [12, 20], 2, 6),
        ("up_proj", [30, 12], 4, 6),
    ]
    assert [g["scale"] for g in adapter["modules"]] == pytest.approx([3, 6 / 2**0.5, 3])
    assert {g["dtype"] for g in adapter["modules"]} == {"bfloat16"}
    assert [g["names"] for g in adapter["modules"]][1] == ["layers.1.q_proj"]
    tensor = {"name": "score.weight", "shape": [3, 4], "dtype": "float32"}
    tensor |= {"role": "saved", "owner": "score"}
    assert adapter["tensors"] == [tensor]
    shown = run("inspect", str(folder)).stdout
    for text in ("v1", "SEQ_CLS", "rsLoRA", "4.24264", "bfloat16", "score.weight", "saved in full"):
        assert text in shown


def test_the_alpha_of_a_module_is_that_of_its_pattern(tmp_path: Path) -> None:
    folder = make(tmp_path, Spec("one", rank=4, alphas={"layers.0.q_proj": 20})).folder

    groups = document(folder)["adapters"][0]["modules"]

    assert [(g["alpha"], g["scale"]) for g in groups] == [(20, 5), (8, 2)]


def test_what_a_broken_config_does_not_tell_is_null_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = make(tmp_path, Spec("one", rank=4)).folder
    (folder / CONFIG).write_text("{")

    groups = document(folder)["adapters"][0]["modules"]

    assert [(g["shape"], g["rank"], g["alpha"]) for g in groups] == [
        ([12, 20], 4, None),
        ([7, 20], 4, None),
    ]


def test_differences_name_every_value_and_who_has_it(tmp_path: Path) -> None:
    place = tmp_path / "round"
    make(place, Spec("a", rank=16, alpha=16))
    make(place, Spec("b", rank=4, alpha=16, rslora=True, dtype=torch.float16))
    shapes = {"layers.0.q_proj": (12, 20)}
    make(place, Spec("c", rank=4, alpha=4, shapes=shapes, config={"lora_dropout": 0.1}))

    found = {one["what"]: one["values"] for one in document(place)["differences"]}

    assert found == {
        "rank": [["4", ["b", "c"]], ["16", ["a"]]],
        "scaling": [["1", ["a", "c"]], ["8", ["b"]]],
        "rsLoRA": [["no", ["a", "c"]], ["yes", ["b"]]],
        "dtype": [["float16", ["b"]], ["float32", ["a", "c"]]],
        "target modules": [["q_proj", ["c"]], ["q_proj, v_proj", ["a", "b"]]],
        "dropout": [["0", ["a", "b"]], ["0.1", ["c"]]],
        "modules": [["2", ["a", "b"]], ["1, without layers.0.v_proj", ["c"]]],
    }


def test_what_is_not_known_differs_as_a_dash(cohort: Path) -> None:
    set_config(cohort / "bob", lora_alpha=0)

    found = {one["what"]: one["values"] for one in document(cohort)["differences"]}

    assert found["scaling"] == [["2", ["ann"]], ["-", ["bob"]]]


def test_clients_that_are_alike_differ_in_nothing(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))

    assert document(tmp_path / "round")["differences"] == []
    assert (
        "the configs and headers of the adapters agree"
        in run("inspect", str(tmp_path / "round")).stdout
    )


def test_a_global_adapter_tells_how_it_came_about(globally: Path) -> None:
    """By the report beside it, and by its own metadata when the weights travel alone."""
    origin = {"method": "raflora", "clients": 2, "shared_rank": 2}

    (told,) = document(globally)["adapters"]
    (globally / "fedlora.json").unlink()
    (remembered,) = document(globally)["adapters"]

    assert told["origin"] == remembered["origin"]
    assert told["origin"].items() >= origin.items()
    shown = run("inspect", str(globally)).stdout
    assert "raflora of 2 clients, shared rank 2" in shown


def test_a_damaged_report_of_a_global_adapter_is_a_fault(globally: Path) -> None:
    (globally / "fedlora.json").write_text('{"schema": "fedlora.aggregate/1", "method": 7}')

    (fault,) = lines(globally)

    assert "fedlora.json" in fault


@pytest.mark.parametrize("metadata", ["", "[", "7", '{"method": 7}', '{"clients": 1}', '"\x1b"'])
def test_damaged_metadata_says_nothing(tmp_path: Path, metadata: str) -> None:
    folder = make(tmp_path, Spec("one", rank=2)).folder
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"fedlora": metadata})

    found = document(folder)

    assert found["faults"] == []
    assert found["adapters"][0]["origin"] is None


def test_a_global_adapter_among_clients_is_refused_and_stands_apart(
    cohort: Path, globally: Path
) -> None:
    """It is no client, so its base model is nobody else's fault."""
    set_config(globally, base_model_name_or_path="other")

    found = lines(cohort, globally)

    assert found == [refusal(cohort, globally)]
    assert "a global adapter that fedlora wrote, not a client" in found[0]
    adapters = document(cohort, globally)["adapters"]
    assert [(one["name"], bool(one["origin"])) for one in adapters] == [
        ("ann", False),
        ("bob", False),
        ("global", True),
    ]


def test_with_a_file_of_counts_a_global_adapter_is_a_client_like_any(
    cohort: Path, globally: Path, tmp_path: Path
) -> None:
    (tmp_path / "counts.csv").write_text("ann,1\nbob,2\nglobal,3\n")
    counted = (cohort, globally, "--samples", tmp_path / "counts.csv")

    found = document(*counted)
    assert found["faults"] == []
    assert found["notes"] == ["fedlora wrote global; aggregate would count it as a client"]
    assert run("aggregate", *map(str, counted), "-o", str(tmp_path / "o")).exit_code == 0
    set_config(globally, base_model_name_or_path="other")
    assert lines(*counted) == [refusal(*counted)]


def test_rounds_of_global_adapters_need_not_fit_each_other(globally: Path, tmp_path: Path) -> None:
    shutil.copytree(globally, tmp_path / "2/global")
    set_config(tmp_path / "2/global", base_model_name_or_path="other")

    found = document(globally, tmp_path / "2/global")

    assert [fault["where"] for fault in found["faults"]] == [str(tmp_path / "2/global" / CONFIG)]
    assert "its SHA-256 differs from the one in fedlora.json" in found["faults"][0]["found"]
    one, two = str(globally), str(tmp_path / "2/global")
    assert found["differences"] == [
        {"what": "base model", "values": [["other", [two]], ["tiny/base", [one]]]}
    ]


def test_values_names_every_tensor_that_is_not_finite(tmp_path: Path) -> None:
    tensors = {"score.weight": torch.full((3, 4), torch.inf)}
    fields = {"modules_to_save": ["score"]}
    folder = make(tmp_path, Spec("bad", rank=3, tensors=tensors, config=fields)).folder
    with_value(float("nan"))(folder)
    set_tensors(folder, lambda tensors: tensors[f"{Q}.lora_B.weight"].fill_(torch.nan))

    assert document(folder)["faults"] == []
    found = lines(folder, "--values", "-j", "2")
    expected = [
        f"{Q}.lora_B.weight holds 36 NaN or infinite values",
        f"{Q}.lora_A.weight holds 1 NaN or infinite values, the first at position 22",
        f"{PREFIX}score.weight holds 12 NaN or infinite values",
    ]
    assert len(found) == len(expected)
    for line, text in zip(found, expected, strict=True):
        assert text in line


def test_values_finds_base_weights_that_differ_as_aggregate_does(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        tensors = {"lm_head.weight": torch.full((5, 4), float(value))}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    assert document(tmp_path / "round")["faults"] == []
    found = lines(tmp_path / "round", "--values")
    aggregated = run("aggregate", str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    assert found == aggregated.stderr.splitlines()


def test_factors_that_are_all_zero_are_noted(tmp_path: Path) -> None:
    folder = make(tmp_path, Spec("fresh", rank=2)).folder
    set_tensors(folder, lambda tensors: tensors[f"{V}.lora_B.weight"].zero_())

    (adapter,) = document(folder, "--values")["adapters"]

    assert adapter["notes"] == ["1 of its factors are all zero: untrained or padded"]
    assert document(folder)["adapters"][0]["notes"] == []


def test_the_document_has_stable_keys(cohort: Path) -> None:
    found = document(cohort)

    assert found["schema"] == "fedlora.inspect/1"
    assert set(found) == {
        "schema", "adapters", "differences", "faults", "notes", "values", "version"
    }  # fmt: skip
    (cohort / "ann" / CONFIG).unlink()
    (fault,) = document(cohort)["faults"]
    assert set(fault) == {"where", "found", "cure"}
    assert fault["where"] == f"{cohort}/ann/{CONFIG}"


@pytest.mark.parametrize("flags", [[], ["--verbose"]])
def test_it_fits_into_80_columns_without_escape_codes(tmp_path: Path, flags: list[str]) -> None:
    long = "model.vision_tower.encoder.layers.11.self_attention.q_proj"
    fields = {"base_model_name_or_path": "/home/someone/" + "x" * 100}
    for name in ("hospital-of-the-holy-ghost-in-the-north-east", "b\x1b[2J[bold]"):
        shapes = {long + str(len(name)): (12, 20), long: (len(name), 20)}
        make(tmp_path / "round", Spec(name, rank=len(name), shapes=shapes, config=fields))

    result = run("inspect", str(tmp_path / "round"), *flags)

    assert "b\\x1b[2J[bold]" in result.stdout
    assert "\x1b" not in result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert (f"{long}12" in result.stdout.replace("…", "")) is False
    assert ("alpha" in result.stdout) == bool(flags)


def test_verbose_shows_every_module(tmp_path: Path) -> None:
    folder = make(tmp_path, Spec("one", rank=2)).folder

    assert "layers.0.v_proj" not in run("inspect", str(folder)).stdout
    assert "layers.0.v_proj" in run("inspect", str(folder), "-v").stdout


def test_quiet_says_nothing_but_errors(cohort: Path) -> None:
    assert run("inspect", str(cohort), "-q").output == ""
    set_config(cohort / "ann", r=0)
    result = run("inspect", str(cohort), "-q")
    assert (result.exit_code, result.stdout) == (3, "")
    assert len(result.stderr.splitlines()) == 1


def test_a_list_may_come_on_stdin(cohort: Path) -> None:
    result = run("inspect", "-", "-0", stdin=f"{cohort}/ann\0{cohort}/bob\0")

    assert result.exit_code == 0
    assert "2 adapters" in result.stdout
    assert run("inspect", "-", stdin="").exit_code == 2


def test_a_folder_left_out_is_told(cohort: Path) -> None:
    (cohort / "logs").mkdir()

    assert "note: logs left out: no adapter in it" in run("inspect", str(cohort)).stderr


def test_on_a_terminal_it_says_what_next(cohort: Path, globally: Path) -> None:
    shown = on_a_terminal(cohort.parent, ["inspect", "round"])
    assert "fedlora aggregate round -o global" in shown
    assert "fedlora diagnose global" in on_a_terminal(cohort.parent, ["inspect", "global"])


def test_headers_need_no_torch(cohort: Path) -> None:
    program = (
        "import sys\n"
        "from fedlora_cli.analysis.inspection.inspect import inspect\n"
        f"assert not inspect([{str(cohort)!r}]).faults\n"
        "assert not {'torch', 'peft', 'safetensors'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("flags", "times"), [([], 0), (["--values"], 1)])
def test_values_reads_every_tensor_once_and_headers_read_none(
    cohort: Path, reads: list[tuple[Path, str]], flags: list[str], times: int
) -> None:
    assert run("inspect", str(cohort), *flags).exit_code == 0

    assert len(reads) == len(set(reads)) == times * 2 * 2 * 2


def test_what_an_adapter_lacks_is_not_shown_as_what_it_has(tmp_path: Path) -> None:
    """A long phrase loses the beginnings of its names and then its end, never its own beginning."""
    names = [f"base.model.layers.{n}.self_attention.q_proj" for n in range(9)]
    for name, number in (("all", 9), ("few", 7), ("one", 1)):
        shapes = dict.fromkeys(names[:number], (12, 20))
        make(tmp_path / "round", Spec(name, rank=2, shapes=shapes))

    rows = run("inspect", str(tmp_path / "round")).stdout.splitlines()
    found = [row.split() for row in rows if "without" in row]

    assert all(len(row) <= 80 for row in rows)
    one, few = found
    assert few[:2] == ["7,", "without"]
    assert few[-2:] == ["1", "few"]
    assert [word[-9:] for word in few[2:-2]] == ["n.q_proj,", "on.q_proj"]
    assert one[:2] == ["1,", "without"]
    assert one[-3:] == ["…", "1", "one"]
    assert all(word.startswith("…") for word in (*few[2:-2], *one[2:-2]))
