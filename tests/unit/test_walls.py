"""The walls that import contracts cannot prove: perceptio works where Ray is not installed."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = """
import importlib, pkgutil, sys
sys.modules["ray"] = None  # as if it were not installed
import perceptio
names = [m.name for m in pkgutil.walk_packages(perceptio.__path__, "perceptio.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_every_module_of_perceptio_imports_without_ray() -> None:
    found = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.split()[-1]) > 30
