"""The shapes of real models: what LoRA adapts in one layer, and how many layers there are.

Sources: the config.json of each model on the Hugging Face hub; names as PEFT 0.21 saves them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Module:
    """One adapted module of a layer: ΔW is (out, in), for each of its `experts`."""

    name: str
    rows: int
    columns: int
    experts: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """The two sides, the larger first: a matrix and its transpose are the same work."""
        return max(self.rows, self.columns), min(self.rows, self.columns)


@dataclass(frozen=True)
class Model:
    """A model to make adapters of; `parameters` are those that PEFT's `target_parameters` names.

    `prefix` stands before the number of a layer.
    """

    name: str
    prefix: str
    layers: int
    modules: tuple[Module, ...]
    parameters: tuple[str, ...] = ()

    @property
    def numbers_per_rank(self) -> int:
        """What one unit of rank holds in one layer: sum of experts · (out + in)."""
        return sum(one.experts * (one.rows + one.columns) for one in self.modules)

    def narrowed(self, by: int) -> Model:
        """The same modules with all sides divided by that."""
        narrow = [
            replace(one, rows=one.rows // by, columns=one.columns // by) for one in self.modules
        ]
        return replace(self, name=f"{self.name}/{by}", modules=tuple(narrow))

    def shapes(self) -> Counter[tuple[int, int]]:
        """How many modules of each pair of sides one layer has."""
        counts: Counter[tuple[int, int]] = Counter()
        for one in self.modules:
            counts[one.sides] += one.experts
        return counts

    def examples(self) -> dict[tuple[int, int], Module]:
        """One module of each pair of sides, to measure in place of all of them."""
        return {one.sides: one for one in reversed(self.modules)}


def _llama(name: str, layers: int, hidden: int, keys: int, inner: int) -> Model:
    """Grouped queries (`keys` is the width of keys and values) and a gated feed-forward."""
    modules = (
        Module("self_attn.q_proj", hidden, hidden),
        Module("self_attn.k_proj", keys, hidden),
        Module("self_attn.v_proj", keys, hidden),
        Module("self_attn.o_proj", hidden, hidden),
        Module("mlp.gate_proj", inner, hidden),
        Module("mlp.up_proj", inner, hidden),
        Module("mlp.down_proj", hidden, inner),
    )
    return Model(name, "model.layers.", layers, modules)


#: Qwen3-30B-A3B: the experts of a layer share one pair of factors for each of their parameters.
_MIXTURE = Model(
    "mixture-30b",
    "model.layers.",
    48,
    (
        Module("self_attn.q_proj", 4096, 2048),
        Module("self_attn.k_proj", 512, 2048),
        Module("self_attn.v_proj", 512, 2048),
        Module("self_attn.o_proj", 2048, 4096),
        Module("mlp.experts.base_layer", 1536, 2048, experts=128),
        Module("mlp.experts", 2048, 768, experts=128),
    ),
    parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)

_VIT = Model(
    "vit-b",
    "vit.layers.",
    12,
    (
        *(Module(f"attention.{one}_proj", 768, 768) for one in "qkvo"),
        Module("mlp.fc1", 3072, 768),
        Module("mlp.fc2", 768, 3072),
    ),
)

_BERT = Model(
    "bert-base",
    "bert.encoder.layer.",
    12,
    (
        *(Module(f"attention.self.{one}", 768, 768) for one in ("query", "key", "value")),
        Module("attention.output.dense", 768, 768),
        Module("intermediate.dense", 3072, 768),
        Module("output.dense", 768, 3072),
    ),
)

#: One square module, for what is measured of a single one.
_SQUARE = Model("square", "layers.", 32, (Module("proj", 4096, 4096),))

MODELS = {
    model.name: model
    for model in (
        _llama("llama-8b", 32, 4096, 1024, 14336),
        _llama("llama-70b", 80, 8192, 1024, 28672),
        _MIXTURE,
        _VIT,
        _BERT,
        _SQUARE,
    )
}


def model_of(name: str) -> Model:
    """A model by its name, narrowed where the name says so.

    >>> model_of("llama-8b/4").modules[0]
    Module(name='self_attn.q_proj', rows=1024, columns=1024, experts=1)
    """
    known, _, by = name.partition("/")
    return MODELS[known].narrowed(int(by)) if by else MODELS[known]
