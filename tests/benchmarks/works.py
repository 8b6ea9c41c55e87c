"""What is measured: cohorts by model, clients, layers and ranks, in two sizes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.models import Model, model_of


@dataclass(frozen=True)
class Work:
    """A cohort to make. All numbers of one figure."""

    model: str
    clients: int
    layers: int = 1
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    independent: bool = False

    @property
    def shape(self) -> Model:
        return model_of(self.model)

    @property
    def total_rank(self) -> int:
        """S = sum r_k."""
        return sum(self.ranks[k % len(self.ranks)] for k in range(self.clients))

    @property
    def modules(self) -> int:
        """How many there are, every expert counted."""
        return self.layers * sum(self.shape.shapes().values())

    @property
    def words(self) -> str:
        """What the table calls it."""
        of = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        whole = self.layers == self.shape.layers
        where = self.model if whole else f"{of} of {self.model}"
        return f"{self.clients} clients of {where}"

    def floor(self, sides: tuple[int, int]) -> tuple[str, float]:
        """The cheaper of the two products for a module with these sides, and its flop."""
        gram = 2.0 * self.total_rank**2 * sum(sides)
        sum_ = 2.0 * self.total_rank * sides[0] * sides[1]
        return ("gram", gram) if gram <= sum_ else ("accumulation", sum_)

    @property
    def flop(self) -> float:
        """Of the floor, all modules."""
        counts = self.shape.shapes().items()
        return self.layers * sum(count * self.floor(sides)[1] for sides, count in counts)


@dataclass(frozen=True)
class Size:
    """How much to measure. Bars are for the work they are stated for, which is that of `full`."""

    name: str
    repeat: int
    kernels: tuple[Work, ...]
    whole: Work
    many: Work
    few_large: Work
    many_small: Work
    jobs: Work
    cluster: Work
    models: tuple[Work, ...]
    by_clients: tuple[Work, ...] = ()  # what is small is over before it can be seen to grow
    by_rank: tuple[Work, ...] = ()
    by_width: tuple[Work, ...] = ()

    @property
    def has_bars(self) -> bool:
        return self.name == "full"


SMALL = Size(
    name="small",
    repeat=1,
    kernels=(Work("square/2", 8),),
    whole=Work("llama-8b", 4),
    many=Work("vit-b", 100),
    few_large=Work("llama-8b/4", 4, ranks=(64,)),
    many_small=Work("llama-8b/4", 32, ranks=(8,)),
    jobs=Work("llama-8b/2", 8),
    cluster=Work("llama-8b/4", 4),
    models=(Work("vit-b", 4),),
)

FULL = Size(
    name="full",
    repeat=3,
    kernels=(Work("square", 20), Work("square", 20, independent=True)),
    whole=Work("llama-8b", 20, 32),
    many=Work("llama-8b", 1000, 2),
    few_large=Work("llama-8b", 16, 2, ranks=(64,)),
    many_small=Work("llama-8b", 128, 2, ranks=(8,)),
    jobs=Work("llama-8b", 20, 8),
    cluster=Work("llama-8b", 20, 32),
    models=(
        Work("bert-base", 20, 12),
        Work("vit-b", 20, 12),
        Work("mixture-30b", 4, ranks=(8, 16)),
        Work("llama-70b", 20),
    ),
    by_clients=tuple(Work("llama-8b", clients) for clients in (5, 10, 20, 40, 80)),
    by_rank=tuple(Work("llama-8b", 20, ranks=(rank,)) for rank in (8, 16, 32, 64)),
    by_width=tuple(
        Work(model, 20) for model in ("llama-8b/8", "llama-8b/4", "llama-8b/2", "llama-8b")
    ),
)

SIZES = {size.name: size for size in (SMALL, FULL)}
