"""An adapter in memory, as PEFT's state dict and config, and its folder in memory or on a disk."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedlora_cli import formats
from fedlora_cli.clients.sample_counts import sample_count_in
from fedlora_cli.errors import InputError, OutputError
from fedlora_cli.files.documents import exists, read_object
from fedlora_cli.files.entries import DTYPES, read_entries
from fedlora_cli.files.folder import claimed, new_folder, other_than
from fedlora_cli.files.locations import location
from fedlora_cli.files.memory import Folders, file_of, weights_of
from fedlora_cli.files.safetensors import read_contents
from fedlora_cli.files.writing import check_header, declare, write, write_text
from fedlora_cli.formats.terms import CONFIG, WEIGHTS
from fedlora_cli.remote import Location
from fedlora_cli.reports.provenance import REPORT, read_report
from fedlora_cli.text import first_line

if TYPE_CHECKING:
    from peft import LoraConfig

#: The names of torch's dtypes that a safetensors file can hold.
_DTYPES = frozenset(f"torch.{name}" for name, _ in DTYPES.values())

#: PEFT's default of both r and lora_alpha.
_DEFAULT = 8

#: Characters that the name of a folder cannot have.
_NOT_IN_NAMES = frozenset("/\\\0")


@dataclass(frozen=True, eq=False)
class StateDict:
    """An adapter in memory.

    - `tensors`: as `peft.get_peft_model_state_dict` returns them.
    - `config`: a LoraConfig, its `to_dict()`, or the content of an adapter_config.json; kept as
      plain JSON values.
    - `samples`: the client's sample count.
    - `metadata`: the text in the header of the weights file.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    samples: float | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    def __post_init__(self) -> None:
        tensors = {name: _tensor(value) for name, value in self.tensors.items()}
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "config", _plain_config(self.config))

    def __repr__(self) -> str:
        samples = "" if self.samples is None else f", {self.samples:g} samples"
        return f"<StateDict of rank {self.rank}: {len(self.tensors)} tensors{samples}>"

    @property
    def rank(self) -> int:
        """The largest rank in the config."""
        ranks = self.config.get("rank_pattern") or {}
        return int(max(self.config.get("r", _DEFAULT), *ranks.values(), 1))

    @property
    def scaling(self) -> float:
        """PEFT's multiplier of B A in modules of the config's own rank and alpha."""
        rank, alpha = (self.config.get(name, _DEFAULT) for name in ("r", "lora_alpha"))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def is_zero(self) -> bool:
        """Whether the update is zero, as that of a new adapter of PEFT. Raises InputError."""
        store = Folders()
        put(store, "adapter", self)
        modules = formats.read(store.place("adapter")).modules.values()
        factors = (module.read() for module in modules)
        return all(not one.A.any() or not one.B.any() for one in factors)

    @classmethod
    def of(
        cls, model: Any, samples: float | None = None, adapter_name: str = "default"
    ) -> StateDict:
        """A copy of an adapter of a PEFT model, on the CPU; later training does not change it."""
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        config, base = model.peft_config[adapter_name].to_dict(), model.get_base_model()
        # save_pretrained of PEFT fills in these two fields, too.
        if config.get("base_model_name_or_path") is None:
            config["base_model_name_or_path"] = getattr(base, "name_or_path", None)
        if config.get("task_type") is None:
            names = {
                "base_model_class": type(base).__name__,
                "parent_library": type(base).__module__,
            }
            config["auto_mapping"] = names
        return cls(
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()},
            config,
            samples,
        )

    def lora_config(self) -> LoraConfig:
        """The config as PEFT's class, for training: saved configs are for inference."""
        from peft import LoraConfig

        return LoraConfig(**{**self.config, "inference_mode": False})

    @classmethod
    def load(cls, folder: Location | str) -> StateDict:
        """The PEFT adapter in a folder. Raises InputError."""
        place = location(folder)
        infos, metadata = read_contents(place / WEIGHTS)
        values = read_entries(list(infos.values()))
        is_global = exists(place / REPORT) and "schema" in read_report(place)
        return cls(
            dict(zip(infos, values, strict=True)),
            read_object(place / CONFIG),
            None if is_global else sample_count_in(place),
            metadata,
        )

    def save(self, folder: Location | str, *, force: bool = False) -> None:
        """Write a PEFT adapter into a new folder, with the sample count if there is one.

        `force` replaces an adapter that is there. Raises InputError for tensors that no file can
        hold, and OutputError.
        """
        target, foreign = location(folder), other_than(formats.FILES)
        check_tensors(str(target), self)
        documents = _documents(str(target), self)
        with (
            claimed(target, force=force, foreign=foreign),
            new_folder(target, force=force, foreign=foreign) as place,
        ):
            write(place / WEIGHTS, self.tensors, self.metadata)
            for name, text in documents.items():
                write_text(place / name, text)


def put(store: Folders, folder: str, state: StateDict) -> None:
    """Put an adapter into a folder in memory. Raises InputError."""
    check_tensors(str(store.place(folder)), state)
    store.add(f"{folder}/{WEIGHTS}", weights_of(state.tensors, state.metadata))
    for name, text in _documents(str(store.place(folder)), state).items():
        store.add(f"{folder}/{name}", file_of(text.encode()))


def _documents(place: str, state: StateDict) -> dict[str, str]:
    """The texts beside the weights, by file name. Raises InputError for samples of no number."""
    texts = {CONFIG: json.dumps(state.config, indent=2, sort_keys=True) + "\n"}
    if state.samples is not None:
        if not isinstance(state.samples, numbers.Real):
            found = f"its sample count is a {type(state.samples).__name__}"
            raise InputError(place, found, "give a number, such as len(dataset)")
        # Integers of numpy are numbers, but not of JSON.
        plain = isinstance(state.samples, (int, float))
        samples = state.samples if plain else float(state.samples)
        texts[REPORT] = json.dumps({"samples": samples}) + "\n"
    return texts


def _tensor(value: Any) -> Any:
    """An array of numpy as a tensor; arrays of other objects, and of other byte order, stay."""
    if not isinstance(value, np.ndarray):
        return value
    with suppress(TypeError, ValueError):
        return torch.from_numpy(np.ascontiguousarray(value))
    return value


def check_tensors(place: str, state: StateDict) -> None:
    """Raise InputError unless a weights file can hold the tensors and their names."""
    for name, tensor in state.tensors.items():
        if not isinstance(name, str) or not name.isprintable():
            raise InputError(place, f"a tensor named {name!r:.80}", "give tensors plain names")
        if not isinstance(tensor, Tensor):
            found = f"{name} is of type {type(tensor).__name__}, not a tensor of numbers"
            raise InputError(place, found, "give tensors, as get_peft_model_state_dict does")
        if str(tensor.dtype) not in _DTYPES or tensor.layout != torch.strided:
            found = f"{name} has {tensor.dtype} and {tensor.layout}"
            raise InputError(place, found, "save it as float32 or bfloat16, not sparse")
    try:
        check_header({n: declare(tensor) for n, tensor in state.tensors.items()}, state.metadata)
    except OutputError as error:
        raise InputError(place, f"{error.where}: {error.found}", error.cure) from None


def checked_name(name: str) -> str:
    """The name of a client. Raises InputError if no folder can have it."""
    if not isinstance(name, str) or name[:1] in ("", ".") or _NOT_IN_NAMES & set(name):
        found = f"{name!r}, which is no name of a folder"
        raise InputError("a client's name", found, "give names without / that begin with no dot")
    return name


def _plain_config(config: Any) -> Any:
    """The config as JSON values: sets become sorted lists, enums and dtypes their names."""
    fields = config.to_dict() if hasattr(config, "to_dict") else config

    def plain(value: Any) -> Any:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if is_dataclass(value) and not isinstance(value, type):
            return asdict(value)
        raise TypeError(f"a {type(value).__name__}")

    cure = "give a LoraConfig, or the content of an adapter_config.json"
    try:
        values = json.loads(json.dumps(fields, default=plain))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError("config", f"no JSON object ({first_line(error)})", cure) from None
    if not isinstance(values, dict):
        raise InputError("config", f"no JSON object but a {type(values).__name__}", cure)
    return values
