"""Questions and answers: what is learned of them, and which answers are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tasks import BOS, EOS, WORDS, adapted, everything, make_task, save_lines

from fedlora_cli.simulation.options import Source
from fedlora_cli.simulation.tasks.language import Dialogues, same_answer

pytestmark = pytest.mark.usefixtures("apart")


def test_there_is_a_loss_on_the_answer_and_its_end_alone(
    sources: dict[str, Source], tmp_path: Path
) -> None:
    rows = [{"question": "sea " * (1 + k % 3), "answer": "red " * (1 + k % 2)} for k in range(12)]
    data = (str(save_lines(tmp_path / "rows.jsonl", rows)),)
    task = make_task(replace(sources["causal-lm"], data=data), 0)

    batch = everything(task.train)

    sea, red = WORDS.index("sea"), WORDS.index("red")
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert task.train.labels.tolist() == [0] * 10
    for tokens, mask, labels in zip(
        *(batch[n].tolist() for n in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        questions, answers, length = tokens.count(sea), tokens.count(red), sum(mask)
        text = [BOS, *[sea] * questions, *[red] * answers, EOS]
        # The end of a text is what this tokenizer pads with, and yet it is learned once.
        assert tokens == text + [EOS] * (len(tokens) - length)
        assert mask == [1] * len(text) + [0] * (len(tokens) - len(text))
        ignored = [-100] * (1 + questions), [-100] * (len(tokens) - length)
        assert labels == [*ignored[0], *[red] * answers, EOS, *ignored[1]]


@pytest.mark.parametrize(
    ("length", "text", "learned"),
    [
        (10, "[BOS] 3 plus 4 3 plus 4 #### 7 [EOS]", 6),
        (9, "[BOS] plus 4 3 plus 4 #### 7 [EOS]", 6),
        (4, "[BOS] 4 3 plus", 2),
        (1, "[BOS] 4 3", 1),  # a token of each there must be
    ],
)
def test_a_long_text_loses_the_beginning_of_its_question(
    sources: dict[str, Source], length: int, text: str, learned: int
) -> None:
    task = make_task(replace(sources["causal-lm"], max_length=length), 0)
    dialogues = task.train.batch
    assert isinstance(dialogues, Dialogues)
    questions = dialogues.part.read(np.arange(len(task.train)))[0]

    batch = task.train.batch(np.array([questions.index("3 plus 4")]))

    assert " ".join(WORDS[token] for token in batch["input_ids"][0]) == text
    assert int((batch["labels"] != -100).sum()) == learned


def test_questions_are_padded_on_the_left(sources: dict[str, Source], tmp_path: Path) -> None:
    rows = [{"question": "sea " * (1 + k % 3), "answer": "red"} for k in range(12)]
    data = (str(save_lines(tmp_path / "rows.jsonl", rows)),)
    task = make_task(replace(sources["causal-lm"], data=data, max_length=2), 0)
    dialogues = task.train.batch
    assert isinstance(dialogues, Dialogues)

    prompts, answers = dialogues.prompts(np.arange(10))

    assert answers == ["red"] * 10
    assert prompts["input_ids"].shape == (10, 4)
    for tokens, mask in zip(
        prompts["input_ids"].tolist(), prompts["attention_mask"].tolist(), strict=True
    ):
        assert mask == sorted(mask)
        assert tokens[4 - sum(mask)] == BOS
        assert EOS not in tokens[4 - sum(mask) :]


class Writer:
    """A model that answers what it is told to, token by token, for all questions in order."""

    device = torch.device("cpu")

    def __init__(self, answers: list[str]) -> None:
        self.answers = iter(answers)

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, max_new_tokens: int
    ) -> torch.Tensor:
        assert input_ids.shape == attention_mask.shape
        rows = [[WORDS.index(w) for w in next(self.answers).split()] for _ in input_ids]
        new = [[*row, *[EOS] * max_new_tokens][:max_new_tokens] for row in rows]
        return torch.cat([input_ids, torch.tensor(new)], 1)


def test_answers_are_counted_by_their_end(sources: dict[str, Source]) -> None:
    task = make_task(sources["causal-lm"], 0)
    assert isinstance(task.train.batch, Dialogues)
    positions = np.concatenate([np.arange(len(task.train))] * 2)  # beyond what is written at a time
    answers = task.train.batch.part.read(positions)[1]
    ends = [answer.rpartition("####")[2] for answer in answers]

    right = [f"#### {end}" for end in ends]
    wrong = [f"####{end} ####" for end in ends[:7]]

    assert task.right(Writer(right), task.train, positions) == len(positions)
    assert task.right(Writer([*wrong, *right[7:]]), task.train, positions) == len(positions) - 7


def test_a_real_model_writes_its_answers(sources: dict[str, Source], tmp_path: Path) -> None:
    """One that has learned its sums by heart gets them right, and not others."""
    source = replace(sources["causal-lm"], target_modules="all-linear", max_new_tokens=6)
    rows = [{"question": f"{k}", "answer": "red #### 7"} for k in range(20)]
    task = make_task(replace(source, data=(str(save_lines(tmp_path / "r.jsonl", rows)),)), 0)
    model = adapted(task, tmp_path / "start")
    everywhere = np.arange(len(task.test))
    with torch.no_grad():
        assert task.right(model.eval(), task.test, everywhere) == 0

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        model(**everything(task.train)).loss.backward()
        optimizer.step()

    with torch.no_grad():
        assert task.right(model, task.test, everywhere) == len(task.test)


@pytest.mark.parametrize(
    ("text", "reference", "same"),
    [
        ("#### 1,042", "so #### 1042", True),
        ("so #### 5 #### 1042 ", "####1,042", True),
        ("#### 1043", "so #### 1042", False),
        ("so 1042", "so #### 1042", False),
        ("red,  blue\n", "red, blue", True),
        ("red blue", "red, blue", False),
        ("x #### red", "red", False),
        ("", "red", False),
    ],
)
def test_answers_are_compared_by_what_they_come_to(text: str, reference: str, same: bool) -> None:
    assert same_answer(text, reference) is same
