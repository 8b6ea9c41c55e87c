"""The verdict on a series of rounds, taken at the rank beyond which most energy was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora_cli.analysis.diagnosis.trend import EnergyCourse, course, fit
from fedlora_cli.analysis.diagnosis.verdict import VERDICTS, judge
from fedlora_cli.linalg.spectrum import FloatArray
from fedlora_cli.reports.diagnose import AdapterRow, Verdict
from fedlora_cli.reports.provenance import Provenance

#: From no verdict to the worst.
_ORDER = (None, *VERDICTS)


@dataclass(frozen=True)
class Judgement:
    """A verdict, its reason, and the energy course behind it; None where there is none."""

    verdict: Verdict | None
    reason: str
    course: EnergyCourse | None


def judge_series(
    rows: Sequence[AdapterRow],
    origins: Sequence[Provenance | None],
    factors: Sequence[FloatArray | None],
    shared_rank: int | None,
) -> Judgement:
    """The judgement of global adapters, in the order of their rounds.

    Energy can be lost beyond every client rank from the shared rank up to the second highest, and
    beyond the rank of the output. The worst verdict counts; among equals, that of the lowest rank.
    """
    if shared_rank is None:
        reason = "the shared rank is unknown; give --shared-rank, the smallest rank of the clients"
        return Judgement(None, reason, None)
    rank = max(row.rank for row in rows)
    client_ranks = {c.rank for origin in origins if origin is not None for c in origin.clients}
    if all(origin is not None for origin in origins):
        highest = max(client_ranks)
        ranks = {r for r in {shared_rank, rank, *client_ranks} if shared_rank <= r < highest}
    else:
        ranks = {shared_rank} if shared_rank < rank else set()
    if not ranks:
        reason = f"no client has a rank above {shared_rank}: no energy can be lost beyond it"
        return Judgement("healthy", reason, None)
    judgements = [_judge(course(rows, origins, factors, r), origins) for r in sorted(ranks)]
    worst = max(judgements, key=lambda judgement: _ORDER.index(judgement.verdict))
    if client_ranks and rank < max(client_ranks):
        cut = f"; the output was cut to rank {rank}, below the clients' {max(client_ranks)}"
        return replace(worst, reason=worst.reason + cut)
    return worst


def _judge(beyond: EnergyCourse, origins: Sequence[Provenance | None]) -> Judgement:
    reported = all(origin is not None for origin in origins)
    if not reported and len(origins) == 1:
        reason = "the clients' energy is unknown; give the earlier rounds as well"
        return Judgement(None, reason, beyond)
    kept = beyond.kept
    if kept[-1] is None:
        return Judgement(None, "the adapter has no energy", beyond)
    verdict, reason = judge(kept, fit(kept)[1], beyond.predicted_gamma, beyond.rank)
    if not reported:
        reason += " (compared with the first round, as the clients' energy is unknown)"
    return Judgement(verdict, reason, beyond)
