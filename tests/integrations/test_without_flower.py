"""Without Flower, everything else works, and its module names the extra."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDE = "import sys; sys.modules[{!r}] = None; "


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["flwr", "flwr.serverapp", "flwr.app"])
def test_the_missing_extra_is_named(module: str) -> None:
    done = python(HIDE.format(module) + "import fedlora_cli.integrations.flower")
    last = done.stderr.splitlines()[-1]

    assert done.returncode == 1
    assert last.startswith("ImportError: fedlora_cli.integrations.flower: Flower cannot be used (")
    assert last.endswith("); pip install 'fedlora[flower]'")


def test_nothing_else_imports_flower() -> None:
    code = (
        "import importlib, pkgutil, fedlora_cli\n"
        "for module in pkgutil.walk_packages(fedlora_cli.__path__, 'fedlora_cli.'):\n"
        "    if 'integrations.flower' not in module.name and '__main__' not in module.name:\n"
        "        try: importlib.import_module(module.name)\n"
        "        except ImportError as error: assert 'integrations' in module.name, error\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'flwr'], 'flwr'"
    )
    done = python("import sys; " + code)

    assert (done.returncode, done.stderr) == (0, "")
