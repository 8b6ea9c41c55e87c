"""Everything that `fedlora simulate` lets a person choose, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedlora_cli.errors import UsageError, require
from fedlora_cli.methods import find
from fedlora_cli.rounds.options import SCALING

Family = Literal["digits", "image-classification", "text-classification", "causal-lm"]


def short(value: float) -> str:
    """A number in a name: as short as it can be and no other number's.

    >>> short(1.0), short(0.0007), short(0.00100000001)
    ('1', '0.0007', '0.00100000001')
    """
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


@dataclass(frozen=True)
class Arm:
    """One way to aggregate that is compared with others: a method, its quorum, its momentum.

    >>> Arm("raflora", quorum=0.5, momentum=0.8).name
    'raflora-q0.5-b0.8'
    """

    method: str
    quorum: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        method = find(self.method)
        if self.quorum is not None and method.with_quorum is None:
            found = f"the rule of {self.method} has no quorum"
            raise UsageError("--quorum", found, "choose raflora")
        if method.compress == "none" and method.merge == "sum":
            found = f"clients of {self.method} merge the whole stack into their base model"
            raise UsageError("--method", found, "leave it out; to truncate it is flexlora")
        if method.merge == "shared":
            found = f"{self.method} needs clients that freeze A, and these train both factors"
            raise UsageError("--method", found, "leave it out")
        if self.momentum and method.compress == "none":
            found = f"{self.method} does not truncate its sum to a rank"
            raise UsageError("--momentum", found, "choose raflora, residual or flexlora")
        require(self.quorum is None or 0 <= self.quorum <= 1, "--quorum", self.quorum, "in [0, 1]")
        require(0 <= self.momentum < 1, "--momentum", self.momentum, "in [0, 1)")

    @property
    def name(self) -> str:
        """The name of its folder, and of its row."""
        quorum = "" if self.quorum is None else f"-q{short(self.quorum)}"
        return f"{self.method}{quorum}" + (f"-b{short(self.momentum)}" if self.momentum else "")


@dataclass(frozen=True)
class Split:
    """How the examples are dealt out to the clients.

    - `dirichlet`: every class goes to the clients in proportions drawn from a Dirichlet
      distribution of this concentration (arXiv:1909.06335); the smaller, the more uneven.
    - `classes`: instead, every client has examples of that many classes only, the pathological
      split of arXiv:1602.05629.
    - `holdings`: samples go with rank to this power, on average: 0 is even, 1 gives the high ranks
      more, -1 fewer.
    """

    dirichlet: float = 1.0
    classes: int | None = None
    holdings: float = 0.0

    def __post_init__(self) -> None:
        require(0 < self.dirichlet <= 1e6, "--dirichlet", self.dirichlet, "above 0")
        require(self.classes is None or self.classes >= 1, "--classes", self.classes, "1 or more")
        require(-4 <= self.holdings <= 4, "--holdings", self.holdings, "in [-4, 4]")


@dataclass(frozen=True)
class Source:
    """The model and the data. What is None has the default of the family, or is found by itself.

    - `model`: a local folder or a name on the hub. `data`: local files, a folder of them, or a
      dataset's name on the hub; `config` its configuration there, `train_split` and `test_split`
      its splits; without a test split, a fifth is held out.
    - `input`, `label`: the columns of the images, texts or questions, and of classes or answers.
    - `target_modules`, `modules_to_save`: of the adapters. `max_length`: of a text, in tokens;
      `max_new_tokens`: of an answer. `limit`: take no more examples than that, of every split.
    - `dtype`: to load the base model in.
    """

    family: Family = "digits"
    model: str | None = None
    data: tuple[str, ...] = ()
    config: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    input: str | None = None
    label: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | None = None
    max_length: int = 256
    max_new_tokens: int = 64
    limit: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        own = self.family == "digits"
        for flag, default in _UNUSED[self.family].items():
            if getattr(self, flag) != default:
                name = f"--{flag.replace('_', '-')}"
                cure = "leave it out" if not own else "say which --task it is for"
                raise UsageError(name, f"{self.family} has no use for it", cure)
        if self.dtype == "float16":
            # AdamW divides by the root of a square, plus 1e-8: both are zero in float16.
            raise UsageError("--dtype", "float16 cannot be trained in", "give bfloat16 or float32")
        if not own and (self.model is None or not self.data):
            raise UsageError("--task", f"{self.family} needs both", "give --model and --data")
        require(self.max_length >= 1, "--max-length", self.max_length, "1 or more")
        require(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "1 or more")
        require(self.limit is None or self.limit >= 1, "--limit", self.limit, "1 or more")


#: Options that a family has no use for, with what they are where nobody gives them.
_TEXT = {"max_length": 256, "max_new_tokens": 64}
_UNUSED: dict[str, dict[str, Any]] = {
    "digits": {
        **dict.fromkeys(
            ("model", "config", "test_split", "input", "label", "target_modules", "modules_to_save")
        ),
        **{"data": (), "train_split": "train", "dtype": "float32"},
        **_TEXT,
    },
    "image-classification": _TEXT,
    "text-classification": {"max_new_tokens": 64},
    "causal-lm": {},
}


@dataclass(frozen=True)
class Training:
    """What a client does in a round: AdamW without weight decay, at one rate."""

    epochs: int = 1
    batch_size: int = 16
    scaling: float = SCALING
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "--epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "1 or more")
        require(0 < self.scaling <= 1e6, "--scaling", self.scaling, "a positive number")
        require(0 <= self.dropout < 1, "--dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True)
class Setting:
    """All that makes a run but for what is compared in it; the runs of one folder share it.

    `ranks` are those of the clients, `participation` the share of them that every round draws.
    """

    source: Source = Source()
    ranks: tuple[int, ...] = (4,) * 8 + (8,) * 6 + (16,) * 4 + (32,) * 2
    participation: float = 0.5
    split: Split = Split()
    training: Training = Training()

    def __post_init__(self) -> None:
        require(len(self.ranks) >= 1, "--cohort", len(self.ranks), "1 client or more")
        for rank in self.ranks:
            require(rank >= 1, "--cohort", rank, "ranks of 1 or more")
        if self.source.family == "causal-lm" and self.split.classes is not None:
            raise UsageError("--classes", "causal-lm has no classes", "give --dirichlet")
        share = self.participation
        require(0 < share <= 1, "--participation", share, "above 0 and at most 1")

    @property
    def present(self) -> int:
        """How many clients every round has."""
        return max(1, round(self.participation * len(self.ranks)))


@dataclass(frozen=True)
class SimulateOptions:
    """The choices of one simulation: a setting, and what is compared in it.

    Every arm runs at every rate with every seed; a seed sets the split, the initial adapter, who
    takes part when, and every batch, so that arms differ in nothing else. `score_every`: rounds
    between two scores. `keep_clients`: keep the clients' adapters of every round, not only of the
    last. `device`: where to train. `jobs`: runs at a time, 0 for one per core, or one on a GPU;
    `threads`: cores of each, where more than one changes the rounding.

    Raises UsageError for a value out of its range.
    """

    setting: Setting = Setting()
    arms: tuple[Arm, ...] = (Arm("flexlora"), Arm("raflora"), Arm("raflora", momentum=0.8))
    rates: tuple[float, ...] = (7e-4,)
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 25
    score_every: int = 1
    keep_clients: bool = False
    device: str = "cpu"
    jobs: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        lists = (("--method", self.arms), ("--lr", self.rates), ("--seeds", self.seeds))
        for flag, values in lists:
            if not values:
                raise UsageError(flag, "an empty list", "give one or more")
            if len(set(values)) < len(values):
                raise UsageError(flag, "one of them twice", "give each once")
        for rate in self.rates:
            require(0 < rate <= 1e3, "--lr", rate, "above 0")
        for seed in self.seeds:
            require(0 <= seed < 2**31, "--seeds", seed, "0 or more")
        require(self.rounds >= 1, "--rounds", self.rounds, "1 or more")
        require(self.score_every >= 1, "--score-every", self.score_every, "1 or more")
        require(self.jobs >= 0, "--jobs", self.jobs, "0 or more; 0 is one per core")
        require(self.threads >= 1, "--threads", self.threads, "1 or more")
