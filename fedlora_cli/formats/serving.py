"""The adapters that inference servers can load, by rules taken from the servers' sources.

No server is started. The rules do not cover whether a server supports the base model and its
module names. A test compares the rules with the sources (tests/support/server_sources.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.adapters.adapter import FactorLayout
from fedlora_cli.formats import server_checks as checks
from fedlora_cli.formats.server_checks import Check, Obstacle, Output

#: The values of vLLM's --max-lora-rank, whose default is 16 (MaxLoRARanks in vllm/config/lora.py).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def obstacles(target: str, output: Output) -> tuple[Obstacle, ...]:
    """The parts of the output that this server cannot load. Raises KeyError for unknown servers.

    >>> from fedlora_cli.adapters.adapter import AdapterMetadata
    >>> layouts = (FactorLayout("linear", "layers.0.o_proj"),)
    >>> plain = Output("peft", 600, None, layouts, {}, AdapterMetadata())
    >>> [obstacle.found for obstacle in obstacles("vllm", plain)], obstacles("sglang", plain)
    (['rank 600 (its largest --max-lora-rank is 512)'], ())
    """
    rules = TARGETS[target]
    if output.format != "peft":
        return (Obstacle(f"adapters in the format {output.format}", "train with PEFT"),)
    return tuple(obstacle for check in rules if (obstacle := check(output)) is not None)


def asks_for_ties(target: str, layouts: Sequence[FactorLayout]) -> bool:
    """Whether this server needs to know if the base model ties its embeddings to its head."""
    return target == "llama.cpp" and any(
        layout.kind == "embedding" or checks.is_head(layout.pair) for layout in layouts
    )


def doubts(target: str, output: Output) -> tuple[str, ...]:
    """Unknown conditions that decide whether this server loads the output."""
    modules = checks.heads_and_embeddings(output)
    if target != "llama.cpp" or output.tied is not None or not modules:
        return ()
    return (
        f"llama.cpp loads factors of {modules[0]} only if the base model does not tie its "
        "embeddings; no config.json of the base model on this machine says so",
    )


#: The checks for every server. fedlora never writes rank_pattern, alpha_pattern and rsLoRA, which
#: SGLang and llama.cpp ignore; the servers cast other dtypes.
TARGETS: dict[str, tuple[Check, ...]] = {
    "peft": (),
    "vllm": (
        checks.rank_at_most(VLLM_RANKS[-1], "--max-lora-rank"),
        # vLLM refuses these fields of the config.
        checks.one_classifier,
        checks.without_field("dora"),
        checks.biases,
        checks.without_field("lora_bias"),
        checks.without_field("invocation_tokens"),
        checks.without_field("layer_replication"),
        # vLLM refuses tensors other than factors and heads, but ignores the base weights of the
        # two embeddings.
        checks.without_role("token"),
        checks.without_role("base", but=checks.is_embedding_of_base),
        # vLLM has LoRA for linear layers, embeddings, and fused experts, which need both pairs.
        checks.without_kind("convolution"),
        checks.experts_in_pairs,
    ),
    "sglang": (
        checks.without_field("dora"),
        # SGLang drops tensors that are not factors silently, or takes them for a lora_B.
        *checks.FACTORS_ALONE,
        checks.without_role("base", but=checks.is_embedding_of_base),
        # SGLang has LoRA for linear layers, embeddings, and experts named by number or projection.
        # PEFT's names of fused experts show neither.
        checks.without_kind("convolution"),
        checks.without_kind("experts"),
        checks.names_alone,
        checks.IN_LAYERS,
        checks.DISTINCT,
        checks.PACKED,
        # SGLang does not read these two fields of the config.
        checks.without_field("invocation_tokens"),
        checks.without_field("layer_replication"),
    ),
    "llama.cpp": (
        # The converter takes factors and norms; the loader silently ignores the norms.
        checks.without_field("dora"),
        *checks.FACTORS_ALONE,
        checks.without_role("base", but=checks.is_base_layer),
        # Factors must be matrices of one rank, for all experts or for none.
        checks.without_kind("convolution"),
        checks.without_kind("experts"),
        checks.WHOLE_EXPERTS,
        checks.untied,
        checks.of_tokens,
        # The converter transposes GPT-2's weights, but not B A.
        checks.without_field("fan_in_fan_out"),
        # The converter maps only the layers of the base model.
        checks.without_field("layer_replication"),
    ),
}
