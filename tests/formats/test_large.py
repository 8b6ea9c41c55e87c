"""What is written can be read by what reads it, however many modules and clients there are.

The limits of readers are lowered where the real ones would take minutes to reach; arithmetic shows
where these lie, and one `long` test goes there.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora_cli import formats
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.analysis.diagnosis.diagnose import diagnose
from fedlora_cli.analysis.inspection.inspect import inspect
from fedlora_cli.analysis.inspection.origin import origin
from fedlora_cli.clients.sample_counts import sample_count_in
from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files import documents, entries, safetensors
from fedlora_cli.files.documents import parse_object
from fedlora_cli.files.untrusted import State
from fedlora_cli.files.writing import Declared, check_header
from fedlora_cli.formats.peft import config
from fedlora_cli.reports import provenance
from fedlora_cli.reports.provenance import check_manifest, check_report, read_provenance
from fedlora_cli.rounds import output
from fedlora_cli.rounds.aggregate import aggregate
from fedlora_cli.rounds.distribute import distribute
from fedlora_cli.rounds.options import DistributeOptions

KEY = "base_model.model.{}.lora_{}.weight"


def never(stage: str) -> Any:
    raise AssertionError(f"{stage} has begun")


def name_of(number: int) -> str:
    """The name of an expert's layer, as mixtures have them."""
    layer, rest = divmod(number, 384)
    side = ("gate_proj", "up_proj", "down_proj")[rest % 3]
    return f"model.language_model.layers.{layer}.mlp.experts.{rest // 3}.{side}"


def write_client(folder: Path, numbers: range, samples: int) -> Path:
    """A client with these modules of 4 x 4 at rank 1, in a moment."""
    folder.mkdir(parents=True)
    fields: dict[str, Any] = {}
    for position, name in enumerate(sorted(map(name_of, numbers))):
        for side, shape, begin in (("A", [1, 4], 32 * position), ("B", [4, 1], 32 * position + 16)):
            offsets = [begin, begin + 16]
            fields[KEY.format(name, side)] = {
                "dtype": "F32", "shape": shape, "data_offsets": offsets,
            }  # fmt: skip
    header = json.dumps(fields, separators=(",", ":")).encode()
    values = np.random.default_rng(samples).standard_normal(8 * len(numbers), dtype=np.float32)
    content = struct.pack("<Q", len(header)) + header + values.tobytes()
    (folder / "adapter_model.safetensors").write_bytes(content)
    said = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "task_type": "CAUSAL_LM"}
    said |= {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps(said | {"base_model_name_or_path": "large/mixture"})
    )
    (folder / "fedlora.json").write_text(json.dumps({"samples": samples}))
    return folder


def write_round(folder: Path, modules: int) -> Path:
    """Two clients that share two thirds of these modules; each has a third of its own."""
    write_client(folder / "ann", range(0, 2 * modules // 3), 1)
    write_client(folder / "bob", range(modules // 3, modules), 3)
    return folder


def header_of(adapter: Path) -> int:
    """The length of the header of its weights."""
    return int.from_bytes((adapter / "adapter_model.safetensors").read_bytes()[:8], "little")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The clients in `round`, and what is made of them in `global`."""
    aggregate(write_round(tmp_path / "round", 30), tmp_path / "global")
    return tmp_path


def test_the_report_has_one_line_for_every_module_and_client(here: Path) -> None:
    lines = (here / "global/fedlora.json").read_text().splitlines()

    whole = json.loads("\n".join(lines))
    for rows in ("modules", "clients", "partitions"):
        first = lines.index(f'  "{rows}": [') + 1
        told = [json.loads(line.rstrip(",")) for line in lines[first : first + len(whole[rows])]]
        assert told == whole[rows]
    assert len(lines) < len(whole) + len(whole["modules"]) + 20


WRITING = sys.modules["fedlora_cli.formats.peft.writing"]  # by its name, the package has a function

#: A limit, where it stands, a value between what clients have and what is made of them, and the
#: error that is expected.
LIMITS: dict[str, tuple[Any, str, Callable[[Path], int], str]] = {
    "config": (
        WRITING, "MAX_BYTES", lambda folder: 300, "adapter_config.json: it would have [0-9]+ bytes"
    ),
    "header": (
        safetensors, "MAX_HEADER_BYTES", lambda folder: header_of(folder / "round/ann") + 9,
        "the weights file: it would have a header of [0-9]+ bytes, more than",
    ),
    "tensors": (
        safetensors, "MAX_TENSORS", lambda folder: 2 * 20,
        "the weights file: it would have 60 tensors and their metadata, more than 40",
    ),
    "report": (
        provenance, "MAX_BYTES", lambda folder: 5000, "fedlora.json: it would have [0-9]+ bytes and"
    ),
    "values": (
        provenance, "MAX_VALUES", lambda folder: 300, "fedlora.json: .* and [0-9]+ values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"energy": 0.9}, {"method": "flora"}])
@pytest.mark.parametrize("limit", LIMITS)
def test_what_no_reader_would_take_is_an_error_before_the_work(
    here: Path, monkeypatch, limit: str, options: dict[str, Any]
) -> None:
    module, name, most, said = LIMITS[limit]
    monkeypatch.setattr(module, name, most(here))

    with pytest.raises(OutputError, match=said) as caught:
        aggregate(here / "round", here / "new", AggregateOptions(**options), never)
    assert caught.value.exit_code == 4
    assert not (here / "new").exists()


@pytest.mark.parametrize("limit", ["config", "header", "tensors"])
def test_adapters_handed_out_are_held_to_the_same(here: Path, monkeypatch, limit: str) -> None:
    module, name, most, said = LIMITS[limit]
    known = formats.read(here / "global")  # while more was allowed
    monkeypatch.setattr("fedlora_cli.rounds.distribute.formats.read", lambda path: known)
    # Without metadata about clients, the header is shorter.
    value = header_of(here / "round/ann") + 9 if limit == "header" else most(here)
    monkeypatch.setattr(module, name, value)

    with pytest.raises(OutputError, match=said):
        distribute(here / "global", here / "handed", (), DistributeOptions(ranks=(1,)), never)
    assert not (here / "handed").exists()


@pytest.mark.parametrize(("modules", "clients"), [(3, 2), (40, 2), (3, 40), (20, 20)])
def test_the_report_is_never_longer_than_was_foreseen(
    tmp_path: Path, monkeypatch, modules: int, clients: int
) -> None:
    """However its rows and columns grow: what is foreseen is a bound."""
    for number in range(clients):
        write_client(tmp_path / f"round/client-é-{number}", range(modules), number + 1)
    foreseen: list[tuple[int, int]] = []
    monkeypatch.setattr(output, "check_report", lambda *sizes: foreseen.append(sizes))
    aggregate(tmp_path / "round", tmp_path / "out", AggregateOptions(clip_norm="auto"))

    content = (tmp_path / "out/fedlora.json").read_bytes()
    [(size, values)] = foreseen
    assert len(content) <= size <= 4 * len(content) + 20_000
    assert content.count(b",") <= values


def test_the_limits_hold_the_largest_mixtures() -> None:
    """50 000 modules at rank 64 in a cohort of 20, and 300 modules of 5000 clients."""
    names = [name_of(number) for number in range(50_000)]
    shapes = {"A": (64, 2048), "B": (768, 64)}
    declared = {
        KEY.format(name, side): Declared("float32", shape)
        for name in names
        for side, shape in shapes.items()
    }
    check_header(declared, {"format": "pt", "fedlora": "x" * output._MOST_METADATA})
    # Every module with a rank and an alpha of its own.
    pattern = max(len(json.dumps(f"^{name}".replace(".", r"\."))) for name in names)
    assert 50_000 * 2 * (pattern + len("    : 64,\n")) < config.MAX_BYTES
    for modules, clients, rank in ((50_000, 20, 64), (300, 5_000, 64)):
        numbers = (modules + clients) * rank + modules * clients
        rows = (modules + clients) * (output._FIELDS + 80)
        check_report(
            output._NUMBER * (modules + clients) * rank + 4 * modules * clients + rows,
            numbers + output._VALUES * (modules + clients),
        )
    assert documents.MAX_CONTAINERS > (50_000 * 4 + 100_000 * 2)


def test_a_report_beyond_any_limit_of_clients_is_a_global_adapters(tmp_path: Path) -> None:
    folder = tmp_path / "global"
    folder.mkdir()
    beginning = '{\n  "schema": "fedlora.aggregate/1",\n  "x": "'
    (folder / "fedlora.json").write_text(beginning + "x" * documents.MAX_BYTES + '"}')

    with pytest.raises(InputError, match="a global adapter that fedlora wrote, not a client"):
        sample_count_in(folder)
    (folder / "fedlora.json").write_text('{"samples": 3, "x": "' + "x" * documents.MAX_BYTES + '"}')
    with pytest.raises(InputError, match=r"bytes, more than 16777216"):
        sample_count_in(folder)


@pytest.mark.parametrize(
    "text", ["[" * 3 + "]" * 3, '{"a": {"b": {"c": [1]}}}', '{"a": [1, 2, 3, 4, 5, 6]}']
)
def test_documents_of_many_values_are_refused_before_they_are_made(monkeypatch, text: str) -> None:
    monkeypatch.setattr(documents, "MAX_CONTAINERS", 2)
    monkeypatch.setattr(documents, "MAX_VALUES", 4)

    with pytest.raises(InputError, match="more than 2 objects and lists, or 4 values"):
        parse_object(text.encode(), "here")


@pytest.mark.parametrize(
    ("text", "well"),
    [(r'{"a": "\ud83d\ude00"}', True), (r'{"a": "\\ud83d"}', True), (r'{"a": "\ud83d"}', False),
     (r'{"a": "\UDE00"}', False), (r'{"\uDe00": 1}', False), ('{"a": "😀"}', True)],
)  # fmt: skip
def test_half_a_pair_of_surrogates_is_no_unicode(text: str, well: bool) -> None:
    if well:
        assert parse_object(text.encode(), "here") == json.loads(text)
    else:
        with pytest.raises(InputError, match=r"not Unicode text|not valid JSON"):
            parse_object(text.encode(), "here")


def test_weights_alone_remember_how_many_clients_where_these_are_too_many(
    here: Path, monkeypatch
) -> None:
    monkeypatch.setattr(output, "_MOST_METADATA", 100)
    aggregate(here / "round", here / "out")
    (here / "out/fedlora.json").unlink()

    found = origin(here / "out")
    assert found is not None
    assert found.clients == 2
    assert header_of(here / "out") < header_of(here / "global")


def test_neighbors_are_found_in_linear_time(monkeypatch) -> None:
    """Twice the tensors, twice the looks at where they end."""
    looks = 0

    class Looked(entries.TensorInfo):
        @property
        def end(self) -> int:
            nonlocal looks
            looks += 1
            return self.start + self.length

    def looked_at(number: int) -> int:
        nonlocal looks
        looks = 0
        given = [
            Looked(Path("x"), f"{at}", "float32", (1,), 4 * at, 4, State(0)) for at in range(number)
        ]
        assert [len(one) for one in entries._ranges(given)] == [number]
        return looks

    assert looked_at(2000) <= 2 * looked_at(1000) + 10


def test_ranges_end_at_gaps_and_hold_what_overlaps() -> None:
    def made(*places: tuple[int, int]) -> list[entries.TensorInfo]:
        return [
            entries.TensorInfo(
                Path("x"), f"{start}", "uint8", (end - start,), start, end - start, State(0)
            )
            for start, end in places
        ]

    def found(*places: tuple[int, int]) -> list[int]:
        return [len(one) for one in entries._ranges(made(*places))]

    assert found((0, 4), (4, 8), (8, 9)) == [3]
    assert found((0, 4), (5, 8), (8, 9)) == [1, 2]
    assert found((0, 9), (1, 2), (9, 10)) == [3]  # a part of the first, then its neighbor
    assert found((0, 2), (1, 9), (2, 3), (9, 10)) == [4]
    large = entries._MAX_RANGE
    assert found((0, large), (large, large + 1)) == [1, 1]


#: Work and sizes grow in proportion: 50 000 take six times as long, and pass as well.
MODULES = 8_000


@pytest.mark.long
def test_the_modules_of_a_mixture_go_through_every_command(tmp_path: Path) -> None:
    """Written, read, handed out; the values are those of the obvious sum."""
    clients = [
        write_client(tmp_path / f"round/client-{number}", range(MODULES), number)
        for number in (1, 2)
    ]
    found = tmp_path / "global"
    aggregate(tmp_path / "round", found, AggregateOptions(method="flexlora", rank=2))
    said = read_provenance(found)
    assert said is not None
    assert len(said.clients) == 2
    check_manifest(found)
    assert inspect([found]).faults == ()
    assert diagnose([found]).adapters
    distribute(found, tmp_path / "handed", clients)
    again = AggregateOptions(method="residual", previous=found, verify=True)
    assert aggregate(tmp_path / "round", tmp_path / "next", again).verification is not None

    weights = load_file(found / "adapter_model.safetensors")
    given = [load_file(client / "adapter_model.safetensors") for client in clients]
    for name in map(name_of, range(0, MODULES, 997)):
        expected = sum(
            share * one[KEY.format(name, "B")].astype(np.float64) @ one[KEY.format(name, "A")]
            for share, one in zip((1 / 3, 2 / 3), given, strict=True)
        )
        written = weights[KEY.format(name, "B")].astype(np.float64) @ weights[KEY.format(name, "A")]
        assert np.linalg.norm(written - expected) <= 1e-6 * np.linalg.norm(expected)
