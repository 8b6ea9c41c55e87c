"""What an attacker may upload, as small pure functions from what it knows to what it sends.

The strongest attackers of the literature see what every honest client sends. They are few (F), hold
the highest rank that occurs, where few others do, and tell honest sample counts unless that is the
attack.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from support.adapters import CONFIG, PREFIX, WEIGHTS

Array = npt.NDArray[np.float64]

SHAPES = {"layers.0.q_proj": (56, 48), "layers.0.fc": (50, 72)}
HEAD = "score.weight"

#: A module that honest clients leave alone.
EXTRA = ("layers.0.v_proj", (52, 60))

#: Honest clients, three of each rank, and attackers.
RANKS = (4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32)
F = 2

#: An honest update has norm 1; its noise, all directions together, this.
NOISE = 0.6

#: A rank that no honest client has.
INFLATED = 48


@dataclass(frozen=True, eq=False)
class Upload:
    """A client's files: factors (B, A) by module, of one rank, and a head."""

    factors: Mapping[str, tuple[Array, Array]]
    alpha: float
    samples: float
    head: Array
    rslora: bool = False

    @property
    def rank(self) -> int:
        return len(next(A for _, A in self.factors.values()))

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def update(self, module: str) -> Array:
        B, A = self.factors[module]
        return self.scale * B @ A

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        tensors = {PREFIX + HEAD: self.head}
        for module, (B, A) in self.factors.items():
            tensors[f"{PREFIX}{module}.lora_B.weight"] = B
            tensors[f"{PREFIX}{module}.lora_A.weight"] = A
        stored = {name: torch.from_numpy(one.copy()).float() for name, one in tensors.items()}
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "target_modules": sorted(self.factors),
            "modules_to_save": ["score"],
            "base_model_name_or_path": "tiny/base",
        }
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / "fedlora.json").write_text(json.dumps({"samples": self.samples}))


@dataclass(frozen=True, eq=False)
class Scene:
    """One round. `own` is what the attackers would send if they were honest, `earlier` and
    `earlier_own` what was sent in the round before; `seed` draws what an attack needs.
    """

    honest: tuple[Upload, ...]
    own: tuple[Upload, ...]
    earlier: tuple[Upload, ...]
    earlier_own: tuple[Upload, ...]
    seed: int

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1])

    def stacked(self, module: str) -> Array:
        """The honest updates of a module, (K, out, in)."""
        return np.stack([one.update(module) for one in self.honest])

    @property
    def mean(self) -> dict[str, Array]:
        return {module: self.stacked(module).mean(axis=0) for module in SHAPES}


def scene(seed: int) -> Scene:
    """Honest clients hold truncations of one signal, σ_i ∝ 1/i, each with noise of its own; the
    signal of the round before is nearly the same. Factors are in SVD order, as clients that start
    from `fedlora distribute` have them.
    """
    rng = np.random.default_rng([seed, 0])
    signal = {module: _signal(rng, *shape) for module, shape in SHAPES.items()}
    drift = {module: 0.3 * _signal(rng, *shape) for module, shape in SHAPES.items()}
    before = {module: 0.8 * one + drift[module] for module, one in signal.items()}
    head = rng.standard_normal((4, 8))
    ranks = (*RANKS, *[max(RANKS)] * F)
    samples = [float(n) for n in rng.integers(60, 240, len(ranks))]
    earlier = [_client(rng, before, head, r, n) for r, n in zip(ranks, samples, strict=True)]
    now = [_client(rng, signal, head, r, n) for r, n in zip(ranks, samples, strict=True)]
    K = len(RANKS)
    return Scene(tuple(now[:K]), tuple(now[K:]), tuple(earlier[:K]), tuple(earlier[K:]), seed)


def _signal(rng: np.random.Generator, rows: int, columns: int) -> Array:
    directions = min(rows, columns)
    U, _ = np.linalg.qr(rng.standard_normal((rows, directions)))
    V, _ = np.linalg.qr(rng.standard_normal((columns, directions)))
    s = 1.0 / np.arange(1, directions + 1)
    matrix: Array = (U * (s / np.linalg.norm(s))) @ V.T
    return matrix


def _client(
    rng: np.random.Generator, signal: Mapping[str, Array], head: Array, rank: int, samples: float
) -> Upload:
    noisy = {
        module: one + NOISE / one.size**0.5 * rng.standard_normal(one.shape)
        for module, one in signal.items()
    }
    far = rng.uniform(0.8, 1.25)  # some train further than others
    own_head = head + 0.3 * rng.standard_normal(head.shape)
    factors = {module: halves(far * one, rank) for module, one in noisy.items()}
    return Upload(factors, 2.0 * rank, samples, own_head)


def halves(matrix: Array, rank: int, scale: float = 2.0) -> tuple[Array, Array]:
    """B and A of the best approximation of a rank, with scale · B A that update."""
    U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


# --- attacks --------------------------------------------------------------------------------------


Attack = Callable[[Scene], list[Upload]]


def scaled(one: Upload, b: float, a: float = 1.0) -> Upload:
    return replace(one, factors={m: (b * B, a * A) for m, (B, A) in one.factors.items()})


def holding(one: Upload, updates: Mapping[str, Array]) -> Upload:
    """The same client with other updates, as far as its rank holds them."""
    return replace(one, factors={m: halves(new, one.rank, one.scale) for m, new in updates.items()})


def colluding(one: Upload, number: int) -> list[Upload]:
    """One update several times, in files that are not copies of each other."""
    return [scaled(one, 1 + 1e-3 * k) for k in range(number)]


def norms(one: Upload) -> dict[str, float]:
    return {module: float(np.linalg.norm(one.update(module))) for module in SHAPES}


def scale_1000(found: Scene) -> list[Upload]:
    return [scaled(one, 1e3) for one in found.own]


def sign_flip(found: Scene) -> list[Upload]:
    return [scaled(one, -1.0) for one in found.own]


def gaussian(found: Scene) -> list[Upload]:
    """Noise as large as the attacker's own update."""
    rng = found.rng
    return [
        holding(one, {m: _noise(rng, SHAPES[m], one.rank, n) for m, n in norms(one).items()})
        for one in found.own
    ]


def _noise(rng: np.random.Generator, shape: tuple[int, int], rank: int, norm: float) -> Array:
    """A random matrix of that rank and Frobenius norm."""
    B, A = halves(rng.standard_normal(shape), rank)
    drawn: Array = B @ A
    return drawn * (norm / np.linalg.norm(drawn))


def constant(found: Scene) -> list[Upload]:
    """All entries the same, as large as the own update."""
    one = found.own[0]
    flat = {m: np.full(SHAPES[m], n / np.prod(SHAPES[m]) ** 0.5) for m, n in norms(one).items()}
    return colluding(holding(one, flat), F)


def zero(found: Scene) -> list[Upload]:
    return [scaled(one, 0.0) for one in found.own]


def gauge_blow_up(found: Scene) -> list[Upload]:
    """(10⁶ B, 10⁻⁶ A): the same update."""
    return [scaled(one, 1e6, 1e-6) for one in found.own]


def gauge_scramble(found: Scene) -> list[Upload]:
    """(B Q, Qᵀ A), Q orthogonal: the same update, in another basis."""
    rng = found.rng
    return [scrambled(one, rng) for one in found.own]


def scrambled(one: Upload, rng: np.random.Generator) -> Upload:
    Q, _ = np.linalg.qr(rng.standard_normal((one.rank, one.rank)))
    return replace(one, factors={m: (B @ Q, Q.T @ A) for m, (B, A) in one.factors.items()})


def rank_inflation(found: Scene) -> list[Upload]:
    """One client of a rank that nobody else has, all of its energy there: as large as an honest
    update.
    """
    return [_inflated(found, 1.0)]


def rank_inflation_10(found: Scene) -> list[Upload]:
    return [_inflated(found, 10.0)]


def _inflated(found: Scene, size: float) -> Upload:
    one = found.own[0]
    full = replace(one, alpha=one.scale * INFLATED)
    rng, first = found.rng, one.rank
    factors = {}
    for module, norm in norms(one).items():
        new = _noise(rng, SHAPES[module], INFLATED - first, size * norm)
        B, A = halves(new, INFLATED - first, full.scale)
        factors[module] = (
            np.concatenate([np.zeros((B.shape[0], first)), B], axis=1),
            np.concatenate([one.factors[module][1], A]),
        )
    return replace(full, factors=factors)


def rank_deflation(found: Scene) -> list[Upload]:
    """Rank 1, and the sign flipped: what it holds, all others hold as well."""
    return [
        replace(
            one,
            alpha=one.scale,
            factors={m: (-B[:, :1], A[:1]) for m, (B, A) in one.factors.items()},
        )
        for one in found.own
    ]


def sybils(found: Scene) -> list[Upload]:
    """One attacker under six names, the sign flipped: more than F."""
    return colluding(scaled(found.own[0], -1.0), 6)


def alie(found: Scene) -> list[Upload]:
    """mean - std, entry by entry (A Little Is Enough, arXiv:1902.06156)."""
    new = {m: found.stacked(m).mean(axis=0) - found.stacked(m).std(axis=0) for m in SHAPES}
    return colluding(holding(found.own[0], new), F)


def inner_product(found: Scene) -> list[Upload]:
    """-½ mean (inner-product manipulation, arXiv:1903.03936)."""
    return colluding(holding(found.own[0], {m: -0.5 * one for m, one in found.mean.items()}), F)


def min_max(found: Scene) -> list[Upload]:
    """mean - γ mean / ‖mean‖, γ the largest at which no honest client is further away than two of
    them are from each other (Shejwalkar and Houmansadr, NDSS 2021).
    """
    flat = np.concatenate([found.stacked(m).reshape(len(RANKS), -1) for m in SHAPES], axis=1)
    mean = flat.mean(axis=0)
    unit = mean / np.linalg.norm(mean)
    widest = max(np.linalg.norm(flat - one, axis=1).max() for one in flat)
    # ‖x - mean + γ unit‖² = ‖x - mean‖² + 2 γ (x - mean)·unit + γ²: the first to reach the widest.
    along = (flat - mean) @ unit
    room = widest**2 - np.square(flat - mean).sum(axis=1)
    gamma = float((np.sqrt(along**2 + room) - along).min())
    shrunk = 1 - gamma / float(np.linalg.norm(mean))
    return colluding(holding(found.own[0], {m: shrunk * one for m, one in found.mean.items()}), F)


def alpha_inflation(found: Scene) -> list[Upload]:
    """lora_alpha = 10⁶ over tensors that look small: 10⁻² of honest ones."""
    return [replace(scaled(one, 0.1, 0.1), alpha=1e6) for one in found.own]


def one_module(found: Scene) -> list[Upload]:
    """The first module alone, the sign flipped; the other one is not there."""
    first = next(iter(SHAPES))
    flipped = sign_flip(found)
    return [replace(one, factors={first: one.factors[first]}) for one in flipped]


def own_module(found: Scene) -> list[Upload]:
    """One client that adapts one module more than all others, with noise as large as an update."""
    one = found.own[0]
    size = max(norms(one).values())
    more = halves(_noise(found.rng, EXTRA[1], one.rank, size), one.rank, one.scale)
    return [replace(one, factors={**one.factors, EXTRA[0]: more})]


def rslora_flag(found: Scene) -> list[Upload]:
    """use_rslora set after training without it: √r times the update."""
    return [replace(one, rslora=True) for one in found.own]


def stale_round(found: Scene) -> list[Upload]:
    """What was trained in the round before, sent again."""
    return list(found.earlier_own)


def sample_inflation(found: Scene) -> list[Upload]:
    """90 times the samples of an honest client, and the sign flipped."""
    typical = float(np.median([one.samples for one in found.honest]))
    return [replace(one, samples=90 * typical) for one in sign_flip(found)]


def scale_million(found: Scene) -> list[Upload]:
    return [scaled(one, 1e6) for one in found.own]


def scale_largest(found: Scene) -> list[Upload]:
    """Near the largest float32."""
    return [scaled(one, 1e37) for one in found.own]


def cancelling_norm(found: Scene) -> list[Upload]:
    """An honest update and a pair of pieces, b a and -b (a + δ), whose difference is 6 × 10⁷."""
    return [_with_pair(one, 2.0**50, 2.0**-24, (-2, -1)) for one in found.own]


def erasing_zero(found: Scene) -> list[Upload]:
    """A pair of pieces of 10¹³ that leaves exactly zero."""
    return [_with_pair(scaled(one, 0.0), 1e13, 0.0, (-2, -1)) for one in found.own]


def cancelling_ranks(found: Scene) -> list[Upload]:
    """An honest update whose first and last rank index hold a pair of pieces of 10⁴: it is gone
    where both have one weight alone.
    """
    return [_with_pair(one, 1e4, 0.0, (0, -1)) for one in found.own]


def _with_pair(one: Upload, size: float, apart: float, places: tuple[int, int]) -> Upload:
    """Two pieces of that size at these rank indices, b a and -b (a + δ), δ this share of a."""
    factors = {}
    first, last = places
    for module, (B, A) in one.factors.items():
        B, A = B.copy(), A.copy()
        b, a = (np.float32(np.full(side, 1 / side**0.5)) for side in (B.shape[0], A.shape[1]))
        B[:, first], B[:, last] = size / one.scale * b, -size / one.scale * b
        A[first], A[last] = a, a
        A[last, 0] *= 1 + apart
        factors[module] = (B, A)
    return replace(one, factors=factors)


def head_1000(found: Scene) -> list[Upload]:
    """An honest update with a head a thousand times as large."""
    return [replace(one, head=1e3 * one.head) for one in found.own]


#: The attacks, by their names in SECURITY.md.
ATTACKS: dict[str, Attack] = {
    "update × 1000": scale_1000,
    "update × 10⁶": scale_million,
    "update × 10³⁷": scale_largest,
    "pieces that cancel to 10⁻⁸ of 2⁵⁰": cancelling_norm,
    "pieces of 10¹³ that cancel to zero": erasing_zero,
    "rank indices of 10⁴ that cancel": cancelling_ranks,
    "sign flip": sign_flip,
    "noise as large as an update": gaussian,
    "all entries equal": constant,
    "zero update": zero,
    "basis (10⁶ B, 10⁻⁶ A)": gauge_blow_up,
    "basis (B Q, Qᵀ A)": gauge_scramble,
    "rank 48, one client": rank_inflation,
    "rank 48, one client, × 10": rank_inflation_10,
    "sign flip at rank 1": rank_deflation,
    "sign flip by 6 sybils": sybils,
    "ALIE: mean - std": alie,
    "inner product: -½ mean": inner_product,
    "min-max collusion": min_max,
    "lora_alpha = 10⁶, tensors × 0.1": alpha_inflation,
    "sign flip in one module of two": one_module,
    "a module that no other client has": own_module,
    "rsLoRA flag set afterwards": rslora_flag,
    "last round's adapter": stale_round,
    "sign flip, 90 × the samples": sample_inflation,
    "head × 1000": head_1000,
}


def write_all(uploads: Sequence[Upload], place: Path, prefix: str) -> Path:
    """One folder with a folder for each of them."""
    for number, one in enumerate(uploads):
        one.write(place / f"{prefix}-{number:02}")
    return place
