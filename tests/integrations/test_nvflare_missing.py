"""Without NVFlare: the package, the error that names the extra, and the comparison with HLoRA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_needs_no_nvflare_and_the_module_names_the_extra() -> None:
    code = "import sys; sys.modules['nvflare'] = None; import fedlora_cli.integrations."

    assert python(code + "nvflare_results").returncode == 0
    done = python(code + "nvflare")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: fedlora_cli.integrations.nvflare:")
    assert done.stderr.splitlines()[-1].endswith("pip install 'fedlora[nvflare]'")


def test_no_other_module_imports_nvflare() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "fedlora_cli").rglob("*.py")
        if "from nvflare" in path.read_text() or "import nvflare" in path.read_text()
    }

    assert found == {"fedlora_cli/integrations/nvflare.py"}


def test_the_comparison_with_hlora_is_that_of_the_document() -> None:
    script = ROOT / "samples" / "nvflare" / "compare_hlora.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    rows = {
        cells[0].strip(): [float(cell) for cell in cells[1:]]
        for line in done.stdout.splitlines()[2:]
        for cells in [line.strip("|").split("|")]
    }

    assert rows["HLoRA"][1] == pytest.approx(0.65, abs=0.05)
    assert rows["fedlora flexlora"] == pytest.approx(rows["truncation alone"], abs=0.001)
    assert rows["fedlora flexlora"][1] == pytest.approx(0.01, abs=0.005)
    assert rows["naive"][0] > 0.1
    assert done.stdout in (script.parent / "README.md").read_text()
