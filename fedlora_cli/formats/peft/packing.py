"""Modules that SGLang or llama.cpp cannot find, cannot tell apart, or cannot pack into one."""

from __future__ import annotations

import re
from collections.abc import Collection

#: The layer and the expert in a module's name, as SGLang finds them.
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(\d+)\.")

#: The modules outside the layers that SGLang reads.
_EMBEDDINGS = ("embed_tokens", "lm_head")

#: The module that SGLang needs to pack another with it into qkv_proj, gate_up_proj, or the
#: projections of latent attention. Only k_proj and up_proj may be missing: they count as zero.
_NEEDED = {
    "q_proj": "v_proj",
    "k_proj": "q_proj",
    "v_proj": "q_proj",
    "up_proj": "gate_proj",
    "w3": "w1",
    "kv_a_proj_with_mqa": "q_a_proj",
}


def _layer(name: str) -> str | None:
    layer = _LAYER.search(f"{name}.")
    return None if layer is None else layer[1]


def unpacked(names: Collection[str]) -> tuple[str, str] | None:
    """A module that cannot be packed, and the missing module that it needs.

    >>> unpacked(["layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"])
    ('layers.1.q_proj', 'v_proj')
    >>> unpacked(["layers.0.q_proj", "layers.0.v_proj", "layers.0.gate_proj"])
    """
    known = set(names)
    with_k = {_layer(name) for name in names if name.endswith("k_proj")}
    for name in sorted(names):
        around, _, last = name.rpartition(".")
        needed = [_NEEDED[last]] if last in _NEEDED else []
        # If one attention of a layer has a k_proj, every attention of the layer needs one.
        needed += ["k_proj"] if last == "q_proj" and _layer(name) in with_k else []
        for other in needed:
            if f"{around}.{other}".lstrip(".") not in known:
                return name, other
    return None


def outside_layers(names: Collection[str]) -> tuple[str] | None:
    """A module that is neither in a numbered layer nor an embedding: SGLang ignores it.

    >>> outside_layers(["layers.0.q_proj", "lm_head"]), outside_layers(["h.0.attn.c_attn"])
    (None, ('h.0.attn.c_attn',))
    """
    for name in sorted(names):
        if _layer(name) is None and name.rpartition(".")[2] not in _EMBEDDINGS:
            return (name,)
    return None


def confused(names: Collection[str]) -> tuple[str, str] | None:
    """Two modules with the same layer and last name, of which SGLang keeps only the second: of an
    encoder and a decoder, of two attentions, of an image and a language model.

    >>> confused(["text.layers.0.o_proj", "vision.layers.0.o_proj"])
    ('text.layers.0.o_proj', 'vision.layers.0.o_proj')
    >>> confused(["layers.0.experts.0.w1", "layers.0.experts.1.w1", "layers.1.experts.0.w1"])
    """
    first: dict[tuple[str | None, str | None, str], str] = {}
    for name in sorted(names):
        expert = _EXPERT.search(name)
        key = _layer(name), None if expert is None else expert[1], name.rpartition(".")[2]
        other = first.setdefault(key, name)
        if other != name:
            return other, name
    return None


def incomplete_experts(names: Collection[str]) -> tuple[str] | None:
    """The first module of numbered experts of which not all have the same adapted modules.

    >>> incomplete_experts(["mlp.experts.0.w1", "mlp.experts.0.w2", "mlp.experts.1.w1"])
    ('mlp.experts.0.w1',)
    """
    groups: dict[str, dict[str, set[str]]] = {}
    first: dict[str, str] = {}
    for name in sorted(names):
        expert = _EXPERT.search(name)
        if expert is not None:
            around, rest = name[: expert.start()], name[expert.end() :]
            groups.setdefault(around, {}).setdefault(expert[1], set()).add(rest)
            first.setdefault(around, name)
    for around, experts in groups.items():
        alike = len({frozenset(modules) for modules in experts.values()}) == 1
        if not alike or sorted(map(int, experts)) != list(range(len(experts))):
            return (first[around],)
    return None
