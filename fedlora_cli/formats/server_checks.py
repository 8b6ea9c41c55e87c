"""Checks of an adapter for the inference servers: each returns an obstacle or None."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora_cli.adapters.adapter import (
    BASE_LAYER,
    AdapterMetadata,
    FactorLayout,
    FullTensor,
    Kind,
    Role,
)
from fedlora_cli.formats.peft.names import EMBEDDINGS, OUTPUT, wrapped
from fedlora_cli.formats.peft.packing import confused, incomplete_experts, outside_layers, unpacked


@dataclass(frozen=True, eq=False)
class Output:
    """The known facts about an adapter before it is made.

    - `rank`: None if not known yet; `decided` is the option that sets it, if there is one.
    - `targets`, `saved`: `target_modules` and `modules_to_save` of its config.
    - `tied`: whether the base model ties its head to its embeddings; None if not known.
    """

    format: str
    rank: int | None
    decided: str | None
    layouts: tuple[FactorLayout, ...]
    tensors: Mapping[str, FullTensor]
    metadata: AdapterMetadata
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
    """A part that a server cannot load, the remedy, and the option at fault, if there is one."""

    found: str
    cure: str
    option: str | None = None


Check = Callable[[Output], Obstacle | None]


def rank_at_most(most: int, name: str) -> Check:
    def check(output: Output) -> Obstacle | None:
        if output.rank is None or output.rank <= most:
            return None
        found = f"rank {output.rank} (its largest {name} is {most})"
        return Obstacle(found, f"give --rank {most} or less", output.decided)

    return check


#: Kinds of factors and roles of tensors that a server refuses, with the remedy.
_KINDS: dict[Kind, tuple[str, str]] = {
    "convolution": ("factors of convolutions", "adapt linear layers only"),
    "experts": ("factors of fused experts", "train without target_parameters"),
}
ROLES: dict[Role, tuple[str, str]] = {
    "saved": ("modules that are saved in full", "train without modules_to_save"),
    "base": ("weights of the base model", "train without save_embedding_layers"),
    "bias": ("trained biases", "train with bias none"),
    "token": ("trained tokens", "train without trainable_token_indices"),
    "lora_bias": ("biases on lora_B", "train without lora_bias"),
}


def without_kind(kind: Kind) -> Check:
    def check(output: Output) -> Obstacle | None:
        kinds = {layout.kind for layout in output.layouts}
        return Obstacle(*_KINDS[kind]) if kind in kinds else None

    return check


def without_role(role: Role, but: Callable[[str], bool] = lambda name: False) -> Check:
    """A check for tensors in this role, except those with names for which `but` is true."""

    def check(output: Output) -> Obstacle | None:
        pairs = {layout.pair for layout in output.layouts}
        tensors = output.tensors.items()
        keys = [wrapped(name, pairs, ()) for name, tensor in tensors if tensor.role == role]
        names = [key for key in keys if not but(key)]
        if not names:
            return None
        meaning, cure = ROLES[role]
        return Obstacle(f"{meaning} ({min(names)})", cure)

    return check


#: Fields of the metadata that a server refuses, with their meaning and the remedy.
_FIELDS = {
    "dora": ("DoRA", "train without use_dora"),
    "lora_bias": ROLES["lora_bias"],
    "layer_replication": ("replicated layers", "train without layer_replication"),
    "invocation_tokens": ("activated LoRA", "train without alora_invocation_tokens"),
    "fan_in_fan_out": ("factors of GPT-2's Conv1D", "merge it into the base model with PEFT"),
}


def without_field(name: str) -> Check:
    return lambda output: Obstacle(*_FIELDS[name]) if getattr(output.metadata, name) else None


def biases(output: Output) -> Obstacle | None:
    """vLLM checks only the config, which may allow biases although no module has one."""
    obstacle = without_role("bias")(output)
    if obstacle is None and output.metadata.bias != "none":
        return Obstacle(f"bias {output.metadata.bias} in the config", ROLES["bias"][1])
    return obstacle


#: The heads that vLLM loads in full, at most one per adapter.
_VLLM_HEADS = ("classifier", "score")


def one_classifier(output: Output) -> Obstacle | None:
    """No module is saved in full except one classifier that is a linear layer."""
    saved = {name: tensor for name, tensor in output.tensors.items() if tensor.role == "saved"}
    if not saved:
        return None
    head = min(name.rpartition(".")[0] for name in saved)
    weight = saved.get(f"{head}.weight")
    linear = weight is not None and len(weight.shape) == 2
    alone = set(saved) <= {f"{head}.weight", f"{head}.bias"}
    if linear and alone and {*output.saved, head.rpartition(".")[2]} <= {*_VLLM_HEADS}:
        return None
    return without_role("saved")(output)


def names_alone(output: Output) -> Obstacle | None:
    if not isinstance(output.targets, str):
        return None
    return Obstacle("an expression as target_modules", "name the modules in a list")


def _of_names(
    find: Callable[[Sequence[str]], tuple[str, ...] | None], found: str, cure: str
) -> Check:
    """A check for modules that `find` returns; both texts have places for their names."""

    def check(output: Output) -> Obstacle | None:
        names = find(output.pairs)
        return None if names is None else Obstacle(found.format(*names), cure.format(*names))

    return check


_LEAVE_OUT = "leave them out of target_modules"
IN_LAYERS = _of_names(
    outside_layers,
    "modules outside the numbered layers, except embed_tokens and lm_head ({0})",
    _LEAVE_OUT,
)
DISTINCT = _of_names(
    confused, "two modules of one name in one layer ({0} and {1})", "adapt one of them"
)
PACKED = _of_names(unpacked, "{0} without {1}", "add {1} to target_modules")
WHOLE_EXPERTS = _of_names(
    incomplete_experts, "experts that are not adapted alike ({0})", "adapt all experts alike"
)


def is_head(pair: str) -> bool:
    return pair.rpartition(".")[2] == OUTPUT


def _embeddings(output: Output) -> list[str]:
    return sorted({layout.pair for layout in output.layouts if layout.kind == "embedding"})


def heads_and_embeddings(output: Output) -> list[str]:
    return [*filter(is_head, output.pairs), *_embeddings(output)]


def untied(output: Output) -> Obstacle | None:
    """The converter refuses a head that the base model does not have. The graph multiplies with
    the factors of embeddings as if they were a head's, which ends the process.
    """
    modules = heads_and_embeddings(output)
    if not output.tied or not modules:
        return None
    found = f"factors of {', '.join(modules)} on a base model that ties its embeddings"
    return Obstacle(found, _LEAVE_OUT)


def of_tokens(output: Output) -> Obstacle | None:
    for name in _embeddings(output):
        if re.search("posit|wpe|token_type", name):
            return Obstacle(f"embeddings of something other than tokens ({name})", _LEAVE_OUT)
    return None


def experts_in_pairs(output: Output) -> Obstacle | None:
    pairs = {layout.pair for layout in output.layouts if layout.kind == "experts"}
    inner = {pair for pair in pairs if pair.endswith(BASE_LAYER)}
    if {f"{pair}{BASE_LAYER}" for pair in pairs - inner} == inner:
        return None
    found = "experts with only one of gate_up_proj and down_proj adapted"
    return Obstacle(found, "name both in target_parameters")


def is_embedding_of_base(name: str) -> bool:
    return f".{name}".endswith(tuple(f".{module}{BASE_LAYER}.weight" for module in EMBEDDINGS))


def is_base_layer(name: str) -> bool:
    return f"{BASE_LAYER}.weight" in f".{name}"


#: Tensors that SGLang and llama.cpp drop silently or take for other tensors.
FACTORS_ALONE = tuple(without_role(role) for role in ROLES if role != "base")
