"""Text classification with any model of transformers for it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.scoring import count_right
from fedlora_cli.simulation.task import IntArray, Task
from fedlora_cli.simulation.tasks.columns import Wanted
from fedlora_cli.simulation.tasks.corpus import Part, read_corpus
from fedlora_cli.simulation.tasks.pretrained import (
    load_model,
    longest,
    model_name,
    read_config,
    read_tokenizer,
)
from fedlora_cli.simulation.tasks.tables import title

_WANTED = Wanted(
    inputs=("text", "sentence", "content", "question"),
    labels=("label", "labels", "fine_label", "category", "answer"),
    holds="texts",
)

#: Heads that PEFT saves for each text classifier.
_HEADS = ("classifier", "score")


def make_task(source: Source, seed: int) -> Task:
    """The task of a source. Raises InputError and UsageError."""
    model = model_name(source)
    corpus = read_corpus(source, _WANTED, seed)
    tokenizer = read_tokenizer(model)
    length = min(source.max_length, longest(tokenizer, read_config(model)))
    # Each text needs at least one token.
    blank = "" if tokenizer("")["input_ids"] else tokenizer.pad_token

    def batch(part: Part, chosen: IntArray) -> dict[str, Tensor]:
        tokens = tokenizer(
            [text if text.strip() else blank for text in part.read(chosen)[0]],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        return {**tokens, "labels": torch.from_numpy(part.labels[chosen])}

    saved = source.modules_to_save or ()
    return Task(
        name=f"text classification, {title(source)}",
        model=model,
        load=partial(
            load_model,
            source,
            "AutoModelForSequenceClassification",
            (*_HEADS, *saved),
            num_labels=corpus.classes,
            problem_type="single_label_classification",
            # Decoders classify by the last token before the padding.
            pad_token_id=tokenizer.pad_token_id,
        ),
        **corpus.examples(lambda part: partial(batch, part)),
        right=count_right,
        task="SEQ_CLS",
        target_modules=source.target_modules,
        modules_to_save=saved,
        num_labels=corpus.classes,
        remarks=corpus.remarks,
    )
