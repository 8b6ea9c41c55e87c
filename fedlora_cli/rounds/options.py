"""The options of `fedlora init` and `fedlora distribute`, as frozen values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora_cli.aggregation.options import Dtype
from fedlora_cli.errors import UsageError
from fedlora_cli.formats.terms import LARGEST_ALPHA, TASK_TYPES
from fedlora_cli.options import (
    BELOW_ONE,
    Check,
    adapter_option,
    at_least,
    base_option,
    check_options,
    jobs_option,
    names,
    option,
    whole_numbers,
)

#: The default of lora_alpha / r: the usual choice, the same for all ranks.
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

#: PEFT's word for every linear layer except the head.
ALL_LINEAR = "all-linear"


_ALPHA = Check(
    lambda alpha: 0 < alpha <= LARGEST_ALPHA, f"a positive number, at most {LARGEST_ALPHA:g}"
)

_TRAINED = "Trained modules"
_START = "Initial values"
_OUTPUT = "Output"


def _ranks(flag: str, lists: Sequence[str]) -> tuple[int, ...]:
    """The ranks in lists with commas, each once.

    >>> _ranks("--rank", ["8,4", "16", "4"])
    (4, 8, 16)
    """
    return tuple(sorted({rank for text in lists for rank in whole_numbers(flag, text)}))


def target_names(flag: str, text: str) -> tuple[str, ...] | str:
    """The names of modules in a list with commas, or "all-linear". Raises UsageError."""
    given = names(flag, text)
    return ALL_LINEAR if given == (ALL_LINEAR,) else given


def _ranks_option(*flags: str) -> tuple[int, ...]:
    return option(
        (),
        "Make one adapter for each rank, instead of --like.",
        *flags,
        metavar="R,R,...",
        text=list[str],
        parse=_ranks,
        check=at_least(1),
    )


def _alpha_option() -> float | None:
    return option(
        None,
        "lora_alpha of all adapters; default: that of each client, or the same scaling for all.",
        check=_ALPHA,
    )


def _dtype_option(default: str) -> Dtype | None:
    return option(None, f"Data type; default: that of each client, or {default}.", panel=_OUTPUT)


def _force_option() -> bool:
    return option(False, "Replace an existing folder of adapters.", "-f", panel=_OUTPUT)


@dataclass(frozen=True)
class InitOptions:
    """The options of round 0. Raises UsageError for a value out of its range.

    `target_modules` may also be a regular expression, as in PEFT.
    """

    ranks: tuple[int, ...] = _ranks_option("--ranks", "--rank", "-r")
    adapter: str | None = adapter_option()
    alpha: float | None = _alpha_option()
    scaling: float | None = option(
        None, "alpha / r of all adapters, instead of --alpha; default: 2.", check=_ALPHA
    )
    target_modules: tuple[str, ...] | str | None = option(
        None,
        "Modules to adapt, or all-linear; default: PEFT's choice for the architecture.",
        panel=_TRAINED,
        metavar="NAME,NAME,...",
        text=str,
        parse=target_names,
    )
    target_parameters: tuple[str, ...] = option(
        (),
        "Parameters to adapt, such as experts.down_proj of a mixture of experts.",
        panel=_TRAINED,
        metavar="NAME,NAME,...",
        text=str,
        parse=names,
    )
    task: str | None = option(
        None,
        f"Task of the model: {', '.join(CLASSES)}; default: that of the base model.",
        panel=_TRAINED,
        words=lambda: tuple(CLASSES),
    )
    modules_to_save: tuple[str, ...] = option(
        (),
        "Heads to train in full, such as classifier.",
        panel=_TRAINED,
        metavar="NAME,NAME,...",
        text=str,
        parse=names,
    )
    num_labels: int | None = option(
        None, "Number of classes of a new head.", panel=_TRAINED, check=at_least(1)
    )
    seed: int = option(
        0,
        "Seed of A and of new heads.",
        panel=_START,
        show_default=True,
        check=Check(lambda seed: 0 <= seed < 2**63, "0 or more"),
    )
    dropout: float | None = option(
        None, "lora_dropout; default: that of each client, or 0.", panel=_START, check=BELOW_ONE
    )
    revision: str | None = option(None, "Revision of a base model on the hub.", panel=_START)
    dtype: Dtype | None = _dtype_option("float32")
    jobs: int = jobs_option("Adapters", _OUTPUT)
    force: bool = _force_option()

    def __post_init__(self) -> None:
        check_options(self)
        if self.alpha is not None and self.scaling is not None:
            raise UsageError("--scaling", "given together with --alpha", "give one of them")
        if self.task is not None and self.task not in CLASSES:
            raise UsageError("--task", f"no task {self.task}", f"use one of {', '.join(CLASSES)}")

    @property
    def task_type(self) -> str | None:
        """The task as PEFT's config names it, None where PEFT has no name for it."""
        return self.task if self.task in TASK_TYPES else None


@dataclass(frozen=True)
class DistributeOptions:
    """The options of a distribution. Raises UsageError for a value out of its range.

    Without `alpha`, adapters for `ranks` keep the scaling of the global adapter.
    """

    ranks: tuple[int, ...] = _ranks_option("--rank", "--ranks", "-r")
    adapter: str | None = adapter_option()
    alpha: float | None = _alpha_option()
    base: str | None = base_option()
    dtype: Dtype | None = _dtype_option("that of the global adapter")
    jobs: int = jobs_option("Adapters", _OUTPUT)
    force: bool = _force_option()

    def __post_init__(self) -> None:
        check_options(self)
