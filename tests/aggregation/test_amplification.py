"""A small upload makes little work: what is made of a file grows with its bytes, counted and not
timed.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedlora_cli import InputError, formats
from fedlora_cli.adapters.adapter import Adapter, AdapterMetadata
from fedlora_cli.clients.cohort import Client, _gaps
from fedlora_cli.files import entries as entries_file
from fedlora_cli.files.entries import TensorInfo
from fedlora_cli.files.untrusted import State
from fedlora_cli.formats.peft import experts as experts_file
from fedlora_cli.formats.peft.config import Config
from fedlora_cli.formats.peft.fields import Fields
from fedlora_cli.formats.peft.names import owner_of
from fedlora_cli.formats.peft.patterns import Matcher

BYTES = {"U8": 1, "F16": 2, "F32": 4}
EXPERTS = "base_model.model.model.layers.{}.mlp.experts"


def write(
    folder: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], **config: Any
) -> tuple[Path, int]:
    """An adapter whose tensors are zero, mostly holes on the disk, and the bytes of its file."""
    header: dict[str, Any] = {}
    end = 0
    for key, (dtype, shape) in tensors.items():
        size = BYTES[dtype]
        for side in shape:
            size *= side
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder, 8 + len(text) + end


def mixture(folder: Path, *, layers: int, experts: int, rank: int, sides: int) -> tuple[Path, int]:
    tensors: dict[str, tuple[str, Sequence[int]]] = {}
    for layer in range(layers):
        for suffix in ("", ".base_layer"):
            pair = EXPERTS.format(layer) + suffix
            tensors[f"{pair}.lora_A.weight"] = ("F16", (experts * rank, sides))
            tensors[f"{pair}.lora_B.weight"] = ("F16", (sides, experts * rank))
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return write(folder, tensors, r=rank, target_modules=[], target_parameters=parameters)


@pytest.mark.parametrize("sides", [1, 4])
def test_one_string_does_not_make_thousands_of_modules_of_a_small_pair(
    tmp_path: Path, sides: int
) -> None:
    folder, size = mixture(tmp_path / "c", layers=25, experts=2048, rank=1, sides=sides)

    tracemalloc.start()
    with pytest.raises(InputError, match=r"has \d+ experts, too many for the size of the file"):
        formats.read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 8_000_000 + 10 * size


def test_a_large_mixture_has_all_its_experts(tmp_path: Path) -> None:
    """512 experts in each of 94 layers, two pairs each, of rank 8."""
    folder, size = mixture(tmp_path / "c", layers=94, experts=512, rank=8, sides=8)

    tracemalloc.start()
    adapter = formats.read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(adapter.modules) == 94 * 512 * 2
    assert peak < 6 * size


def test_few_experts_of_any_size_are_read(tmp_path: Path) -> None:
    folder, _ = mixture(tmp_path / "c", layers=1, experts=1024, rank=1, sides=1)

    assert len(formats.read(folder).modules) == 2048


@pytest.mark.parametrize("embeddings", [1, 40])
def test_one_list_of_tokens_does_not_make_a_tensor_of_every_byte(
    tmp_path: Path, embeddings: int
) -> None:
    tokens = list(range(100_000 // embeddings))
    pair = "base_model.model.layers.0.q_proj"
    tensors: dict[str, tuple[str, Sequence[int]]] = {
        f"{pair}.lora_A.weight": ("F32", (1, 4)),
        f"{pair}.lora_B.weight": ("F32", (4, 1)),
    }
    for number in range(embeddings):
        name = f"base_model.model.e{number}.token_adapter.trainable_tokens_delta"
        tensors[name] = ("U8", (len(tokens), 1))
    folder, size = write(
        tmp_path / "c", tensors, target_modules=["q_proj"], trainable_token_indices=tokens
    )

    tracemalloc.start()
    with pytest.raises(InputError, match=r"rows of tokens, too many for the size of the file"):
        formats.read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    config = (folder / "adapter_config.json").stat().st_size
    assert peak < 10_000_000 + 20 * (size + config)


def config_of(**fields: Any) -> Config:
    path = Path("adapter_config.json")
    return Config(path, Fields(path, fields), Matcher(path))


class Counted(str):
    """A string that counts how often it is compared with the end of another."""

    calls = 0

    def endswith(self, *args: Any) -> bool:
        Counted.calls += 1
        return super().endswith(*args)


@pytest.mark.parametrize("count", [10, 10_000])
def test_tokens_of_an_embedding_are_looked_up(count: int) -> None:
    """The first name in the file that the embedding's ends with, as before, without looking at
    all of them.
    """
    names = {f"x{number}": [number] for number in range(count)}
    config = config_of(trainable_token_indices={**names, "tokens": [7], "embed_tokens": [8]})
    Counted.calls = 0

    assert config.token_indices(Counted("model.embed_tokens")) == (7,)
    assert config.token_indices("wte") == ()
    assert config_of(trainable_token_indices=[1, 2]).token_indices("wte") == (1, 2)
    assert Counted.calls == 0


@pytest.mark.parametrize("count", [65, 100_000])
def test_parameters_that_no_module_has_are_not_kept(count: int) -> None:
    config = config_of(target_parameters=[f"experts.p{number}" for number in range(count)])
    names = experts_file.parameters_of(config, "mlp.experts", [8])

    assert len(names) == 65
    with pytest.raises(
        InputError, match=r"more than 64 parameters of mlp\.experts in target_param"
    ):
        experts_file.expert_groups(Path("x"), config, "mlp.experts", names, [8])


def test_ranks_of_parameters_are_looked_up_once_for_all_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(r=2, target_parameters=[f"experts.p{number}" for number in range(4)])
    calls: Counter[str] = Counter()
    real = Config.rank
    monkeypatch.setattr(
        Config, "rank", lambda self, name: (calls.update([name]), real(self, name))[1]
    )
    names = experts_file.parameters_of(config, "mlp.experts", [8] * 4)

    assert len(experts_file.expert_groups(Path("x"), config, "mlp.experts", names, [8] * 4)) == 4
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(
    ("name", "saved", "owner"),
    [
        ("model.lm_head.weight", ("head",), "model.lm_head"),
        ("score.out.score.weight", ("score",), "score"),
        ("a.b.c.weight", ("c", "b"), "a.b"),
        ("a.b.c.weight", ("a.b.c", "weight"), "a.b.c"),
        ("a.head", ("head",), None),
        ("a.headless.weight", ("head",), None),
        ("heads.head.weight", ("head", "s"), "heads"),
        ("x.weight", (), None),
    ],
)
def test_the_owner_of_a_tensor_is_the_outermost(
    name: str, saved: tuple[str, ...], owner: str | None
) -> None:
    assert owner_of(name, saved) == owner


def test_the_owner_of_a_tensor_takes_one_look_for_each_name_that_is_saved() -> None:
    """However many dots its name has."""

    class Name(str):
        looks = 0

        def find(self, *args: Any) -> int:
            Name.looks += 1
            return super().find(*args)

        def split(self, *args: Any) -> list[str]:
            raise AssertionError("looks at every part")

    saved = tuple(f"head{number}" for number in range(256))
    for dots in (1, 200):
        Name.looks = 0
        assert owner_of(Name("a." * dots + "weight"), saved) is None
        assert Name.looks == 256


@pytest.mark.parametrize("count", [10, 1_000])
def test_neighbors_in_a_file_are_found_in_one_pass(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of them are read as one range."""
    state = State(10 * count, 0, 0)
    parts = [
        TensorInfo(Path("x"), f"t{i}", "uint8", (10,), 10 * i, 10, state) for i in range(count)
    ]
    whole = TensorInfo(Path("x"), "all", "uint8", (10 * count,), 0, 10 * count, state)
    far = TensorInfo(Path("x"), "far", "uint8", (1,), 20 * count, 1, state)
    looks: Counter[str] = Counter()
    end = TensorInfo.end.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        TensorInfo, "end", property(lambda self: (looks.update(["end"]), end(self))[1])
    )

    assert [*entries_file._ranges([whole, *parts, far])] == [[whole, *parts], [far]]
    assert [*entries_file._ranges(parts[::2])] == [[one] for one in parts[::2]]
    assert looks["end"] <= 4 * count


def test_what_a_client_lacks_is_told_by_its_first_names_and_their_number(tmp_path: Path) -> None:
    """One client with thousands of modules has not all of them looked up for each of the others."""
    looks: Counter[str] = Counter()

    class Modules(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            looks["modules"] += 1
            return super().__contains__(name)

    def client(name: str, modules: Sequence[str]) -> Client:
        adapter = Adapter(tmp_path, tmp_path, Modules.fromkeys(modules), {}, AdapterMetadata())
        return Client(name, adapter, 1.0)

    others = [client(f"c{k}", ["q", "v"]) for k in range(3)]
    notes = _gaps([*others, client("large", [f"m{i:04}" for i in range(5_000)])])

    assert notes[0] == "c0 has no factors of: m0000, m0001, m0002 and 4997 more"
    assert notes[3] == "large has no factors of: q, v"
    assert looks["modules"] < 5_100
