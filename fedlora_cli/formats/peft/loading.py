"""A check that PEFT loads every tensor of an adapter folder.

PEFT silently ignores a tensor whose module the config does not select. So a written adapter is
checked against a second implementation of PEFT's rules, independent of the reader and the writer.
With them it shares only how expressions are run (`Matcher.match`, `Matcher.full`) and how names are
split (`endings`, `with_parents`). Source: `check_target_module_exists` and `_inject_parameters` of
`peft/tuners/tuners_utils.py`, `_set_trainable` of `peft/utils/other.py` and
`set_peft_model_state_dict` of `peft/utils/save_and_load.py`, version 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from fedlora_cli.errors import InputError
from fedlora_cli.formats.peft.names import CONFIG, endings
from fedlora_cli.formats.peft.patterns import Matcher
from fedlora_cli.formats.peft.selection import with_parents

_PREFIX = "base_model.model."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_INNER = ".base_layer"

#: The index of the rank in the shape of each factor.
_RANK_SIDE = {
    "lora_A.weight": 0,
    "lora_B.weight": 1,
    "lora_embedding_A": 0,
    "lora_embedding_B": 1,
}

#: The two factors of a layer, by whether it is an embedding.
_FACTORS = {
    False: ("lora_A.weight", "lora_B.weight"),
    True: ("lora_embedding_A", "lora_embedding_B"),
}

#: The field of the config that adds each further tensor to a LoRA layer.
_FLAGS = {"lora_B.bias": "lora_bias", "lora_magnitude_vector": "use_dora"}

#: The name of a tensor in a LoRA layer.
_LAYER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (*_RANK_SIDE, *_FLAGS)))})")

#: Characters of an expression; a key of `rank_pattern` without them is a plain ending of names.
_SPECIAL = re.compile(r"[^A-Za-z0-9_]")

_Shape = tuple[int, ...]
_Pairs = Mapping[str, Mapping[str, _Shape]]


def check_loading(config: Mapping[str, Any], shapes: Mapping[str, _Shape]) -> None:
    """Raise InputError unless PEFT loads every tensor under this config, and needs no other.

    `shapes` are the shapes of the tensors by key. The modules of the base model are known only from
    the keys. The error names a tensor at fault.
    """
    file = _File()
    for key, shape in shapes.items():
        if not key.startswith(_PREFIX):
            raise _fault(key, f"its name does not begin with {_PREFIX}")
        file.add(key.removeprefix(_PREFIX), shape)
    if not file.layers:
        raise _fault("anything", "there are no factors")
    rules = _Rules(config)
    known = with_parents(file.modules())
    wrapped = {name for name in known if rules.selects(name)}
    for module in sorted(wrapped - set(file.layers)):
        raise _fault(module, "target_modules selects it, but it has no factors")
    for module, pairs in sorted(file.layers.items()):
        if module in wrapped:
            rules.check_layer(module, pairs)
        else:
            rules.check_parameters(module, pairs)
    rules.check_others(file, known)
    rules.check_tokens(file.tokens, known)


@dataclass
class _File:
    """The tensors of a file as PEFT sorts them by name: those of LoRA layers by module and by the
    common name of the pair, and rows of tokens by embedding.
    """

    layers: dict[str, dict[str, dict[str, _Shape]]] = field(default_factory=dict)
    tokens: dict[str, _Shape] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def add(self, name: str, shape: _Shape) -> None:
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            pairs = self.layers.setdefault(layer[1].partition(_INNER)[0], {})
            pairs.setdefault(layer[1], {})[layer[2]] = shape
        elif name.endswith(_TOKENS):
            self.tokens[name.removesuffix(_TOKENS).partition(_INNER)[0]] = shape
        else:
            self.others.append(name)

    def modules(self) -> Iterator[str]:
        yield from self.layers
        yield from self.tokens
        for name in self.others:
            outer, inner, _ = name.partition(_INNER)
            yield outer.removesuffix(".token_adapter") if inner else name.rpartition(".")[0]


class _Rules:
    """The rules that the fields of one config set."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.matcher = Matcher(CONFIG)
        target = config.get("target_modules")
        self.target = target if isinstance(target, str) else frozenset(target or ())
        self.excluded = config.get("exclude_modules") or []
        self.layers = config.get("layers_to_transform") or []
        patterns = [rf"(?:^|.*?\.){name}" for name in config.get("layers_pattern") or []]
        self.numbers = [rf"{start}\.(\d+)\." for start in patterns or [r".*?\.[^.]*"]]
        self.saved = tuple(config.get("modules_to_save") or ())
        self.parameters = tuple(config.get("target_parameters") or ())
        self.ranks = _Ranks(config.get("rank_pattern") or {}, config["r"], self.matcher)

    def selects(self, module: str) -> bool:
        """Whether `target_modules` selects a module with this name."""
        if any(self.matcher.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self._names(self.excluded, module) or not self._names(self.target, module):
            return False
        # PEFT checks layers only if a list selects the module by the ending of its name.
        if not self.layers or isinstance(self.target, str) or module in self.target:
            return True
        layers = (self.matcher.match(pattern, module) for pattern in self.numbers)
        layer = next(filter(None, layers), None)
        return layer is not None and int(layer[1]) in self.layers

    def _names(self, names: str | Collection[str], module: str) -> bool:
        if isinstance(names, str):
            return self.matcher.full(names, module)
        return any(ending in names for ending in endings(module))

    def check_layer(self, module: str, pairs: _Pairs) -> None:
        """Check the tensors of a selected module against its LoRA layer in PEFT."""
        rank = self.ranks.of(module)
        for pair, parts in pairs.items():
            self._check_whole(pair, parts)
            for part, shape in parts.items():
                if part in _FLAGS and not self.config.get(_FLAGS[part]):
                    raise _fault(f"{pair}.{part}", f"{_FLAGS[part]} is not set")
                if part in _RANK_SIDE and shape[_RANK_SIDE[part]] != rank:
                    reason = f"its shape is {list(shape)}, but the config gives it rank {rank}"
                    raise _fault(f"{pair}.{part}", reason)

    def _check_whole(self, pair: str, parts: Collection[str]) -> None:
        """Check that a layer has all tensors that PEFT needs."""
        factors = _FACTORS[any(part in parts for part in _FACTORS[True])]
        flagged = [part for part, flag in _FLAGS.items() if self.config.get(flag)]
        for part in (*factors, *flagged):
            if part not in parts:
                raise _fault(pair, f"it has no {part}")

    def check_parameters(self, module: str, pairs: _Pairs) -> None:
        """Check that `target_parameters` explains the pairs of a module that is not selected."""
        last = {name: name.rpartition(".")[2] for name in self.parameters}
        adapted = {n for name, n in last.items() if f".{module}.{n}".endswith(f".{name}")}
        nested = [module + depth * _INNER for depth in range(len(pairs))]
        if len(pairs) > len(adapted) or sorted(pairs) != nested:
            reason = "neither target_modules nor target_parameters selects it"
            raise _fault(min(pairs), reason)
        rows: list[int] = []
        for pair, parts in pairs.items():
            self._check_whole(pair, parts)
            rows.append(parts["lora_A.weight"][0])
            if rows[-1] != parts["lora_B.weight"][1]:
                raise _fault(pair, "its two factors differ in rank")
        # A single pair of a parameter without a module's name counts only with several experts.
        least = 2 if len(pairs) == 1 and adapted <= last.keys() else 1
        ranks = [self.ranks.of(f"{module}.{name}") for name in sorted(adapted)]
        experts = (
            {count / rank for count, rank in zip(rows, order, strict=True)}
            for order in permutations(ranks, len(rows))
        )
        if not any(len(n) == 1 and min(n) >= least and min(n) % 1 == 0 for n in experts):
            reason = f"{' and '.join(map(str, rows))} rows are no multiple of the config's ranks"
            raise _fault(module, reason)

    def check_others(self, file: _File, known: Collection[str]) -> None:
        """Check that each further tensor has a place, and each module to save a tensor."""
        owners = {name for name in known if self.saved and name.endswith(self.saved)}
        wrapped = {*file.layers, *file.tokens}
        filled: set[str] = set()
        for name in file.others:
            around = owners.intersection(with_parents([name]))
            filled |= around
            outer, inner, _ = name.partition(f"{_INNER}.")
            embedding = outer.removesuffix(".token_adapter")
            if around:
                continue
            if inner and embedding not in (file.layers if embedding == outer else file.tokens):
                raise _fault(name, f"PEFT puts no layer around {embedding}")
            if not inner and name.rpartition(".")[0] in wrapped:
                raise _fault(name, "PEFT puts a layer around its module")
        for owner in sorted(owners - filled):
            raise _fault(owner, "modules_to_save selects it, but it has no tensor")

    def check_tokens(self, tokens: Mapping[str, _Shape], known: Collection[str]) -> None:
        """Check that each tensor of rows belongs to one entry with the same number of tokens."""
        indices = self.config.get("trainable_token_indices") or {}
        if isinstance(indices, list):  # a list applies to the input embedding
            indices = {next(iter(tokens), ""): indices}
        rows: dict[str, int] = {}
        for ending, numbers in indices.items():
            for name in (name for name in known if name.endswith(ending)):
                if name in rows or name not in tokens:
                    reason = "trainable_token_indices selects it twice, or it has no rows"
                    raise _fault(name, reason)
                rows[name] = len(numbers)
        for embedding, shape in tokens.items():
            if rows.get(embedding) != shape[0]:
                reason = f"{shape[0]} rows, but {rows.get(embedding, 0)} trainable_token_indices"
                raise _fault(embedding, reason)


class _Ranks:
    """The rank of each module: that of the first matching pattern in the file, or `r`.

    Patterns that are plain endings are looked up in a table, so thousands of them stay fast.
    """

    def __init__(self, patterns: Mapping[str, int], otherwise: int, matcher: Matcher) -> None:
        self.values = [*patterns.values(), otherwise]
        self.matcher = matcher
        self.plain: dict[str, int] = {}
        self.expressions: list[tuple[int, str]] = []
        for place, pattern in enumerate(patterns):
            if _SPECIAL.search(pattern.removeprefix("^").replace(r"\.", "")):
                self.expressions.append((place, pattern))
            else:
                self.plain.setdefault(pattern.replace(r"\.", "."), place)

    def of(self, module: str) -> int:
        places = [
            self.plain[name] for name in (f"^{module}", *endings(module)) if name in self.plain
        ]
        for place, pattern in self.expressions:
            if self.matcher.match(rf"(.*\.)?({pattern})$", module, pattern) is not None:
                places.append(place)
        return self.values[min(places, default=-1)]


def _fault(name: str, reason: str) -> InputError:
    found = f"PEFT would not load {name}: {reason}"
    return InputError(CONFIG, found, "give all clients one configuration, or report this bug")
