"""The core never imports a model framework: it installs and starts without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("edit_service.engine.qwen", "i2v_service.engine.wan", "vidgen.accel.", "vidgen.otlp")
HEAVY = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub")
TRACING = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto")
ROOTS = ("shared/vidgen", "services/gateway", "services/edit_service", "services/i2v_service")

IMPORT_ALL = """
import importlib, json, sys, threading
heavy, modules = json.loads(sys.argv[1])
found = {}
for name in modules:
    importlib.import_module(name)
    for module in heavy:
        if module in sys.modules:
            found.setdefault(module, name)
print(json.dumps({"found": found, "threads": threading.active_count()}))
"""


def modules(root: Path) -> list[str]:
    """Every module of the distribution but those that extras are for, and `__main__`, which is to be run."""
    names = []
    for folder in ROOTS:
        package = root / folder
        for path in sorted(package.rglob("*.py")):
            parts = [package.name, *path.relative_to(package).with_suffix("").parts]
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return [name for name in names if not name.startswith(OPTIONAL) and not name.endswith(".__main__")]


def test_the_list_of_modules_has_the_mains_and_the_core(pytestconfig: pytest.Config) -> None:
    found = modules(pytestconfig.rootpath)

    assert {"vidgen", "vidgen.contracts", "vidgen.bus", "vidgen.testing.bus", "gateway", "edit_service"} <= set(found)
    assert not any(name.endswith("__init__") for name in found)


@pytest.fixture(scope="module")
def imported(pytestconfig: pytest.Config) -> subprocess.CompletedProcess[str]:
    """A process that imported every module, and what it said."""
    given = json.dumps([HEAVY + TRACING, modules(pytestconfig.rootpath)])
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, given], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_core_imports_no_model_framework_and_nothing_that_sends_traces(
    imported: subprocess.CompletedProcess[str],
) -> None:
    assert imported.returncode == 0, imported.stderr
    assert json.loads(imported.stdout)["found"] == {}, "a framework was imported by"


def test_importing_prints_nothing_and_starts_no_thread(imported: subprocess.CompletedProcess[str]) -> None:
    told = json.loads(imported.stdout)  # one object and nothing else

    assert (imported.stderr, told["threads"]) == ("", 1)
