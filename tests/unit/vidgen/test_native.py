"""torch's libraries are loaded beside the imports of a service where there is a GPU, and nothing depends on it."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
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
if sys.argv[2] == "missing":
    native.LIBRARIES = (("not-there.so", 0), *native.LIBRARIES)
thread = native.load_ahead()
if thread is not None:
    thread.join()
assert "torch" not in sys.modules
print("libtorch_cpu.so" in Path("/proc/self/maps").read_text())
import torch
assert torch.ones(2).sum() == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped from /proc")
@pytest.mark.parametrize(
    ("there", "first", "loaded"),
    [(True, "torch's", True), (False, "torch's", False), (True, "missing", False)],  # that is for the import to say
)
def test_torch_is_loaded_but_not_imported_where_there_is_a_gpu(
    tmp_path: Path, there: bool, first: str, loaded: bool
) -> None:
    device = tmp_path / "nvidiactl"
    if there:
        device.touch()
    command = [sys.executable, "-c", LOADED, str(device), first]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.stderr == ""
    assert made.stdout == f"{loaded}\n"


PINNED = """
import os
import sys
from pathlib import Path
from vidgen import native
native.DEVICE = Path(sys.argv[1])
native.load_ahead()
print({name: value for name, value in os.environ.items() if name.endswith("ALLOC_CONF")})
"""


@pytest.mark.parametrize(
    ("there", "given", "found"),
    [
        (True, {}, {"PYTORCH_ALLOC_CONF": native.PINNED_BY_THREADS}),
        (False, {}, {}),
        # Whoever says how torch is to manage memory is not talked over, by whichever name.
        (True, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_host_memory_is_pinned_by_several_threads_where_there_is_a_gpu_and_nobody_says_how(
    tmp_path: Path, there: bool, given: dict[str, str], found: dict[str, str]
) -> None:
    device = tmp_path / "nvidiactl"
    if there:
        device.touch()
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")} | given
    command = [sys.executable, "-c", PINNED, str(device)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert made.stderr == ""
    assert made.stdout == f"{found}\n"


def test_without_torch_there_is_nothing_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DEVICE", tmp_path)
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.load_ahead() is None


@pytest.mark.parametrize("stage", ["edit", "i2v"])
def test_a_service_imports_without_the_collector(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(native, "load_ahead", lambda: seen.append(gc.isenabled()))
    monkeypatch.setattr(sys, "argv", [f"{stage}-service", "--help"])
    try:
        with pytest.raises(SystemExit):
            importlib.import_module(f"{stage}_service.main").main()
    finally:
        gc.enable()
    assert seen == [False]


AS_EVER = """
import sys
from pathlib import Path
from vidgen import native

native.DEVICE = Path(sys.argv[1])
native._load = lambda folder: None
native.load_ahead().join()
import asyncio

async def tasks():
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        made = group.create_task(asyncio.sleep(0, asyncio.current_task()))
    return type(made), await made is asyncio.current_task()

print(asyncio.run(tasks()) == (asyncio.Task, True), asyncio.Task.__module__, asyncio.current_task.__module__)
"""


def test_what_is_imported_before_is_as_ever(tmp_path: Path) -> None:
    device = tmp_path / "nvidiactl"
    device.touch()
    plain = "import asyncio; print(True, asyncio.Task.__module__, asyncio.current_task.__module__)"
    said = [
        subprocess.run([sys.executable, "-c", script, device], capture_output=True, text=True, check=True).stdout
        for script in (AS_EVER, plain)
    ]
    assert said[0] == said[1]


SLOW = """
#include <unistd.h>
__attribute__((constructor)) static void wait(void) { char byte; read(WAITS_AT, &byte, 1); }
"""
UNDER_WAY = """
import ctypes
import importlib
import os
import sys
import threading
from pathlib import Path
from vidgen import native

native.DEVICE, library, stage = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
waits, ends = os.pipe()
os.dup2(waits, WAITS_AT)
begun = threading.Event()

def load(folder):
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    begun.set()
    assert dlopen(library.encode(), os.RTLD_NOW)

native._load = load
thread = native.load_ahead()
begun.wait()
while library not in Path("/proc/self/maps").read_text():
    assert thread.is_alive()
importlib.import_module(f"{stage}_service.main")
importlib.import_module("vidgen.service")
assert thread.is_alive()
os.write(ends, b".")
thread.join()
print("imported")
"""
WAITS_AT = 77


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="makes a library for Linux")
@pytest.mark.parametrize("stage", ["edit", "i2v"])
def test_a_service_is_imported_while_the_linker_is_at_something_else(tmp_path: Path, stage: str) -> None:
    """It has one lock: who wanted it waited for half a second with the interpreter in its hands."""
    device, source, library = tmp_path / "nvidiactl", tmp_path / "slow.c", tmp_path / "slow.so"
    device.touch()
    source.write_text(SLOW.replace("WAITS_AT", str(WAITS_AT)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    script = UNDER_WAY.replace("WAITS_AT", str(WAITS_AT))
    # What only a developer's environment has, and would be linked meanwhile.
    script = "import sys\nsys.modules['watchfiles'] = sys.modules['greenlet'] = None\n" + script
    made = subprocess.run(
        [sys.executable, "-c", script, device, library, stage], capture_output=True, text=True, check=False, timeout=60
    )
    assert made.stderr == ""
    assert made.stdout == "imported\n"
