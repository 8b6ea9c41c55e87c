"""The names that diffusers and its relatives give to files, components and tensors."""

from __future__ import annotations

import re

from fedlora_cli.formats.peft.names import PREFIX as PEFT_PREFIX
from fedlora_cli.formats.single import Names

WEIGHTS = "pytorch_lora_weights.safetensors"

#: The entry of the file's metadata in which diffusers stores the fields of PEFT's config.
METADATA = "lora_adapter_metadata"

ENDING_B, ENDING_A, ALPHA = ".lora_B.weight", ".lora_A.weight", ".alpha"

#: diffusers' training scripts for Stable Diffusion write the second pair of names for attention
#: layers, and the third for text encoders. fedlora writes the first: every loader knows it.
NAMES = Names(
    endings={
        ENDING_B: "B",
        ENDING_A: "A",
        ".lora.up.weight": "B",
        ".lora.down.weight": "A",
        ".lora_linear_layer.up.weight": "B",
        ".lora_linear_layer.down.weight": "A",
        ALPHA: "alpha",
    },
    B="lora_B",
    A="lora_A",
)

#: The names of the main model in diffusers, and ComfyUI's name for any model. An adapter has one.
MAIN = ("unet", "transformer", "prior", "diffusion_model")

#: The models that can be trained together with the main model.
BESIDE = (
    "transformer_2",
    "transformer_ref",
    "connectors",
    "text_conditioner",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)

#: transformers 5 removed this part from the names of CLIP's modules. diffusers removes it from the
#: names of tensors, but not from the metadata.
FLATTENED = "text_model."

#: The places of the alphas in a file.
IN_TENSORS, IN_METADATA, NOWHERE = ".alpha tensors", METADATA, "the rank"

PLAIN = "train plain LoRA"
_RESAVE = (
    'load it with diffusers (pipe.load_lora_weights(FILE, adapter_name="default")), then save it '
    "with pipe.unet.save_lora_adapter(FOLDER)"
)
_CONVERT = (
    "convert it with diffusers: tensors = FluxPipeline.lora_state_dict(FILE), then "
    "safetensors.torch.save_file({name: t.clone() for name, t in tensors.items()}, NEW)"
)

#: Parts of keys that are not plain LoRA, with their meaning and the remedy.
OTHERS = (
    (("lora_magnitude_vector", "dora_scale"), "DoRA", "train without use_dora"),
    (("lora_B.bias", "up.bias"), "a bias on lora_B", "train without lora_bias"),
    (("lora_embedding_",), "factors of an embedding", "train linear layers and convolutions"),
    (("qkv_lora", "proj_lora"), "names of XLabs", _CONVERT),
    (("_lora.",), "names that diffusers gave in 2023", _RESAVE),
    (("hada_",), "LoHa", PLAIN),
    (("lokr_",), "LoKr", PLAIN),
    (
        (".lora_A.", ".lora_B."),
        "an adapter's name inside a factor's name",
        "save what PEFT's get_peft_model_state_dict returns, which leaves it out",
    ),
    ((".norm", "norm_"), "a norm, as control LoRA trains it", PLAIN),
    ((".diff",), "a module that was trained in full", PLAIN),
    (("",), "not part of LoRA", PLAIN),
)

_OWNED = re.compile(
    r"\.lora_[AB]\.|\.lora_(magnitude_vector|embedding_[AB])"
    r"|[._]lora(\d*|_linear_layer)\.(down|up)\.weight$"
)


def owns(key: str) -> bool:
    """Whether a tensor with this name shows a file of this format."""
    return _OWNED.search(key) is not None


def component_of(name: str, *, bare: bool) -> str | None:
    """The component of a module; "" in a file with `bare` names, which holds one model; None if the
    name does not begin with a component.

    >>> component_of("text_encoder_2.encoder.layers.0.mlp.fc1", bare=False)
    'text_encoder_2'
    """
    head = name.partition(".")[0]
    if head in MAIN or head in BESIDE:
        return head
    return "" if bare and not name.startswith(PEFT_PREFIX) else None


def prefix_of(name: str) -> str:
    """The part of a name before the main model's module; "" for other components.

    >>> prefix_of("transformer.base_model.model.proj_out"), prefix_of("unet.conv_in")
    ('transformer.base_model.model.', 'unet.')
    """
    head, dot, rest = name.partition(".")
    if head not in MAIN:
        return ""
    return head + dot + (PEFT_PREFIX if rest.startswith(PEFT_PREFIX) else "")
