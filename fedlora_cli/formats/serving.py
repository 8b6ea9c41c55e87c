"""Which adapters the servers of PEFT adapters can load, as their sources say; none is asked.

Whether a server knows the base model, and its layers by these names, is not known here. The
versions that were read, and what stands in them, are in `sources`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora_cli.adapters.adapter import AdapterMetadata, FactorLayout, FullTensor, Kind, Role
from fedlora_cli.formats.peft.names import wrapped
from fedlora_cli.formats.peft.packing import confused, incomplete_experts, outside_layers, unpacked


@dataclass(frozen=True, eq=False)
class Output:
    """What is known of an adapter before it is made. `rank` is None while nobody knows, `decided`
    the option that decides it, if one does. `targets` and `saved` are `target_modules` and
    `modules_to_save` of its config; `tied` says whether the base model's head is its embeddings,
    None where that is not known.
    """

    format: str
    rank: int | None
    decided: str | None
    layouts: tuple[FactorLayout, ...]
    tensors: Mapping[str, FullTensor]
    facts: AdapterMetadata
    targets: Sequence[str] | str = ()
    saved: Sequence[str] = ()
    tied: bool | None = None

    @property
    def pairs(self) -> list[str]:
        """The linear layers and embeddings."""
        kinds = ("linear", "embedding")
        return sorted({layout.pair for layout in self.layouts if layout.kind in kinds})


@dataclass(frozen=True)
class Obstacle:
    """What a server cannot load, the way out, and the option at fault, if it is one."""

    found: str
    cure: str
    option: str | None = None


Check = Callable[[Output], Obstacle | None]

#: vllm/config/lora.py: MaxLoRARanks, what --max-lora-rank can be. Its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def obstacles(target: str, output: Output) -> tuple[Obstacle, ...]:
    """All that keeps this server from loading the output. Raises KeyError for one not in TARGETS.

    >>> layouts = (FactorLayout("linear", "layers.0.o_proj"),)
    >>> plain = Output("peft", 600, None, layouts, {}, AdapterMetadata())
    >>> [one.found for one in obstacles("vllm", plain)], obstacles("sglang", plain)
    (['rank 600 (its largest --max-lora-rank is 512)'], ())
    """
    checks = TARGETS[target]
    if output.format != "peft":
        return (Obstacle(f"adapters in the format {output.format}", "train with PEFT"),)
    found = (check(output) for check in checks)
    return tuple(one for one in found if one is not None)


def asks_for_ties(target: str, layouts: Sequence[FactorLayout]) -> bool:
    """Whether it matters to this server that a base model ties its embeddings to its head."""
    if target != "llama.cpp":
        return False
    return any(one.kind == "embedding" or _is_head(one.pair) for one in layouts)


def doubts(target: str, output: Output) -> tuple[str, ...]:
    """What decides whether this server loads the output, and is not known here."""
    if target != "llama.cpp" or output.tied is not None:
        return ()
    both = [*_heads(output), *_embeddings(output)]
    if not both:
        return ()
    return (
        f"llama.cpp loads factors of {both[0]} only if the base model does not tie its embeddings; "
        "no config.json of the base model on this machine says so",
    )


def _rank_at_most(most: int, name: str) -> Check:
    def check(output: Output) -> Obstacle | None:
        if output.rank is None or output.rank <= most:
            return None
        found = f"rank {output.rank} (its largest {name} is {most})"
        return Obstacle(found, f"give --rank {most} or less", output.decided)

    return check


#: What is refused of factors, tensors and facts, with the way out.
_KINDS: dict[Kind, tuple[str, str]] = {
    "convolution": ("factors of convolutions", "adapt linear layers only"),
    "experts": ("factors of fused experts", "train without target_parameters"),
}
_ROLES: dict[Role, tuple[str, str]] = {
    "saved": ("modules that are saved in full", "train without modules_to_save"),
    "base": ("weights of the base model", "train without save_embedding_layers"),
    "bias": ("trained biases", "train with bias none"),
    "token": ("trained tokens", "train without trainable_token_indices"),
    "lora_bias": ("biases on lora_B", "train without lora_bias"),
}


def _without_kind(kind: Kind) -> Check:
    def check(output: Output) -> Obstacle | None:
        if all(layout.kind != kind for layout in output.layouts):
            return None
        return Obstacle(*_KINDS[kind])

    return check


def _without_role(role: Role, but: Callable[[str], bool] = lambda name: False) -> Check:
    """No tensors in that role, but for those whose names are read or passed over."""

    def check(output: Output) -> Obstacle | None:
        pairs = {layout.pair for layout in output.layouts}
        keys = [wrapped(n, pairs, ()) for n, one in output.tensors.items() if one.role == role]
        names = [key for key in keys if not but(key)]
        if not names:
            return None
        meaning, cure = _ROLES[role]
        return Obstacle(f"{meaning} ({min(names)})", cure)

    return check


def _without_fact(name: str, meaning: str, cure: str) -> Check:
    return lambda output: Obstacle(meaning, cure) if getattr(output.facts, name) else None


_DORA = _without_fact("dora", "DoRA", "train without use_dora")
_REPLICATION = _without_fact(
    "layer_replication", "replicated layers", "train without layer_replication"
)
_ACTIVATED = _without_fact(
    "invocation_tokens", "activated LoRA", "train without alora_invocation_tokens"
)
_TRANSPOSED = _without_fact(
    "fan_in_fan_out", "factors of GPT-2's Conv1D", "merge it into the base model with PEFT"
)


def _biases(output: Output) -> Obstacle | None:
    """vLLM asks the config alone, which may name biases where no module has one."""
    found = _without_role("bias")(output)
    if found is None and output.facts.bias != "none":
        return Obstacle(f"bias {output.facts.bias} in the config", _ROLES["bias"][1])
    return found


#: The heads that vLLM takes whole, one for an adapter.
_VLLM_HEADS = ("classifier", "score")


def _one_classifier(output: Output) -> Obstacle | None:
    """No modules in full but one classifier, a linear layer."""
    saved = {name: one for name, one in output.tensors.items() if one.role == "saved"}
    heads = {name.rpartition(".")[0] for name in saved}
    if not heads:
        return None
    known = set(output.saved) <= set(_VLLM_HEADS) and len(heads) == 1
    matrices = {name: one for name, one in saved.items() if len(one.shape) == 2}
    [head, *_] = sorted(heads)
    linear = f"{head}.weight" in matrices and set(saved) <= {f"{head}.weight", f"{head}.bias"}
    if known and linear and head.rpartition(".")[2] in _VLLM_HEADS:
        return None
    return _without_role("saved")(output)


def _names_alone(output: Output) -> Obstacle | None:
    if not isinstance(output.targets, str):
        return None
    return Obstacle("an expression as target_modules", "name the modules in a list")


def _of_names(
    find: Callable[[Sequence[str]], tuple[str, ...] | None], found: str, cure: str
) -> Check:
    """None of the modules that `find` finds, which the two texts name."""

    def check(output: Output) -> Obstacle | None:
        names = find(output.pairs)
        return None if names is None else Obstacle(found.format(*names), cure.format(*names))

    return check


_LEAVE_OUT = "leave them out of target_modules"
_IN_LAYERS = _of_names(
    outside_layers,
    "modules outside the numbered layers, but embed_tokens and lm_head ({0})",
    _LEAVE_OUT,
)
_TOLD_APART = _of_names(
    confused, "two modules of one name in one layer ({0} and {1})", "adapt one of them"
)
_PACKED = _of_names(unpacked, "{0} without {1}", "add {1} to target_modules")
_WHOLE_EXPERTS = _of_names(
    incomplete_experts,
    "experts that are not adapted alike ({0})",
    "adapt all experts alike",
)


def _heads(output: Output) -> list[str]:
    return [pair for pair in output.pairs if _is_head(pair)]


def _is_head(pair: str) -> bool:
    return pair.rpartition(".")[2] == "lm_head"


def _embeddings(output: Output) -> list[str]:
    return sorted({one.pair for one in output.layouts if one.kind == "embedding"})


def _untied(output: Output) -> Obstacle | None:
    """The converter refuses a head that the base model does not have, and the graph multiplies with
    the factors of embeddings as if they were a head's, which ends the process.
    """
    both = [*_heads(output), *_embeddings(output)] if output.tied else []
    if not both:
        return None
    found = f"factors of {', '.join(both)} on a base model that ties its embeddings"
    return Obstacle(found, _LEAVE_OUT)


def _of_tokens(output: Output) -> Obstacle | None:
    """No embeddings but of tokens."""
    others = [name for name in _embeddings(output) if re.search("posit|wpe|token_type", name)]
    if not others:
        return None
    return Obstacle(f"embeddings of something else than tokens ({others[0]})", _LEAVE_OUT)


def _experts_in_pairs(output: Output) -> Obstacle | None:
    pairs = {layout.pair for layout in output.layouts if layout.kind == "experts"}
    inner = {pair for pair in pairs if pair.endswith(".base_layer")}
    if {f"{pair}.base_layer" for pair in pairs - inner} == inner:
        return None
    found = "experts with only one of gate_up_proj and down_proj adapted"
    return Obstacle(found, "name both in target_parameters")


def _is_embedding_of_base(name: str) -> bool:
    return f".{name}".endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight"))


def _is_base_layer(name: str) -> bool:
    return ".base_layer.weight" in f".{name}"


#: What to check for every server. rank_pattern, alpha_pattern and rsLoRA, which SGLang and
#: llama.cpp pass over, are never written; other dtypes are cast.
TARGETS: dict[str, tuple[Check, ...]] = {
    "peft": (),
    "vllm": (
        _rank_at_most(VLLM_RANKS[-1], "--max-lora-rank"),
        # Refused by name, in the config.
        _one_classifier,
        _DORA,
        _biases,
        _without_fact("lora_bias", *_ROLES["lora_bias"]),
        _ACTIVATED,
        _REPLICATION,
        # Other names than of two factors and heads are refused, ...
        _without_role("token"),
        # ... but for the base weights of the two embeddings, which are passed over.
        _without_role("base", but=_is_embedding_of_base),
        # The layers that take LoRA are linear, embeddings, or fused experts, whose two pairs are
        # asserted to be there.
        _without_kind("convolution"),
        _experts_in_pairs,
    ),
    "sglang": (
        _DORA,
        # What is no factor is dropped in silence, or taken for a lora_B.
        _without_role("saved"),
        _without_role("bias"),
        _without_role("token"),
        _without_role("lora_bias"),
        _without_role("base", but=_is_embedding_of_base),
        # Linear layers, embeddings and experts that are named one by one or by projection, which
        # PEFT's names of fused experts do not tell.
        _without_kind("convolution"),
        _without_kind("experts"),
        _names_alone,
        _IN_LAYERS,
        _TOLD_APART,
        _PACKED,
        # The config's fields that are read are few, and these two are not among them.
        _ACTIVATED,
        _REPLICATION,
    ),
    "llama.cpp": (
        # The converter takes factors and norms, and the loader passes over the norms in silence.
        _DORA,
        _without_role("saved"),
        _without_role("bias"),
        _without_role("token"),
        _without_role("lora_bias"),
        _without_role("base", but=_is_base_layer),
        # A and B are matrices that share one rank, of all experts or of none.
        _without_kind("convolution"),
        _without_kind("experts"),
        _WHOLE_EXPERTS,
        _untied,
        _of_tokens,
        # GPT-2's weights are transposed by the converter, and with them B A, which is not.
        _TRANSPOSED,
        # The converter knows as many layers as the base model has.
        _REPLICATION,
    ),
}
