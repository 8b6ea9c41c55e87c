"""LoRA files of diffusers, ai-toolkit, SimpleTuner, musubi-tuner and ComfyUI: one safetensors file.

A tensor's name is a component (`unet`, `transformer`, `text_encoder`, …), a module in it and a
factor: `unet.mid_block.attentions.0.proj_in.lora_A.weight` is A, (r, in) or (r, in, kernel);
`….lora_B.weight` is B, (out, r) or (out, r, 1, 1). The update is alpha / r · B A. Alpha is a tensor
`….alpha`, or a field of the file's metadata (PEFT's config by component), or r by default. Source:
loaders/lora_base.py, loaders/peft.py, loaders/lora_pipeline.py, utils/peft_utils.py and
utils/state_dict_utils.py of diffusers 0.42; comfy/weight_adapter/lora.py of ComfyUI.
"""

from fedlora_cli.formats.diffusers.names import WEIGHTS, owns
from fedlora_cli.formats.diffusers.reading import read
from fedlora_cli.formats.diffusers.writing import new_file

__all__ = ["WEIGHTS", "new_file", "owns", "read"]
