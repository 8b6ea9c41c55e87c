"""Which adapters the servers of PEFT adapters can load, as their sources say; none is asked.

Whether a server knows the base model, and its layers by these names, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedlora_cli.adapter import Facts, FullTensor, Kind, Layout, Role


@dataclass(frozen=True, eq=False)
class Output:
    """What is known of an adapter before it is made. `rank` is None while nobody knows, `decided`
    the option that decides it, if one does.
    """

    format: str
    rank: int | None
    decided: str | None
    layouts: tuple[Layout, ...]
    tensors: Mapping[str, FullTensor]
    facts: Facts


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

    >>> plain = Output("peft", 600, None, (Layout("linear", "layers.0.q_proj"),), {}, Facts())
    >>> [one.found for one in obstacles("vllm", plain)], obstacles("sglang", plain)
    (['rank 600 (its largest --max-lora-rank is 512)'], ())
    """
    found = (check(output) for check in (_in_peft_format, *TARGETS[target]))
    return tuple(one for one in found if one is not None)


def _in_peft_format(output: Output) -> Obstacle | None:
    if output.format == "peft":
        return None
    return Obstacle(f"adapters in the format {output.format}", "train with PEFT")


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
        names = [n for n, one in output.tensors.items() if one.role == role and not but(n)]
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


def _is_norm(name: str) -> bool:
    return "_layernorm" in name or ".norm" in f".{name}"


#: What to check for every server. rank_pattern, alpha_pattern and rsLoRA, which vLLM, SGLang and
#: llama.cpp pass over or partly so, are never written; other dtypes are cast. As of 2026-11.
TARGETS: dict[str, tuple[Check, ...]] = {
    "peft": (),
    "vllm": (
        _rank_at_most(VLLM_RANKS[-1], "--max-lora-rank"),
        # vllm/lora/peft_helper.py: modules_to_save and DoRA are refused, bias is "none" only.
        _without_role("saved"),
        _DORA,
        _without_role("bias"),
        # vllm/lora/utils.py: other names than of two factors are an "unsupported LoRA weight" ...
        _without_role("token"),
        _without_role("lora_bias"),
        # ... but for the base weights of the two embeddings, which are passed over.
        _without_role("base", but=_is_embedding_of_base),
        # vllm/lora/utils.py: the layers that take LoRA are linear, embeddings, or fused experts.
        _without_kind("convolution"),
        # vllm/lora/model_manager.py: `experts.base_layer` and `experts` are asserted to be there.
        _experts_in_pairs,
        # vllm/lora/peft_helper.py: fields that it does not know are dropped, these two among them;
        # support of activated LoRA (pull request 19710) was closed without being merged.
        _ACTIVATED,
        _REPLICATION,
    ),
    "sglang": (
        # sglang/srt/lora/lora_manager.py: DoRA is refused; --max-lora-rank may be any number.
        _DORA,
        # sglang/srt/lora/lora.py: what is no factor is dropped in silence, or taken for a lora_B.
        _without_role("saved"),
        _without_role("bias"),
        _without_role("token"),
        _without_role("lora_bias"),
        # sglang/srt/lora/layers.py: linear layers, embeddings and experts that are named one by one
        # or by projection, which PEFT's names of fused experts do not tell.
        _without_kind("convolution"),
        _without_kind("experts"),
        # sglang/srt/lora/lora_config.py reads neither of the two; issue 16942 asks for the first.
        _ACTIVATED,
        _REPLICATION,
    ),
    "llama.cpp": (
        # convert_lora_to_gguf.py: any tensor but factors, norms and `.base_layer.weight` ends it.
        _DORA,
        _without_role("saved", but=_is_norm),
        _without_role("bias", but=_is_norm),
        _without_role("token"),
        _without_role("lora_bias"),
        _without_role("base", but=_is_base_layer),
        # convert_lora_to_gguf.py, LoraTorchTensor: A and B are matrices that share one rank.
        _without_kind("convolution"),
        _without_kind("experts"),
        # convert_hf_to_gguf.py transposes the weights of GPT-2, and with them B A, which is not.
        _TRANSPOSED,
        # convert_hf_to_gguf.py knows as many layers as the base model has.
        _REPLICATION,
    ),
}
