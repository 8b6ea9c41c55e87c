"""Question answering with a causal language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedlora_cli.errors import InputError
from fedlora_cli.simulation.options import Source
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
    inputs=("question", "prompt", "instruction", "input", "text"),
    labels=("answer", "completion", "response", "output", "target", "label"),
    holds="texts",
    answers=True,
)

#: The label that the loss ignores.
_IGNORED = -100

#: In GSM8K (arXiv:2110.14168), the final answer follows this mark.
_FINAL = "####"

#: Answers generated at a time, which must fit into memory.
_AT_ONCE = 32


def make_task(source: Source, seed: int) -> Task:
    """The task of a source: `Dialogues`, without a chat template, whose answers are right by
    `same_answer`. Raises InputError and UsageError.
    """
    model = model_name(source)
    corpus = read_corpus(source, _WANTED, seed)
    tokenizer = read_tokenizer(model)
    if tokenizer.eos_token_id is None:
        found = "its tokenizer has no token for the end of a text"
        raise InputError(model, found, "add one to it, and save it again")
    longest_text = longest(tokenizer, read_config(model))
    # Some tokenizers put a token at the beginning of each text.
    first = tokenizer("")["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id in first else []

    saved = source.modules_to_save or ()

    def load() -> Any:
        import transformers

        loaded = load_model(source, "AutoModelForCausalLM", saved)
        # Greedy decoding instead of the model's configuration, which may sample.
        config: Any = transformers.GenerationConfig
        loaded.generation_config = config(
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return loaded

    return Task(
        name=f"language modelling, {title(source)}",
        model=model,
        load=load,
        **corpus.examples(lambda part: Dialogues(part, tokenizer, begin, source, longest_text)),
        right=count_answers,
        task="CAUSAL_LM",
        target_modules=source.target_modules,
        modules_to_save=saved,
        num_labels=None,
        remarks=corpus.remarks,
    )


@dataclass(frozen=True, eq=False)
class Dialogues:
    """Questions with their answers as batches: to train on, or to be answered.

    A text is `begin`, the question and a new line, the answer, and the token for its end. Where
    that is too long, the beginning of the question goes first. `longest` is what the model takes.
    """

    part: Part
    tokenizer: Any
    begin: Sequence[int]
    source: Source
    longest: int

    def __call__(self, chosen: IntArray) -> dict[str, Tensor]:
        """Padded on the right; there is a loss on the answers alone."""
        room = min(self.source.max_length, self.longest) - len(self.begin)
        prompts, texts = [], []
        for question, answer in zip(*self.part.read(chosen), strict=True):
            # At least a token of each.
            written = [*self._tokens(answer), self.tokenizer.eos_token_id][: max(1, room - 1)]
            prompts.append(self._prompt(question, room - len(written)))
            texts.append([*prompts[-1], *written])
        width = max(map(len, texts))
        tokens = np.full((len(texts), width), self.tokenizer.pad_token_id)
        labels = np.full((len(texts), width), _IGNORED)
        mask = np.zeros((len(texts), width), dtype=np.int64)
        for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
            tokens[row, : len(text)] = text
            mask[row, : len(text)] = 1
            labels[row, len(prompt) : len(text)] = text[len(prompt) :]
        arrays = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def prompts(self, chosen: IntArray) -> tuple[dict[str, Tensor], list[str]]:
        """Prompts, padded on the left, and the reference answers."""
        questions, answers = self.part.read(chosen)
        room = self.longest - len(self.begin) - self.source.max_new_tokens
        texts = [self._prompt(question, room) for question in questions]
        width = max(map(len, texts))
        padding = self.tokenizer.pad_token_id
        tokens = torch.tensor([[padding] * (width - len(text)) + text for text in texts])
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
        return {"input_ids": tokens, "attention_mask": mask}, answers

    def _prompt(self, question: str, room: int) -> list[int]:
        """The tokens before the answer: at least one; if they are too many, the last ones."""
        tokens = self._tokens(question + "\n") or [self.tokenizer.eos_token_id]
        return [*self.begin, *tokens[-max(1, room) :]]

    def _tokens(self, text: str) -> list[int]:
        # Without a warning for long texts, which are cut later.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def count_answers(model: Any, examples: Examples, positions: IntArray) -> int:
    dialogues = cast("Dialogues", examples.batch)  # the examples are those of this task
    right = 0
    for chosen in np.split(positions, range(_AT_ONCE, len(positions), _AT_ONCE)):
        prompts, answers = dialogues.prompts(chosen)
        written = model.generate(
            **{name: tensor.to(model.device) for name, tensor in prompts.items()},
            max_new_tokens=dialogues.source.max_new_tokens,
        )
        new = written[:, prompts["input_ids"].shape[1] :]
        texts = dialogues.tokenizer.batch_decode(new, skip_special_tokens=True)
        right += sum(map(same_answer, texts, answers))
    return right


def same_answer(text: str, reference: str) -> bool:
    """Whether the text ends in the final answer of the reference.

    The final answer follows the last "####"; without it, it is the whole text. Spaces and commas in
    numbers are ignored.

    >>> same_answer("6 * 7 = 42 #### 1042", "12 + 1030 = 1042 #### 1,042")
    True
    """
    if _FINAL in reference:
        text, reference = text.rpartition(_FINAL)[2], reference.rpartition(_FINAL)[2]
    return _bare(text) == _bare(reference)


def _bare(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d)", "", " ".join(text.split()))
