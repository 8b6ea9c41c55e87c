"""The diagnosis of one round's clients, before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.aggregation.influence import lone_holders
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import make_plan
from fedlora_cli.analysis.diagnosis.cohort import OUTLIER, findings, measure
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.spectra import adapter_row
from fedlora_cli.clients.reading import LoadedCohort, read_clients
from fedlora_cli.execution import engine
from fedlora_cli.remote import Location
from fedlora_cli.reports.diagnose import AdapterRow, CohortFindings, DiagnoseReport
from fedlora_cli.text import rank_range
from fedlora_cli.version import __version__

#: Pairs of clients grow with their square: with more clients, similarity must be asked for.
MOST_COMPARED = 100


def diagnose_clients(
    paths: Sequence[Location], options: DiagnoseOptions, stage: engine.Stage
) -> DiagnoseReport:
    """What the clients in `paths` hold, and how they stand to each other. Raises InputError."""
    found = read_clients(paths, options.samples, options.base, adapter=options.adapter)
    cohort = found.cohort
    options.check_rank(cohort.rank)
    shared_rank = options.shared_rank or cohort.shared_rank
    few = len(cohort.clients) <= MOST_COMPARED
    similar = few if options.similarity is None else options.similarity
    jobs = options.jobs or engine.available_cores()
    measured = measure(cohort, jobs, stage("reading clients"), similar=similar)
    bounds = sorted({*cohort.distinct_ranks, shared_rank})
    rows = tuple(
        adapter_row(
            client.name,
            client.adapter,
            spectra,
            shared_rank,
            [bound for bound in bounds if bound <= client.adapter.rank],
            samples=client.samples,
            share=float(client.samples / cohort.samples.sum()),
        )
        for client, spectra in zip(cohort.clients, measured.spectra, strict=True)
    )
    plan = make_plan(cohort, AggregateOptions(method="raflora"))
    seen = findings(plan, rows, measured, shared_rank)
    lone = [
        f"rank index {rank_range(first, last)} is held by {cohort.names[k]} "
        f"{'' if one.alone else 'nearly '}alone: under raflora it has weight {one.weight:.2f} "
        "there; `fedlora aggregate --quorum` bounds that"
        for (first, last, k), one in lone_holders(
            plan, plan.weights(), cohort.distinct_ranks
        ).items()
    ]
    skipped = () if similar else (f"more than {MOST_COMPARED} clients: --similarity compares them",)
    return DiagnoseReport(
        subject="clients",
        verdict=None,
        reason="a verdict needs what was made of these clients: diagnose the global adapters",
        shared_rank=shared_rank,
        energy_ratio=seen.energy_ratio,
        adapters=rows,
        methods=(None,) * len(rows),
        cohort=seen,
        trend=None,
        warnings=(
            *_taken(found, options),
            *found.remarks,
            *cohort.notes,
            *skipped,
            *_oddities(rows, seen),
            *lone,
        ),
        version=__version__,
    )


def _taken(found: LoadedCohort, options: DiagnoseOptions) -> list[str]:
    """A warning where these may as well be the rounds of some other tool."""
    cohort = found.cohort
    counted = found.samples_from != "uniform"
    if options.subject is not None or counted or len(cohort.distinct_ranks) > 1:
        return []
    return [
        "taken for clients, as nothing tells otherwise; if these are rounds: --as rounds "
        "--shared-rank R, the smallest rank of their clients"
    ]


def _oddities(rows: Sequence[AdapterRow], seen: CohortFindings) -> list[str]:
    """Clients that stand out: by their norm, as copies, without any update."""
    warnings = [f"{row.name} has no update at all; its factors multiply to zero" for row in rows
                if row.norm == 0]  # fmt: skip
    for row, client in zip(rows, seen.clients, strict=True):
        if client.outlier is not None and abs(client.outlier) > OUTLIER:
            warnings.append(
                f"the update of {row.name} has norm {row.norm:.3g}, a robust z of "
                f"{client.outlier:+.1f} among the clients: look at its training, or leave it out"
            )
    warnings += [
        f"{copy} has the update of {original}, or nearly so: is one a copy of the other?"
        for original, copy in seen.copies
    ]
    return warnings
