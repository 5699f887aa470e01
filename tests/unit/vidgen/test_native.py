"""torch's libraries are loaded beside the imports of a service where there is a GPU, and nothing depends on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vidgen import native

LOADED = """
import sys
from pathlib import Path
from vidgen import native
native.DEVICE = Path(sys.argv[1])
thread = native.load_ahead()
if thread is not None:
    thread.join()
assert "torch" not in sys.modules
print("libtorch_cpu.so" in Path("/proc/self/maps").read_text())
import torch
assert torch.ones(2).sum() == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped from /proc")
@pytest.mark.parametrize("there", [True, False])
def test_torch_is_loaded_but_not_imported_where_there_is_a_gpu(tmp_path: Path, there: bool) -> None:
    device = tmp_path / "nvidiactl"
    if there:
        device.touch()
    made = subprocess.run([sys.executable, "-c", LOADED, str(device)], capture_output=True, text=True, check=False)
    assert made.stderr == ""
    assert made.stdout == f"{there}\n"


def test_without_torch_there_is_nothing_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DEVICE", tmp_path)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.load_ahead() is None


def test_a_library_that_is_not_there_is_left_to_whoever_imports_it(tmp_path: Path) -> None:
    native._load(tmp_path)
