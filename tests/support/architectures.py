"""Tiny models of many architectures, made of their configurations, for tests of the format."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

#: What most configurations call their sizes, or map to their own names.
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MLP = {"intermediate_size": 24}
GQA = MLP | {"num_key_value_heads": 1}
EXPERTS = GQA | {"num_experts_per_tok": 2, "num_key_value_heads": 2}
TWO_SIDED: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
T5: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
PIXELS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TEXT = SIZES | MLP


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, the class of its configuration, and sizes for it.

    `targets` are the last names of linear layers to adapt; `heads` of modules to save in full.
    """

    model: str
    config: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    heads: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        configuration = getattr(transformers, self.config)(**self.sizes, **self.more)
        configuration.architectures = [self.model]
        torch.manual_seed(0)
        # Some models print advice on faster code that they do without.
        with contextlib.redirect_stdout(io.StringIO()):
            model: nn.Module = getattr(transformers, self.model)(configuration)
        return model


def _causal(name: str, sizes: dict[str, Any], *targets: str, **more: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", sizes, targets, more=more)


QKV = ("q_proj", "v_proj")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _causal("Llama", SIZES | GQA, *QKV),
    "mistral": _causal("Mistral", SIZES | GQA, *QKV),
    "qwen2": _causal("Qwen2", SIZES | GQA, *QKV),
    "qwen3": _causal("Qwen3", SIZES | GQA, *QKV, head_dim=8),
    "gemma": _causal("Gemma", SIZES | GQA, *QKV, head_dim=8),
    "gemma2": _causal("Gemma2", SIZES | GQA, *QKV, head_dim=8),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | GQA | {"head_dim": 8}, QKV
    ),
    "phi": _causal("Phi", SIZES | MLP, "q_proj", "dense"),
    "phi3": _causal("Phi3", SIZES | GQA | {"pad_token_id": 0}, "qkv_proj", "o_proj"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", SIZES, ("c_attn",)),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2},
        QKV,
        more={"attention_types": [[["global"], 2]], "intermediate_size": 24},
    ),
    "gpt_neox": _causal("GPTNeoX", SIZES | MLP, "query_key_value"),
    "gptj": Architecture(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
        QKV,
    ),
    "opt": _causal(
        "OPT",
        SIZES | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
        *QKV,
    ),
    "bloom": _causal("Bloom", SIZES, "query_key_value"),
    "falcon": _causal("Falcon", SIZES, "query_key_value"),
    "mpt": Architecture(
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 2},
        ("Wqkv",),
    ),
    "stablelm": _causal("StableLm", SIZES | GQA, *QKV),
    "starcoder2": _causal("Starcoder2", SIZES | GQA, *QKV),
    "ctrl": Architecture(
        "CTRLLMHeadModel",
        "CTRLConfig",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24},
        ("Wq", "Wv"),
    ),
    "cohere": _causal("Cohere", SIZES | GQA, *QKV),
    "olmo": _causal("Olmo", SIZES | GQA, *QKV),
    "olmo2": _causal("Olmo2", SIZES | GQA, *QKV),
    "granite": _causal("Granite", SIZES | GQA, *QKV),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        ("in_proj", "x_proj"),
    ),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, ("q", "v")),
    "mt5": Architecture("MT5ForConditionalGeneration", "MT5Config", T5, ("q", "wo")),
    "umt5": Architecture("UMT5ForConditionalGeneration", "UMT5Config", T5, ("q", "v")),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", TWO_SIDED, QKV),
    "mbart": Architecture("MBartForConditionalGeneration", "MBartConfig", TWO_SIDED, QKV),
    "pegasus": Architecture("PegasusForConditionalGeneration", "PegasusConfig", TWO_SIDED, QKV),
    "marian": Architecture("MarianMTModel", "MarianConfig", TWO_SIDED, QKV),
    "m2m100": Architecture("M2M100ForConditionalGeneration", "M2M100Config", TWO_SIDED, QKV),
    "bert": Architecture(
        "BertForSequenceClassification",
        "BertConfig",
        TEXT,
        ("query", "value"),
        ("classifier",),
    ),
    "roberta": Architecture(
        "RobertaForTokenClassification", "RobertaConfig", TEXT, ("query",), ("classifier",)
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        ("q_lin",),
        ("pre_classifier", "classifier"),
    ),
    "albert": Architecture(
        "AlbertForSequenceClassification",
        "AlbertConfig",
        TEXT | {"embedding_size": 8},
        ("query",),
        ("classifier",),
    ),
    "electra": Architecture(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        TEXT | {"embedding_size": 16},
        ("query",),
        ("classifier",),
    ),
    "deberta_v2": Architecture(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT,
        ("query_proj",),
        ("classifier",),
    ),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT | {"pad_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
        ("Wqkv",),
        ("classifier",),
    ),
    "vit": Architecture(
        "ViTForImageClassification", "ViTConfig", PIXELS, ("q_proj",), ("classifier",)
    ),
    "dinov2": Architecture(
        "Dinov2ForImageClassification", "Dinov2Config", PIXELS, ("q_proj",), ("classifier",)
    ),
    "clip": Architecture("CLIPVisionModel", "CLIPVisionConfig", PIXELS, QKV),
    "siglip": Architecture("SiglipVisionModel", "SiglipVisionConfig", PIXELS, QKV),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        TWO_SIDED | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        QKV,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        TEXT | {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2)},
        QKV,
        ("lm_head",),
        more={"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": PIXELS | {"model_type": "clip_vision_model"},
        },
        ("up_proj", "down_proj"),
        ("multi_modal_projector",),
    ),
    "mixtral": _causal("Mixtral", SIZES | EXPERTS, "q_proj", num_local_experts=3),
    "qwen2_moe": _causal(
        "Qwen2Moe",
        SIZES | EXPERTS | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        "q_proj",
        num_experts=3,
    ),
    "qwen3_moe": _causal(
        "Qwen3Moe",
        SIZES | EXPERTS | {"moe_intermediate_size": 24, "head_dim": 8},
        "q_proj",
        num_experts=3,
    ),
    "olmoe": _causal("Olmoe", SIZES | EXPERTS, "q_proj", num_experts=3),
    "gpt_oss": _causal("GptOss", SIZES | EXPERTS | {"head_dim": 8}, "q_proj", num_local_experts=3),
}
