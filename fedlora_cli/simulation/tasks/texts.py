"""Text classification with any model of transformers for it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.scoring import count_right
from fedlora_cli.simulation.task import Examples, IntArray, Task
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
    """Text classification with the model and the data of a source.

    Raises InputError and UsageError.
    """
    model = model_name(source)
    corpus = read_corpus(source, _WANTED, seed)
    tokenizer = read_tokenizer(model)
    length = min(source.max_length, longest(tokenizer, read_config(model)))
    # Each text needs at least one token.
    blank = "" if tokenizer("")["input_ids"] else tokenizer.pad_token

    def examples(part: Part) -> Examples:
        def batch(chosen: IntArray) -> dict[str, Tensor]:
            tokens = tokenizer(
                [text if text.strip() else blank for text in part.inputs(chosen)],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            return {**tokens, "labels": torch.from_numpy(part.labels[chosen])}

        return Examples(part.labels, batch)

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
        train=examples(corpus.train),
        validation=examples(corpus.validation),
        test=examples(corpus.test),
        right=count_right,
        task="SEQ_CLS",
        target_modules=source.target_modules,
        modules_to_save=saved,
        num_labels=corpus.classes,
    )
