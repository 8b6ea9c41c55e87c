"""Simulations by name: settings whose options can be overridden.

Except for `digits`, models and data are those of raFLoRA's experiments (arXiv:2602.13486). The
paper's other settings could not be read; the values here are usual for LoRA on such models. So
these presets do not reproduce the paper's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedlora_cli.simulation.options import Setting, SimulateOptions, Source, Split, Training

#: The first preset is the default.
PRESETS: Mapping[str, SimulateOptions] = {
    "digits": SimulateOptions(),
    "vit-cifar100": SimulateOptions(
        Setting(
            Source(
                family="image-classification",
                model="google/vit-base-patch16-224-in21k",
                data=("uoft-cs/cifar100",),
                input="img",
                label="fine_label",
                target_modules=("q_proj", "v_proj"),  # query and value, as transformers 5 has them
            ),
            split=Split(dirichlet=0.5),
            training=Training(batch_size=32),
        ),
        rates=(5e-4, 1e-3, 2e-3),
        rounds=50,
        score_every=5,
    ),
    "roberta-20news": SimulateOptions(
        Setting(
            Source(
                family="text-classification",
                model="FacebookAI/roberta-base",
                data=("SetFit/20_newsgroups",),
                input="text",
                label="label",
                target_modules=("query", "value"),
            ),
            split=Split(dirichlet=0.5),
        ),
        rates=(2e-4, 5e-4, 1e-3),
        rounds=50,
        score_every=5,
    ),
    "llama-gsm8k": SimulateOptions(
        Setting(
            Source(
                family="causal-lm",
                model="meta-llama/Llama-3.2-1B",
                data=("openai/gsm8k",),
                config="main",
                input="question",
                label="answer",
                target_modules=("q_proj", "v_proj"),
                max_length=512,
                max_new_tokens=256,
                dtype="bfloat16",
            ),
            # Without classes, clients differ only in their numbers of examples.
            split=Split(dirichlet=5.0),
            training=Training(batch_size=8),
        ),
        rates=(1e-4, 2e-4, 5e-4),
        rounds=20,
        score_every=5,
    ),
}

#: A description of each preset.
NOTES: Mapping[str, str] = {
    "digits": "a tiny vision transformer on scikit-learn's digits; minutes on a CPU, no network",
    "vit-cifar100": "ViT-Base (ImageNet-21k) on CIFAR-100; for a GPU",
    "roberta-20news": "RoBERTa-Base on 20 Newsgroups; for a GPU",
    "llama-gsm8k": "Llama 3.2 1B, which asks for consent on the hub, on GSM8K; for a GPU",
}
