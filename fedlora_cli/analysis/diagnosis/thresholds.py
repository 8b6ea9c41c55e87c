"""The limits of a diagnosis as its report has them."""

from __future__ import annotations

from fedlora_cli.analysis.diagnosis.cohort import OUTLIER
from fedlora_cli.analysis.diagnosis.spectra import DEAD
from fedlora_cli.analysis.diagnosis.verdict import AT_RISK, COLLAPSED, RATE_AT_RISK
from fedlora_cli.reports.diagnose import Thresholds

THRESHOLDS = Thresholds(
    at_risk=AT_RISK, collapsed=COLLAPSED, rate_at_risk=RATE_AT_RISK, outlier=OUTLIER, dead=DEAD
)
