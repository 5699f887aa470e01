"""The shim that makes the test environment's torchvision importable, in processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests import checkpoints

PROGRAM = """
import sys
assert "torch" not in sys.modules, "the shim imports torch at interpreter start"
import importlib.util
assert importlib.util.find_spec("torchvision") is not None
assert "torch" not in sys.modules, "looking for torchvision imports torch"
from torchvision.transforms.v2 import functional
print(functional.resize.__name__)
"""


@pytest.mark.timeout(600)
def test_a_process_with_the_shim_on_its_path_can_import_torchvision() -> None:
    environment = os.environ | {"PYTHONPATH": str(checkpoints.SHIM)}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "resize\n"
