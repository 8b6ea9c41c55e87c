"""The diagnosis of the clients of one round, before their aggregation."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora_cli.aggregation.influence import lone_holders
from fedlora_cli.aggregation.options import AggregateOptions
from fedlora_cli.aggregation.plan import make_plan
from fedlora_cli.analysis.diagnosis.cohort import OUTLIER, findings, measure
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.spectra import adapter_row
from fedlora_cli.analysis.diagnosis.thresholds import THRESHOLDS
from fedlora_cli.clients.reading import LoadedCohort, read_clients
from fedlora_cli.execution import engine
from fedlora_cli.remote import Location
from fedlora_cli.reports.diagnose import AdapterRow, CohortFindings, DiagnoseReport
from fedlora_cli.text import rank_range
from fedlora_cli.version import __version__

#: The largest cohort whose clients are compared by default; the pairs grow with its square.
MOST_COMPARED = 100


def diagnose_clients(
    paths: Sequence[Location], options: DiagnoseOptions, stage: engine.Stage
) -> DiagnoseReport:
    """The diagnosis of the clients in `paths`. Raises InputError."""
    loaded = read_clients(paths, options.samples, options.base, adapter=options.adapter)
    cohort = loaded.cohort
    options.check_rank(cohort.rank)
    shared_rank = options.shared_rank or cohort.shared_rank
    few = len(cohort.clients) <= MOST_COMPARED
    similar = few if options.similarity is None else options.similarity
    spectra, alike = measure(cohort, options.jobs, stage("reading clients"), similar=similar)
    bounds = sorted({*cohort.distinct_ranks, shared_rank})
    rows = tuple(
        adapter_row(
            client.name,
            client.adapter,
            values,
            shared_rank,
            [bound for bound in bounds if bound <= client.adapter.rank],
            samples=client.samples,
            share=float(client.samples / cohort.samples.sum()),
        )
        for client, values in zip(cohort.clients, spectra, strict=True)
    )
    plan = make_plan(cohort, AggregateOptions(method="raflora"))
    cohort_findings = findings(plan, rows, spectra, alike, shared_rank)
    holders = lone_holders(plan, plan.weights(), cohort.distinct_ranks)
    lone = [
        f"{cohort.names[k]} holds rank index {rank_range(first, last)} "
        f"{'' if holder.alone else 'nearly '}alone: by raflora it has weight {holder.weight:.2f} "
        "there; `fedlora aggregate --quorum` limits that weight"
        for (first, last, k), holder in holders.items()
    ]
    skipped = f"more than {MOST_COMPARED} clients: give --similarity to compare them"
    return DiagnoseReport(
        subject="clients",
        verdict=None,
        reason="these are client adapters; run diagnose on the global adapters to get one",
        shared_rank=shared_rank,
        energy_ratio=cohort_findings.energy_ratio,
        adapters=rows,
        methods=(None,) * len(rows),
        cohort=cohort_findings,
        trend=None,
        thresholds=THRESHOLDS,
        warnings=(
            *_ambiguity(loaded, options),
            *loaded.remarks,
            *cohort.notes,
            *([] if similar else [skipped]),
            *_oddities(rows, cohort_findings),
            *lone,
        ),
        version=__version__,
    )


def _ambiguity(loaded: LoadedCohort, options: DiagnoseOptions) -> list[str]:
    """A warning if the adapters may be the rounds of another tool."""
    counted = loaded.samples_from != "uniform"
    if options.subject is not None or counted or len(loaded.cohort.distinct_ranks) > 1:
        return []
    return [
        "the adapters are read as clients; for rounds of another tool give --as rounds and "
        "--shared-rank with the smallest rank of the clients"
    ]


def _oddities(rows: Sequence[AdapterRow], cohort: CohortFindings) -> list[str]:
    """Warnings about zero updates, outliers by norm, and copies."""
    warnings = [
        f"the update of {row.name} is zero: its factors multiply to zero"
        for row in rows
        if row.norm == 0
    ]
    for row, client in zip(rows, cohort.clients, strict=True):
        if client.outlier is not None and abs(client.outlier) > OUTLIER:
            warnings.append(
                f"the update of {row.name} has norm {row.norm:.3g}, a robust z of "
                f"{client.outlier:+.1f} among the clients: check its training, or leave it out"
            )
    warnings += [
        f"{copy} has nearly the same update as {original}: check whether it is a copy"
        for original, copy in cohort.copies
    ]
    return warnings
