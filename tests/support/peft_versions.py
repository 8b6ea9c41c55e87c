"""Tests that only some versions of PEFT can pass."""

from __future__ import annotations

import peft
import pytest
from packaging.version import Version


def older_than(version: str) -> bool:
    """Whether the PEFT that is installed comes before this version."""
    return Version(peft.__version__) < Version(version)


def needs_peft(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test, or a case of it, under a PEFT before this version."""
    sentence = f"needs PEFT {version}: earlier versions {reason}"
    return pytest.mark.skipif(older_than(version), reason=sentence)


NEWER_EXPERTS = needs_peft(
    "0.19.1", "store the experts of most models the other way round, and init refuses them"
)
EXPERTS_BY_NAME = needs_peft(
    "0.20", "do not turn the names of experts into parameters, or fail to under transformers 5.18"
)
