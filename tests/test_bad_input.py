"""Bad input: one line saying where, what was found and what to do; exit 3; nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import PREFIX, Spec, make
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fedlora_cli.cli import app

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q = f"{PREFIX}layers.0.q_proj"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["aggregate", *arguments], prog_name="fedlora")


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def replace_tensor(key: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def rename_tensor(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: set_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the header of the weights, and nothing else."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        raw = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])

    return apply


def raw_weights(content: bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / WEIGHTS).write_bytes(content))


def raw_config(content: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / CONFIG).write_text(content))


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **fields)


def cut(count: int) -> Callable[[Path], None]:
    return lambda folder: raw_weights((folder / WEIGHTS).read_bytes()[:-count])(folder)


def add(count: int) -> Callable[[Path], None]:
    return lambda folder: raw_weights((folder / WEIGHTS).read_bytes() + bytes(count))(folder)


def put(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_text(content))


def void(_: object) -> None:
    """Forget a value."""


def fifo(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def twice(text: str) -> str:
    """A config in which the rank stands twice."""
    return '{"peft_type": "LORA", "r": 3, "r": 64' + text + "}"


def move_away(folder: Path) -> None:
    shutil.rmtree(folder)


def with_value(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{Q}.lora_A.weight"][1, 2] = value

    return lambda folder: set_tensors(folder, change)


# What is done to the client `bad`, and what the one line must say.
CORPUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "adapter_config.json: cannot be read (no such"),
    "broken JSON": (raw_config('{"peft_type": '), "adapter_config.json: not valid JSON"),
    "config is a list": (raw_config("[]"), "a JSON list"),
    "config nested without end": (raw_config("[" * 100_000), "nested too deeply"),
    "a key twice": (raw_config(twice("")), "the key 'r' stands twice"),
    "NaN in the config": (raw_config(twice("").replace("64", "NaN")), "NaN is not a JSON number"),
    "a number of 5000 digits": (raw_config('{"r": ' + "9" * 5000 + "}"), "not valid JSON"),
    "not UTF-8": (lambda f: void((f / CONFIG).write_bytes(b"\xff\xfe{}")), "not Unicode text"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "safetensors: cannot be read (no such"),
    "a pickle": (pickle_only, "adapter_model.bin: a pickle, which is never opened"),
    "a pickle under the wrong name": (raw_weights(b"PK\x03\x04" + bytes(100)), "a pickle, not"),
    "a FIFO": (fifo, "not a regular file"),
    "empty weights": (raw_weights(b""), "only 0 bytes long; upload it again"),
    "truncated header": (raw_weights(struct.pack("<Q", 500) + b"{}"), "a header of 500 bytes"),
    "endless header": (raw_weights(b"\xff" * 8 + b"{}"), "upload it again"),
    "header not JSON": (raw_weights(struct.pack("<Q", 4) + b"null"), "a header that is not JSON"),
    "truncated data": (cut(4), "it is truncated or has bytes added"),
    "bytes added": (add(3), "it is truncated or has bytes added"),
    "a lying shape": (
        header(
            lambda h: (
                h[f"{Q}.lora_A.weight"]["shape"].reverse()
                or h[f"{Q}.lora_A.weight"]["shape"].append(2)
            )
        ),
        "the header lies",
    ),
    "a lying offset": (
        header(lambda h: h[f"{Q}.lora_A.weight"].update(data_offsets=[4, 244])),
        "a gap or overlap",
    ),
    "a negative offset": (
        header(lambda h: h[f"{Q}.lora_A.weight"].update(data_offsets=[-240, 0])),
        "offsets [-240, 0]",
    ),
    "an unknown dtype": (header(lambda h: h[f"{Q}.lora_A.weight"].update(dtype="F8")), "dtype F8"),
    "an extra field": (header(lambda h: h[f"{Q}.lora_A.weight"].update(x=1)), "not described"),
    "a name that speaks to the terminal": (
        rename_tensor(f"{Q}.lora_A.weight", "\x1b[2J"),
        r"a tensor named '\x1b[2J'",
    ),
    "A without B": (
        lambda f: set_tensors(f, lambda t: void(t.pop(f"{Q}.lora_B.weight"))),
        "layers.0.q_proj has lora_A but no lora_B",
    ),
    "B without A": (
        lambda f: set_tensors(f, lambda t: void(t.pop(f"{Q}.lora_A.weight"))),
        "layers.0.q_proj has lora_B but no lora_A",
    ),
    "ranks of A and B differ": (
        replace_tensor(f"{Q}.lora_A.weight", torch.ones(4, 20)),
        "differ in rank",
    ),
    "rank not as in the config": (config(r=4), "has rank 3, but adapter_config.json says 4"),
    "another shape than the others": (
        replace_tensor(f"{Q}.lora_A.weight", torch.ones(3, 21)),
        "layers.0.q_proj is linear 12 x 20, but linear 12 x 21",
    ),
    "no LoRA at all": (
        lambda f: set_tensors(f, lambda t: (t.clear(), t.update({PREFIX + "x": torch.ones(2)}))),
        "no LoRA tensors in it",
    ),
    "not from PEFT": (rename_tensor(f"{Q}.lora_A.weight", "q.lora_A"), "PEFT's names begin with"),
    "an adapter name in the key": (
        rename_tensor(f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"),
        "an adapter name in the key",
    ),
    "a leftover tensor": (replace_tensor(f"{PREFIX}extra.weight", torch.ones(2)), "not part of"),
    "a magnitude vector": (
        replace_tensor(f"{Q}.lora_magnitude_vector", torch.ones(12)),
        "layers.0.q_proj.lora_magnitude_vector: DoRA",
    ),
    "an ungathered shard": (
        replace_tensor(f"{Q}.lora_A.weight", torch.ones(0)),
        "gather the shards (ZeRO-3, FSDP)",
    ),
    "factors of whole numbers": (
        replace_tensor(f"{Q}.lora_A.weight", torch.ones(3, 20, dtype=torch.int32)),
        "dtype int32",
    ),
    "NaN": (with_value(float("nan")), "holds 1 NaN or infinite values, the first at position 22"),
    "infinity": (with_value(float("-inf")), "holds 1 NaN or infinite values"),
    "a target that PEFT would not match": (
        config(target_modules=["v_proj"]),
        "layers.0.q_proj has LoRA tensors, but target_modules does not match it",
    ),
    "an expression that takes Python's matcher for ever": (
        config(target_modules="([a-z_.0-9]+)+!"),
        "target_modules does not match it",
    ),
    "an expression that is none": (
        config(alpha_pattern={"(": 4}),
        "is not a usable regular expression",
    ),
    "another base model": (
        config(base_model_name_or_path="other/base"),
        "its base model is tiny/base, but other/base",
    ),
    "a task that PEFT does not know": (config(task_type="EVIL"), "task_type is 'EVIL'"),
    "half a surrogate pair": (
        lambda f: raw_config((f / CONFIG).read_text().replace("tiny/base", "\\ud800"))(f),
        "not Unicode text",
    ),
    "alpha of 401 digits": (config(lora_alpha=10**400), "at most 1e+12"),
    "as many samples as atoms": (put("fedlora.json", '{"samples": 1e300}'), "samples: 1e+300 sam"),
    "a head that was not gathered": (
        lambda f: (
            set_config(f, modules_to_save=["score"]),
            replace_tensor(f"{PREFIX}score.weight", torch.ones(0))(f),
        ),
        "gather the shards (ZeRO-3, FSDP)",
    ),
    "a tensor of a hundred sides": (
        replace_tensor(f"{PREFIX}score.weight", torch.ones([1] * 100)),
        "has shape [1, 1, 1, 1, 1, 1, 1, 1, 1]",
    ),
    "a side of 4000 digits": (
        header(lambda h: h[f"{Q}.lora_A.weight"].update(shape=[10**4000, 1])),
        "has shape [1000",
    ),
    "an update beyond all numbers": (
        lambda f: set_tensors(
            f,
            lambda t: t.update(
                {
                    f"{Q}.lora_{side}.weight": 1e300 * t[f"{Q}.lora_{side}.weight"].double()
                    for side in "AB"
                }
            ),
        ),
        "the update of layers.0.q_proj is larger than any number",
    ),
    "a module without a name": (
        lambda f: set_tensors(
            f,
            lambda t: t.update({f"{PREFIX}.lora_{side}.weight": torch.ones(3, 3) for side in "AB"}),
        ),
        "factors of a module without a name",
    ),
    "a Git LFS pointer": (
        raw_weights(b"version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer, not the file; run git lfs pull",
    ),
    "a web page": (raw_weights(b"<!doctype html><html></html>"), "a web page, not safetensors"),
    "a global adapter": (
        put("fedlora.json", '{"schema": "fedlora.aggregate/1"}'),
        "a global adapter that fedlora wrote, not a client; leave it out; aggregate takes it as",
    ),
    "an adapter that has not arrived": (
        lambda f: ((f / CONFIG).unlink(), (f / WEIGHTS).unlink()),
        "a client's sample count, but no adapter; wait until it is uploaded",
    ),
    "a link to nothing": (
        lambda f: (f.rename(f.with_name("x")), f.symlink_to("gone"), move_away(f.with_name("x"))),
        "a link to nothing; mend the link",
    ),
    "a link to another client": (
        lambda f: (move_away(f), f.symlink_to("good")),
        "the same folder as",
    ),
    "a name that is not UTF-8": (
        lambda f: f.rename(os.fsdecode(os.fsencode(f) + b"\xff")),
        "a path that is not UTF-8; rename the folder",
    ),
    "negative sample count": (put("fedlora.json", '{"samples": -5}'), "samples: -5 samples"),
    "sample count is text": (put("fedlora.json", '{"samples": "5"}'), "a sample count is a number"),
    "no sample count": (
        lambda f: (f / "fedlora.json").unlink(),
        "no sample count for bad, while other clients have one",
    ),
    **{
        f"{field} = {value!r}": (config(**{field: value}), "; it must be ")
        for field, value in [
            ("r", 0),
            ("r", -4),
            ("r", 3.0),
            ("r", "3"),
            ("r", True),
            ("r", None),
            ("lora_alpha", 0),
            ("lora_alpha", -16),
            ("lora_alpha", "16"),
            ("use_rslora", "false"),
            ("rank_pattern", {"q_proj": -1}),
            ("alpha_pattern", [1]),
            ("modules_to_save", {"a": 1}),
            ("lora_dropout", 2),
            ("fan_in_fan_out", 1),
            ("layers_to_transform", "all"),
            ("base_model_name_or_path", 7),
        ]
    },
    "infinite alpha": (
        lambda f: raw_config(
            (f / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 1e999')
        )(f),
        "lora_alpha is inf",
    ),
}


@pytest.mark.parametrize("fault", CORPUS)
def test_a_bad_client_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    damage, expected = CORPUS[fault]
    for name in ("good", "bad"):
        make(tmp_path / "round", Spec(name, rank=3, samples=10))
    damage(tmp_path / "round/bad")

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "bad" in lines[0]
    assert expected in lines[0]
    assert lines[0].isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["round"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 10}', "no count for b"),
        ('{"a": 10, "b": 5, "zoe": 1}', "a count for zoe, which is no client"),
        ('{"a": 10, "b": -1}', "b: -1 samples"),
        ('{"a": 10, "b": true}', "b: True samples"),
        ('{"a": 0, "b": 0}', "all counts are zero"),
        ('{"a": 10, "b": 1e999}', "b: inf samples"),
        ("a,10", "no count for b"),
        ("client,samples\na,10\nb,x", "line 3 says 'x' samples"),
        ("a,10\nb,nan", "b: nan samples"),
        ("a,10\na,10\nb,1", "line 2 names a again"),
        ("a,10,3\nb,1", "line 1 has 3 columns"),
        ('{"a": 1', "not valid JSON"),
    ],
)
def test_bad_sample_counts_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    for name in ("a", "b"):
        make(tmp_path / "round", Spec(name, rank=2, samples=3))
    (tmp_path / "counts").write_text(content)

    counts = ("--samples", str(tmp_path / "counts"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *counts)

    assert result.exit_code == 3
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sample_counts_are_taken_from_the_first_place_that_has_them(tmp_path: Path) -> None:
    from fedlora_cli import read_clients

    make(tmp_path / "round", Spec("a", rank=2, samples=3))
    make(tmp_path / "round", Spec("b", rank=2, samples=None))
    (tmp_path / "round/a/all_results.json").write_text('{"train_samples": 999}')
    (tmp_path / "round/b/train_results.json").write_text('{"train_samples": 7, "eval_loss": NaN}')
    (tmp_path / "counts.csv").write_text("client,samples\nb,20\n\na,10\n")

    told = read_clients([tmp_path / "round"]).cohort.samples
    listed = read_clients([tmp_path / "round"], samples=tmp_path / "counts.csv").cohort.samples

    assert told.tolist() == [3, 7]
    assert listed.tolist() == [10, 20]


@pytest.mark.parametrize("name", ["nowhere", "empty", "file.txt"])
def test_a_place_without_adapters_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()

    result = run(str(tmp_path / name), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As for anybody but root, to whom no permission is denied."""
    make(tmp_path / "round", Spec("a", rank=2))

    def closed(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "round: cannot be read (permission denied); check the path" in result.stderr


def test_two_clients_of_one_name_are_refused(tmp_path: Path) -> None:
    for side in ("left", "right"):
        make(tmp_path / side, Spec("twin", rank=2))

    result = run(str(tmp_path / "left"), str(tmp_path / "right"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "a client named twin" in result.stderr


def test_a_module_trained_as_factors_here_and_in_full_there_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    tensors = {"layers.0.v_proj.weight": torch.ones(7, 20)}
    shapes = {"layers.0.q_proj": (12, 20)}
    saved = {"modules_to_save": ["v_proj"]}
    make(tmp_path / "round", Spec("b", rank=2, shapes=shapes, tensors=tensors, config=saved))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "layers.0.v_proj is saved in full, but" in result.stderr


def test_base_weights_that_differ_between_clients_are_refused(tmp_path: Path) -> None:
    for value, name in enumerate("ab"):
        tensors = {"lm_head.weight": torch.full((5, 4), float(value))}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "its base weights lm_head.weight differ" in result.stderr


def test_a_declared_base_settles_different_names_of_it(tmp_path: Path) -> None:
    for name in "ab":
        fields = {"base_model_name_or_path": f"/home/{name}/llama"}
        make(tmp_path / "round", Spec(name, rank=2, config=fields))

    refused = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))
    declared = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "--base", "meta/llama")

    assert refused.exit_code == 3
    assert "give --base to declare it" in refused.stderr
    assert declared.exit_code == 0, declared.output
    written = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert written["base_model_name_or_path"] == "meta/llama"


def test_a_previous_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    make(tmp_path, Spec("old", rank=2, shapes={"layers.0.q_proj": (12, 99)}))

    previous = ("--previous", str(tmp_path / "old"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *previous)

    assert result.exit_code == 3
    assert "layers.0.q_proj is linear 12 x 99, but linear 12 x 20" in result.stderr


def test_ffa_with_an_A_of_each_client_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        make(tmp_path / "round", Spec(name, rank=2))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), "-m", "ffa")

    assert result.exit_code == 3
    assert "lora_A of layers.0.q_proj is not the A of the other clients" in result.stderr


def test_a_client_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    from fedlora_cli import InputError, read

    made = make(tmp_path, Spec("a", rank=2))
    adapter = read(made.folder)
    os.utime(made.folder / WEIGHTS, (1, 1))

    with pytest.raises(InputError, match="changed while being read"):
        adapter.modules["layers.0.q_proj"].read()


def test_a_name_like_markup_or_an_escape_is_shown_as_text(tmp_path: Path) -> None:
    for name in ("[bold]red", "a\x1b[2Jb", "-rf"):
        make(tmp_path / "round", Spec(name, rank=2))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0, result.output
    assert "[bold]red" in result.stdout
    assert "a\\x1b[2Jb" in result.stdout
    assert "\x1b" not in result.output


def test_a_folder_without_an_adapter_among_the_clients_is_named(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    (tmp_path / "round/logs").mkdir()
    (tmp_path / "round/.out.tmp-1").mkdir()

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "logs left out: no adapter in it" in result.stderr
    assert "tmp-1" not in result.stderr


def test_a_folder_that_may_not_be_entered_is_refused(tmp_path: Path, monkeypatch) -> None:
    """As for anybody but root, to whom no permission is denied."""
    make(tmp_path / "round", Spec("a", rank=2))
    closed = tmp_path / "round/a"
    really = Path.stat

    def stat(path: Path, **kwargs: Any) -> os.stat_result:
        if path.parent == closed:
            raise PermissionError(13, "Permission denied")
        return really(path, **kwargs)

    monkeypatch.setattr(Path, "stat", stat)
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "a/adapter_config.json: cannot be read (permission denied)" in result.stderr


def test_entries_of_modules_to_save_without_a_tensor_are_not_written(tmp_path: Path) -> None:
    """PEFT adds names that the model does not have; one client must not decide for the others."""
    tensors = {"score.weight": torch.ones(3, 4)}
    make(tmp_path / "round", Spec("a", rank=2))
    fields = {"modules_to_save": ["classifier", "score"]}
    make(tmp_path / "round", Spec("b", rank=2, tensors=tensors, config=fields))

    assert run(str(tmp_path / "round"), "-o", str(tmp_path / "out")).exit_code == 0

    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] == ["score"]


def test_a_head_that_the_previous_adapter_trained_another_way_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    saved = {"modules_to_save": ["q_proj"]}
    tensors = {"layers.0.q_proj.weight": torch.ones(12, 20)}
    shapes = {"layers.0.v_proj": (7, 20)}
    make(tmp_path, Spec("old", rank=2, tensors=tensors, config=saved, shapes=shapes))

    previous = ("--previous", str(tmp_path / "old"))
    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"), *previous)

    assert result.exit_code == 3
    assert "layers.0.q_proj is saved in full, but" in result.stderr


def test_a_folder_one_level_too_high_is_told_from_an_empty_one(tmp_path: Path) -> None:
    make(tmp_path / "runs/round", Spec("a", rank=2))

    result = run(str(tmp_path / "runs"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert f"did you mean {tmp_path}/runs/round?" in result.stderr


def test_copies_under_two_names_are_counted_and_told(tmp_path: Path) -> None:
    make(tmp_path / "round", Spec("a", rank=2))
    shutil.copytree(tmp_path / "round/a", tmp_path / "round/b")

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "b has the same weights as a; both are counted" in result.stderr


def test_a_head_without_tensors_is_told_unless_peft_itself_put_it_there(tmp_path: Path) -> None:
    """PEFT lists classifier and score for BART and T5 too, which have neither."""
    for name, saved in (("quiet", ["classifier", "score"]), ("told", ["lm_head"])):
        fields = {"modules_to_save": saved}
        make(tmp_path / "round", Spec(name, rank=2, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 0
    assert "told: modules_to_save names lm_head, but has no tensor of them" in result.stderr
    assert "quiet" not in result.stderr


def test_tensors_of_different_kinds_of_numbers_are_not_averaged(tmp_path: Path) -> None:
    for name, dtype in (("a", torch.int8), ("b", torch.int64)):
        tensors = {"score.count": torch.ones(2, dtype=dtype)}
        fields = {"modules_to_save": ["score"]}
        make(tmp_path / "round", Spec(name, rank=2, tensors=tensors, config=fields))

    result = run(str(tmp_path / "round"), "-o", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert "score.count is int64 of shape [2], trained as score, but int8" in result.stderr
