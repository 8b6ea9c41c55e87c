"""Statements in the servers' sources on which `fedlora_cli.formats.serving` relies.

`tests/documents/test_server_sources.py` looks for each statement in the installed server, or in a
folder named by `FEDLORA_VLLM`, `FEDLORA_SGLANG` or `FEDLORA_LLAMA_CPP`.
"""

from __future__ import annotations

from typing import NamedTuple

#: The versions that were read; of llama.cpp, the commit of convert_lora_to_gguf.py.
VERSIONS = {
    "vllm": "0.33.0",
    "sglang": "0.5.23",
    "llama.cpp": "0b03adaa632b76c7651dd1f6fa3b7a0b5eda479c",
}


class Statement(NamedTuple):
    """A few words in a file of a server, and their consequence."""

    file: str
    words: str
    means: str


_LORA = "vllm/lora"
_SRT = "sglang/srt"

STATEMENTS: dict[str, tuple[Statement, ...]] = {
    "vllm": (
        Statement(
            "vllm/config/lora.py",
            "MaxLoRARanks = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]",
            "a rank of at most 512",
        ),
        Statement(
            f"{_LORA}/peft_helper.py",
            'if m not in ["classifier", "score"]',
            "modules_to_save of these two alone",
        ),
        Statement(
            f"{_LORA}/lora_model.py",
            "Only one full classification module is supported per",
            "one of them at a time",
        ),
        Statement(
            f"{_LORA}/utils.py", 'elif parts[-2] in ["score", "classifier"]:', "a linear layer"
        ),
        Statement(f"{_LORA}/peft_helper.py", "if self.use_dora:", "no DoRA"),
        Statement(f"{_LORA}/peft_helper.py", 'if self.bias != "none":', "no biases"),
        Statement(f"{_LORA}/peft_helper.py", "if self.lora_bias:", "no biases on lora_B"),
        Statement(f"{_LORA}/peft_helper.py", "if self.alora_invocation_tokens:", "no aLoRA"),
        Statement(f"{_LORA}/peft_helper.py", "if self.layer_replication:", "no replicated layers"),
        Statement(f"{_LORA}/utils.py", "is unsupported LoRA weight", "no tensors but factors"),
        Statement(
            f"{_LORA}/utils.py", '".lm_head.base_layer.weight"', "base weights are passed over"
        ),
        Statement(
            f"{_LORA}/model_manager.py",
            "assert gate_up_proj_lora is not None",
            "both pairs of experts",
        ),
    ),
    "sglang": (
        Statement(
            f"{_SRT}/lora/lora.py", 'weight_name.replace("q_proj", "v_proj")', "no q without v"
        ),
        Statement(
            f"{_SRT}/lora/lora.py",
            'if "k_proj" in target_module',
            "no q without k where the layer has a k",
        ),
        Statement(
            f"{_SRT}/lora/lora.py", "Orphan up_proj weights (no matching gate_proj)", "up alone"
        ),
        Statement(f"{_SRT}/lora/lora.py", '"kv_a_proj_with_mqa"', "latent attention is packed"),
        Statement(
            f"{_SRT}/lora/mem_pool.py",
            "target_module = get_target_module_name(name, self.target_modules)",
            "what has no place in a layer is an error",
        ),
        Statement(
            f"{_SRT}/lora/utils.py", "Cannot find target module name for", "k, v or up alone"
        ),
        Statement(
            f"{_SRT}/lora/utils.py",
            "can be used as the string for target module",
            "no expression as target_modules",
        ),
        Statement(
            f"{_SRT}/lora/lora.py",
            'elif "embed_tokens" in name or "lm_head" in name:',
            "other modules outside the layers are dropped",
        ),
        Statement(f"{_SRT}/layers/utils/common.py", r'r"layers\.(\d+)\."', "what a layer is"),
        Statement(
            f"{_SRT}/lora/mem_pool.py",
            r'expert_match = re.search(r"experts\.(\d+)\.", name)',
            "experts one by one",
        ),
        Statement(f"{_SRT}/lora/lora_manager.py", "doesn't support DoRA adapters", "no DoRA"),
    ),
    "llama.cpp": (
        Statement("convert_lora_to_gguf.py", "Not a lora_A or lora_B tensor", "factors alone"),
        Statement(
            "convert_lora_to_gguf.py", 'if ".base_layer.weight" in name:', "base weights pass"
        ),
        Statement(
            "convert_lora_to_gguf.py",
            "lm_head is present in adapter, but is ignored in base model",
            "no lm_head of a tied base",
        ),
        Statement(
            "convert_lora_to_gguf.py", "assert A.shape[-2] == B.shape[-1]", "factors are matrices"
        ),
        Statement(
            "src/llama-adapter.cpp", "TODO: add support for norm vector", "norms are dropped"
        ),
        Statement("src/llama-adapter.cpp", "has unexpected suffix", "no biases of norms"),
        Statement(
            "src/llama-adapter.cpp", 'str_endswith(name, "token_embd.weight")', "A is transposed"
        ),
    ),
}
