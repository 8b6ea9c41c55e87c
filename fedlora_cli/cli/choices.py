"""The options of `fedlora simulate` that make up a setting and what is compared in it.

Each is None where it was not given: then the preset tells.
"""

from __future__ import annotations

from typing import Annotated

from fedlora_cli.aggregation import options
from fedlora_cli.cli.shared import option
from fedlora_cli.methods import METHODS
from fedlora_cli.simulation.options import Family

_COMPARISON = "Comparison"
_FEDERATION = "Federation"
_TRAINING = "Training"
_DATA = "Model and data"

#: Those whose clients train both factors, on a base model that stays what it is.
_COMPARED = [
    method.name
    for method in METHODS.values()
    if method.merge != "shared" and (method.merge, method.compress) != ("sum", "none")
]

Method = Annotated[
    list[str] | None,
    option(
        "--method",
        "-m",
        panel=_COMPARISON,
        metavar="NAME[:quorum=Q][:momentum=B]",
        help=f"What to compare, again or with commas: {', '.join(_COMPARED)}.",
    ),
]
Quorum = Annotated[
    str | None,
    option("--quorum", panel=_COMPARISON, metavar="Q,Q,...", help="Each with all that take it."),
]
Momentum = Annotated[
    str | None,
    option("--momentum", panel=_COMPARISON, metavar="B,B,...", help="Each with all that take it."),
]
Lr = Annotated[
    str | None,
    option("--lr", panel=_COMPARISON, metavar="LR,LR,...", help="Learning rates to choose from."),
]
Seeds = Annotated[
    str | None,
    option(
        "--seeds",
        panel=_COMPARISON,
        metavar="N|S,S,...",
        help="How many, or which: 3 or 0,1,2.",
    ),
]
Rounds = Annotated[int | None, option("--rounds", panel=_COMPARISON, help="Of every run.")]

Cohort = Annotated[
    str | None,
    option("--cohort", panel=_FEDERATION, metavar="KxR,...", help="Groups of K clients of rank R."),
]
Ranks = Annotated[
    str | None,
    option("--ranks", panel=_FEDERATION, metavar="R,R,...", help="Instead: the rank of every one."),
]
Participation = Annotated[
    float | None,
    option("--participation", "-p", panel=_FEDERATION, help="Share of them in every round."),
]
Dirichlet = Annotated[
    float | None,
    option("--dirichlet", panel=_FEDERATION, help="Concentration of classes; small: uneven."),
]
Classes = Annotated[
    int | None,
    option("--classes", panel=_FEDERATION, help="Instead: so many classes for every client."),
]
Holdings = Annotated[
    float | None,
    option(
        "--holdings",
        panel=_FEDERATION,
        help="Samples go with rank to this power; 0: even, 1: more for high ranks.",
    ),
]

Epochs = Annotated[int | None, option("--epochs", panel=_TRAINING, help="Of a client in a round.")]
BatchSize = Annotated[
    int | None, option("--batch-size", panel=_TRAINING, help="Of a client's step.")
]
Scaling = Annotated[
    float | None, option("--scaling", panel=_TRAINING, help="alpha / r of all adapters.")
]
Dropout = Annotated[float | None, option("--dropout", panel=_TRAINING, help="lora_dropout.")]
Device = Annotated[
    str | None, option("--device", panel=_TRAINING, help="Where to train: cpu, cuda, cuda:1.")
]
Jobs = Annotated[
    int | None,
    option(
        "--jobs",
        "-j",
        panel=_TRAINING,
        help="Runs at a time; 0: one per core, or one on a GPU.",
    ),
]
Threads = Annotated[
    int | None,
    option("--threads", panel=_TRAINING, help="Cores of a run; more than 1 round differently."),
]
ScoreEvery = Annotated[
    int | None, option("--score-every", panel=_TRAINING, help="Rounds between two scores.")
]
KeepClients = Annotated[
    bool | None,
    option(
        "--keep-clients/--no-keep-clients",
        panel=_TRAINING,
        help="Keep the clients' adapters of all rounds, not only of the last.",
    ),
]

Task = Annotated[
    Family | None, option("--task", panel=_DATA, help="Of another one: what to train.")
]
Model = Annotated[
    str | None, option("--model", panel=_DATA, help="A folder, or a name on the hub.")
]
Data = Annotated[
    list[str] | None,
    option("--data", panel=_DATA, help="A file, a folder or a name on the hub; again for more."),
]
Config = Annotated[
    str | None, option("--config", panel=_DATA, help="The data's configuration on the hub.")
]
TrainSplit = Annotated[
    str | None, option("--train-split", panel=_DATA, help="Of the data, to train on.")
]
TestSplit = Annotated[
    str | None,
    option("--test-split", panel=_DATA, help="To test on; default: a part held out."),
]
Input = Annotated[
    str | None, option("--input", panel=_DATA, help="Column of images, texts or questions.")
]
Label = Annotated[str | None, option("--label", panel=_DATA, help="Column of classes or answers.")]
TargetModules = Annotated[
    str | None,
    option(
        "--target-modules",
        panel=_DATA,
        metavar="NAME,NAME,...",
        help="Modules to adapt, or all-linear.",
    ),
]
ModulesToSave = Annotated[
    str | None,
    option("--modules-to-save", panel=_DATA, metavar="NAME,NAME,...", help="Trained in full."),
]
MaxLength = Annotated[int | None, option("--max-length", panel=_DATA, help="Of a text, in tokens.")]
MaxNewTokens = Annotated[int | None, option("--max-new-tokens", panel=_DATA, help="Of an answer.")]
Limit = Annotated[
    int | None, option("--limit", panel=_DATA, help="No more examples of a split than that.")
]
Dtype = Annotated[
    options.Dtype | None, option("--dtype", panel=_DATA, help="To load the base model in.")
]
