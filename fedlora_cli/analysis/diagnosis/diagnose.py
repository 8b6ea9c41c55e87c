"""The diagnosis of rank collapse: of one adapter, of a cohort, of a series of rounds."""

from __future__ import annotations

from dataclasses import replace

from fedlora_cli.analysis.diagnosis.options import DiagnoseOptions
from fedlora_cli.analysis.diagnosis.round import diagnose_clients
from fedlora_cli.analysis.diagnosis.series import diagnose_series
from fedlora_cli.clients.reading import Paths, paths_of
from fedlora_cli.errors import UsageError
from fedlora_cli.execution import engine
from fedlora_cli.remote import prefetched
from fedlora_cli.reports.diagnose import DiagnoseReport
from fedlora_cli.reports.provenance import read_provenance
from fedlora_cli.reports.round_folders import find_adapters

DEFAULTS = DiagnoseOptions()


def diagnose(
    paths: Paths,
    options: DiagnoseOptions = DEFAULTS,
    stage: engine.Stage = engine.quiet,
) -> DiagnoseReport:
    """The diagnosis of one adapter, of the clients of a round, or of global adapters by round.

    `paths` are adapter folders, folders of adapter folders, or a folder of rounds, each of which
    holds an adapter named `global`. Several adapters are rounds if fedlora aggregated all of them
    and clients if it aggregated none; `options.subject` overrides this. Raises UsageError and
    InputError.
    """
    given = paths_of(paths)
    if options.adapter is not None:
        return diagnose_clients(given, options, stage)
    folders, remarks = find_adapters(given)
    origins = [answer() for answer in prefetched(read_provenance, folders)]
    aggregated = sum(origin is not None for origin in origins)
    clients = options.subject == "clients"
    if options.subject is None and len(folders) > 1:
        if 0 < aggregated < len(folders):
            written = next(f for f, made in zip(folders, origins, strict=True) if made is not None)
            found = f"{aggregated} of {len(folders)} adapters, such as {written}, are global"
            raise UsageError("PATHS", found, "give either clients or rounds, or choose with --as")
        clients = aggregated == 0
    if clients:
        return diagnose_clients(given, options, stage)
    report = diagnose_series(folders, origins, options, stage)
    return replace(report, warnings=(*remarks, *report.warnings))
