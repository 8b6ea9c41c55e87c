"""The verdict over a series of rounds: by the rank beyond which most was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlora_cli.analysis.diagnosis.trend import Course, course, fit
from fedlora_cli.analysis.diagnosis.verdict import VERDICTS, judge
from fedlora_cli.linalg.spectrum import FloatArray
from fedlora_cli.reports.diagnose import AdapterRow, Verdict
from fedlora_cli.reports.provenance import Provenance


@dataclass(frozen=True)
class Judgement:
    """The verdict and its reason, and the course it is about; None without any."""

    verdict: Verdict | None
    reason: str
    course: Course | None


def judge_series(
    rows: Sequence[AdapterRow],
    origins: Sequence[Provenance | None],
    factors: Sequence[FloatArray | None],
    shared_rank: int | None,
) -> Judgement:
    """The judgement of these global adapters, in the order of their rounds.

    Every rank of a client beyond which another client held something, from the shared one on, is a
    place where energy can be lost, and so is the rank to which the output was cut. The worst
    verdict counts, and of several that are as bad, that of the lowest rank.
    """
    if shared_rank is None:
        return Judgement(None, "give --shared-rank, the smallest rank of the clients", None)
    rank = max(row.rank for row in rows)
    told = {c.rank for origin in origins if origin is not None for c in origin.clients}
    if all(origin is not None for origin in origins):
        places = {r for r in {shared_rank, rank, *told} if shared_rank <= r < max(told)}
    else:
        places = {shared_rank} if shared_rank < rank else set()
    if not places:
        reason = f"all clients held all of rank {shared_rank}: nothing lies beyond it"
        return Judgement("healthy", reason, None)
    judgements = [_judge(course(rows, origins, factors, r), origins) for r in sorted(places)]
    worst = max(judgements, key=_badness)
    if told and rank < max(told):
        cut = f"; the output was cut to rank {rank}, below the clients' {max(told)}"
        return replace(worst, reason=worst.reason + cut)
    return worst


def _judge(one: Course, origins: Sequence[Provenance | None]) -> Judgement:
    told = all(origin is not None for origin in origins)
    if not told and len(origins) == 1:
        reason = "nothing tells what the clients put there; give the rounds before it as well"
        return Judgement(None, reason, one)
    if one.kept[-1] is None:
        return Judgement(None, "there is no energy in it", one)
    verdict, reason = judge(one.kept, fit(one.kept)[1], one.predicted_gamma, one.rank)
    if not told:
        reason += " (compared with the first round, as nothing tells what the clients put there)"
    return Judgement(verdict, reason, one)


def _badness(judgement: Judgement) -> int:
    return -1 if judgement.verdict is None else VERDICTS.index(judgement.verdict)
