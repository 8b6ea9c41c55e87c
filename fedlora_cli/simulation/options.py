"""The options of `fedlora simulate`, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedlora_cli.aggregation.options import Dtype
from fedlora_cli.errors import UsageError, require
from fedlora_cli.options import (
    BELOW_ONE,
    POSITIVE_SHARE,
    Check,
    at_least,
    check_options,
    names,
    numbers,
    option,
    options_of,
    whole_numbers,
)
from fedlora_cli.rounds.options import SCALING, target_names
from fedlora_cli.simulation.arm import Arm

Family = Literal["digits", "image-classification", "text-classification", "causal-lm"]

COMPARISON = "Comparison"
FEDERATION = "Federation"
_TRAINING = "Training"
_DATA = "Model and data"

#: The largest number of seeds that a count stands for.
_MOST_SEEDS = 1000


def seeds_of(flag: str, text: str) -> tuple[int, ...]:
    """The seeds in a list with commas, or the first ones by their number. Raises UsageError.

    >>> seeds_of("--seeds", "3"), seeds_of("--seeds", "4,7"), seeds_of("--seeds", "4,")
    ((0, 1, 2), (4, 7), (4,))
    """
    if "," in text:
        return whole_numbers(flag, text.removesuffix(","))
    (size,) = whole_numbers(flag, text)
    require(1 <= size <= _MOST_SEEDS, flag, size, f"from 1 to {_MOST_SEEDS}")
    return tuple(range(size))


@dataclass(frozen=True)
class Split:
    """How the examples are split among the clients: by a Dirichlet distribution for each class
    (arXiv:1909.06335), or by a number of classes for each client (arXiv:1602.05629).
    """

    dirichlet: float = option(
        1.0,
        "Concentration of the Dirichlet split by class; smaller is more uneven.",
        panel=FEDERATION,
        check=Check(lambda value: 0 < value <= 1e6, "above 0"),
    )
    classes: int | None = option(
        None,
        "Number of classes of each client, instead of --dirichlet.",
        panel=FEDERATION,
        check=at_least(1),
    )
    holdings: float = option(
        0.0,
        "Exponent of the mean sample count in the rank; 0: the same for all, 1: proportional.",
        panel=FEDERATION,
        check=Check(lambda value: -4 <= value <= 4, "in [-4, 4]"),
    )

    def __post_init__(self) -> None:
        check_options(self)


def _strings(flag: str, given: list[str]) -> tuple[str, ...]:
    return tuple(given)


@dataclass(frozen=True)
class Source:
    """The model and the data. None is the default of the family, or found in the files.

    Without a test split, a fifth of the data is held out. `client_column` and `clients_from` name
    the client of each row; without them, a `Split` deals the rows.
    """

    family: Family = option("digits", "Task to train for other data.", "--task", panel=_DATA)
    model: str | None = option(None, "Base model: a folder, or a name on the hub.", panel=_DATA)
    data: tuple[str, ...] = option(
        (),
        "Data: a file, a folder or a name on the hub; repeatable.",
        text=list[str],
        parse=_strings,
        panel=_DATA,
    )
    config: str | None = option(None, "Configuration of the data on the hub.", panel=_DATA)
    train_split: str = option("train", "Split of the data to train on.", panel=_DATA)
    test_split: str | None = option(
        None, "Split of the data to test on; default: a held-out part.", panel=_DATA
    )
    input: str | None = option(None, "Column of images, texts or questions.", panel=_DATA)
    label: str | None = option(None, "Column of classes or answers.", panel=_DATA)
    target_modules: tuple[str, ...] | str | None = option(
        None,
        "Modules to adapt, or all-linear.",
        metavar="NAME,NAME,...",
        text=str,
        parse=target_names,
        panel=_DATA,
    )
    modules_to_save: tuple[str, ...] | None = option(
        None,
        "Modules to train in full.",
        metavar="NAME,NAME,...",
        text=str,
        parse=names,
        panel=_DATA,
    )
    max_length: int = option(256, "Longest text, in tokens.", check=at_least(1), panel=_DATA)
    max_new_tokens: int = option(64, "Longest answer, in tokens.", check=at_least(1), panel=_DATA)
    limit: int | None = option(
        None, "Largest number of examples of each split.", check=at_least(1), panel=_DATA
    )
    dtype: Dtype = option("float32", "Data type of the base model.", panel=_DATA)
    client_column: str | None = option(
        None,
        "Column with the client of each row; --ranks are in the order of the clients' names.",
        metavar="COLUMN",
        panel=FEDERATION,
    )
    clients_from: str | None = option(
        None,
        "Clients and their rows: a JSON object {client: rows} or CSV `row,client`, with rows "
        "counted from 0. The JSON may have their ranks.",
        metavar="FILE",
        panel=FEDERATION,
    )

    def __post_init__(self) -> None:
        check_options(self)
        own = self.family == "digits"
        for spec in options_of(Source):
            if spec.name in _UNUSED[self.family] and getattr(self, spec.name) != spec.default:
                cure = "give the --task that it is for" if own else "leave it out"
                raise UsageError(spec.option.flags[0], f"{self.family} has no use for it", cure)
        if self.dtype == "float16":
            # AdamW divides by the root of a square, plus 1e-8: both are zero in float16.
            raise UsageError("--dtype", "float16 cannot be trained in", "give bfloat16 or float32")
        if not own and (self.model is None or not self.data):
            raise UsageError("--task", f"{self.family} needs both", "give --model and --data")
        if self.client_column is not None and self.clients_from is not None:
            found = "given together with --client-column"
            raise UsageError("--clients-from", found, "give one of them")

    @property
    def fixed(self) -> str | None:
        """The option that fixes the rows of each client, None if a `Split` deals them."""
        if self.client_column is not None:
            return "--client-column"
        return None if self.clients_from is None else "--clients-from"


#: Options that a family has no use for.
_UNUSED: dict[str, tuple[str, ...]] = {
    "digits": tuple(
        spec.name for spec in options_of(Source) if spec.name not in ("family", "limit")
    ),
    "image-classification": ("max_length", "max_new_tokens"),
    "text-classification": ("max_new_tokens",),
    "causal-lm": (),
}


@dataclass(frozen=True)
class Training:
    """The training of a client in a round: AdamW without weight decay, at a constant rate."""

    epochs: int = option(1, "Epochs of a client in a round.", panel=_TRAINING, check=at_least(1))
    batch_size: int = option(16, "Examples in a batch.", panel=_TRAINING, check=at_least(1))
    scaling: float = option(
        SCALING,
        "alpha / r of all adapters.",
        panel=_TRAINING,
        check=Check(lambda value: 0 < value <= 1e6, "a positive number"),
    )
    dropout: float = option(0.0, "lora_dropout.", panel=_TRAINING, check=BELOW_ONE)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Setting:
    """The part of a run that all runs of a folder share.

    `ranks` are those of the clients, in the order of their names. They are empty if the file
    `source.clients_from` has them.
    """

    source: Source = Source()
    ranks: tuple[int, ...] = (4,) * 8 + (8,) * 6 + (16,) * 4 + (32,) * 2
    participation: float = option(
        0.5, "Share of the clients in each round.", "-p", panel=FEDERATION, check=POSITIVE_SHARE
    )
    split: Split = Split()
    training: Training = Training()

    def __post_init__(self) -> None:
        check_options(self)
        fixed = self.source.fixed
        if fixed is None:
            require(len(self.ranks) >= 1, "--cohort", len(self.ranks), "1 client or more")
        for spec in options_of(Split) if fixed is not None else ():
            if getattr(self.split, spec.name) != spec.default:
                found = f"given together with {fixed}"
                raise UsageError(
                    spec.option.flags[0], found, f"leave it out: {fixed} fixes the rows"
                )
        for rank in self.ranks:
            require(rank >= 1, "--cohort", rank, "ranks of 1 or more")
        if self.source.family == "causal-lm" and self.split.classes is not None:
            raise UsageError("--classes", "causal-lm has no classes", "give --dirichlet")

    @property
    def present(self) -> int:
        """The number of clients in each round."""
        return max(1, round(self.participation * len(self.ranks)))


@dataclass(frozen=True)
class SimulateOptions:
    """The options of one simulation. Raises UsageError for a value out of its range.

    Every arm runs at every rate with every seed. A seed sets the split, the initial adapter, the
    clients of each round and every batch, so that arms differ in nothing else.
    """

    setting: Setting = Setting()
    arms: tuple[Arm, ...] = (Arm("flexlora"), Arm("raflora"), Arm("raflora", momentum=0.8))
    rates: tuple[float, ...] = option(
        (7e-4,),
        "Learning rates to choose from.",
        "--lr",
        panel=COMPARISON,
        metavar="LR,LR,...",
        text=str,
        parse=numbers,
        check=Check(lambda rate: 0 < rate <= 1e3, "above 0"),
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2),
        "Number of seeds, or the seeds: 3 or 0,1,2.",
        panel=COMPARISON,
        metavar="N|S,S,...",
        text=str,
        parse=seeds_of,
        check=Check(lambda seed: 0 <= seed < 2**31, "0 or more"),
    )
    rounds: int = option(25, "Rounds of each run.", panel=COMPARISON, check=at_least(1))
    device: str = option("cpu", "Train on cpu, cuda or cuda:N.", panel=_TRAINING)
    jobs: int = option(
        0,
        "Runs at a time; 0: one for each core, or one on a GPU.",
        "-j",
        panel=_TRAINING,
        check=at_least(0, "; 0 is one per core"),
    )
    threads: int = option(
        1, "Cores for each run; more change the rounding.", panel=_TRAINING, check=at_least(1)
    )
    score_every: int = option(1, "Rounds between scores.", panel=_TRAINING, check=at_least(1))
    keep_clients: bool = option(
        False,
        "Keep the clients' adapters of all rounds, not only of the last.",
        "--keep-clients/--no-keep-clients",
        panel=_TRAINING,
    )

    def __post_init__(self) -> None:
        lists = (("--method", self.arms), ("--lr", self.rates), ("--seeds", self.seeds))
        for flag, values in lists:
            if not values:
                raise UsageError(flag, "an empty list", "give one or more")
            if len(set(values)) < len(values):
                raise UsageError(flag, "a value twice", "give each value once")
        check_options(self)
