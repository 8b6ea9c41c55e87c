"""What `fedlora init` and `fedlora distribute` let a person choose, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora_cli.aggregation.options import Dtype
from fedlora_cli.errors import UsageError, require
from fedlora_cli.formats.terms import LARGEST_ALPHA, TASK_TYPES

#: lora_alpha / r where nobody says: the usual choice, and one scaling for all ranks.
SCALING = 2.0

#: The class of transformers for every task: PEFT's task types, and one that PEFT does not have.
CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "IMAGE_CLS": "AutoModelForImageClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

#: What a lora_alpha can be.
ALPHAS = f"a positive number, at most {LARGEST_ALPHA:g}"

#: PEFT's word for every linear layer but the head.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class InitOptions:
    """The choices of a round 0.

    - `ranks`: one adapter for each of them, unless there are clients to be like.
    - `alpha`: lora_alpha of all; `scaling`: instead, alpha / r of all, so that every rank trains at
      the same pace. None of both is the clients' own, or a scaling of 2.
    - `target_modules`: names of modules, an expression, or "all-linear"; None is PEFT's default for
      the architecture. `target_parameters`: names of parameters, such as those of fused experts.
      `task`: which class the model is, a key of `CLASSES`; None takes the one
      that the base was saved from.
    - `modules_to_save`: heads to train in full. `num_labels`: how many classes a new head has.
    - `seed`: of the random A and of new heads. `dropout`: lora_dropout. `dtype`: of the files.
    - `revision`: of a base model on the hub. `jobs`: threads, 0 for all cores. `force`: replace a
      folder of adapters. `adapter`: the folder in every client's own that has its adapter.

    Raises UsageError for a value out of its range.
    """

    ranks: tuple[int, ...] = ()
    alpha: float | None = None
    scaling: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] = ()
    task: str | None = None
    modules_to_save: tuple[str, ...] = ()
    num_labels: int | None = None
    seed: int = 0
    dropout: float | None = None
    dtype: Dtype | None = None
    revision: str | None = None
    jobs: int = 0
    force: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for rank in self.ranks:
            require(rank >= 1, "--ranks", rank, "1 or more")
        require(is_alpha(self.alpha), "--alpha", self.alpha, ALPHAS)
        require(is_alpha(self.scaling), "--scaling", self.scaling, ALPHAS)
        if self.alpha is not None and self.scaling is not None:
            raise UsageError("--scaling", "given together with --alpha", "give one of them")
        if self.task is not None and self.task not in CLASSES:
            found = f"no task {self.task}"
            raise UsageError("--task", found, f"use one of {', '.join(CLASSES)}")
        labels = self.num_labels
        require(labels is None or labels >= 1, "--num-labels", labels, "1 or more")
        require(0 <= self.seed < 2**63, "--seed", self.seed, "0 or more")
        dropout = self.dropout
        require(dropout is None or 0 <= dropout < 1, "--dropout", dropout, "in [0, 1)")
        require(self.jobs >= 0, "--jobs", self.jobs, "0 or more; 0 is all cores")

    @property
    def task_type(self) -> str | None:
        """The task as PEFT's config names it, None where PEFT has no name for it."""
        return self.task if self.task in TASK_TYPES else None


@dataclass(frozen=True)
class DistributeOptions:
    """The choices of one distribution.

    - `ranks`: one adapter for each of them, instead of one for each client.
    - `alpha`: lora_alpha of all, instead of the clients' own; with `ranks`, None keeps the global
      adapter's scaling. `dtype`: None is that of the client, or of the global adapter.
    - `base`: the base model, however the adapters name it. `jobs`: threads, 0 for all cores.
      `force`: replace a folder of adapters. `adapter`: the folder in every client's own that has
      its adapter.

    Raises UsageError for a number out of its range.
    """

    ranks: tuple[int, ...] = ()
    alpha: float | None = None
    dtype: Dtype | None = None
    base: str | None = None
    jobs: int = 0
    force: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        for rank in self.ranks:
            require(rank >= 1, "--rank", rank, "1 or more")
        require(is_alpha(self.alpha), "--alpha", self.alpha, ALPHAS)
        require(self.jobs >= 0, "--jobs", self.jobs, "0 or more; 0 is all cores")


def is_alpha(value: float | None) -> bool:
    """Whether it can be a lora_alpha that is read again; None is not given."""
    return value is None or 0 < value <= LARGEST_ALPHA
