"""The diagnosis of global adapters: a single one, or a series of rounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from fedlora_cli import formats
from fedlora_cli.adapters.adapter import Adapter
from fedlora_cli.adapters.batches import grouped
from fedlora_cli.analysis.diagnosis.judgement import judge_series
from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.remarks import series_remarks
from fedlora_cli.analysis.diagnosis.spectra import adapter_row, partition_bounds, read_finite
from fedlora_cli.analysis.diagnosis.thresholds import THRESHOLDS
from fedlora_cli.analysis.diagnosis.trend import course, energy_factors_by_round, trend
from fedlora_cli.errors import InputError
from fedlora_cli.execution import engine
from fedlora_cli.linalg import lowrank
from fedlora_cli.linalg.spectrum import FloatArray
from fedlora_cli.remote import Location
from fedlora_cli.reports.diagnose import DiagnoseReport
from fedlora_cli.reports.provenance import Provenance
from fedlora_cli.reports.round_folders import round_name
from fedlora_cli.version import __version__


def diagnose_series(
    folders: Sequence[Location],
    origins: Sequence[Provenance | None],
    options: DiagnoseOptions,
    stage: engine.Stage,
) -> DiagnoseReport:
    """The diagnosis of global adapters in the order of their rounds. Raises InputError."""
    adapters = [formats.read(folder) for folder in folders]
    _check_series(adapters)
    options.check_rank(max(adapter.rank for adapter in adapters))
    reported = [origin.shared_rank for origin in origins if origin is not None]
    shared_rank = options.shared_rank or min(reported, default=None)
    known = sorted({c.rank for origin in origins if origin for c in origin.clients})
    spectra = _spectra(adapters, options.jobs, stage("reading"))
    rows = tuple(
        adapter_row(
            round_name(adapter.path),
            adapter,
            values,
            shared_rank,
            partition_bounds(adapter.rank, known, shared_rank),
        )
        for adapter, values in zip(adapters, spectra, strict=True)
    )
    factors = energy_factors_by_round(rows, origins)
    judgement = judge_series(rows, origins, factors, shared_rank)
    single = len(rows) == 1 and options.subject is None
    over_rounds = None
    if not single and shared_rank is not None:
        shared = course(rows, origins, factors, shared_rank)
        over_rounds = trend(rows, factors, shared, judgement.course or shared)
    return DiagnoseReport(
        subject="adapter" if single else "rounds",
        verdict=judgement.verdict,
        reason=judgement.reason,
        shared_rank=shared_rank,
        energy_ratio=rows[-1].energy_ratio,
        adapters=rows,
        methods=tuple(None if origin is None else origin.method for origin in origins),
        cohort=None,
        trend=over_rounds,
        thresholds=THRESHOLDS,
        warnings=(
            *(note for adapter in adapters for note in adapter.notes),
            *series_remarks([row.name for row in rows], origins),
        ),
        version=__version__,
    )


def _spectra(
    adapters: Sequence[Adapter], jobs: int, progress: engine.Progress
) -> list[dict[str, FloatArray]]:
    """The singular values by adapter and module; each tensor is read once."""
    tasks = [(k, part) for k, a in enumerate(adapters) for part in grouped([a], a.modules)]
    result: list[dict[str, FloatArray]] = [{} for _ in adapters]

    def one_part(task: tuple[int, tuple[str, ...]]) -> dict[str, FloatArray]:
        k, names = task
        factors = read_finite(adapters[k], names)
        return {name: lowrank.spectrum(pair).numpy() for name, pair in factors.items()}

    for (k, _), spectra in zip(tasks, engine.run(one_part, tasks, jobs, progress), strict=True):
        result[k] |= spectra
    return result


def _check_series(adapters: Sequence[Adapter]) -> None:
    """Check that the adapters fit one base model. Raises InputError."""
    for earlier, later in pairwise(adapters):
        for name in earlier.modules.keys() & later.modules.keys():
            before, after = earlier.modules[name].shape, later.modules[name].shape
            if before != after:
                here, there = (f"{out} x {in_}" for out, in_ in (after, before))
                found = f"{name} is {here}, but {there} in {earlier.path}"
                raise InputError(later.path, found, "leave out the adapters of another base model")
