"""What the image of a worker leaves of transformers is enough for both engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from tests import checkpoints
from tests.deploy.compose import ROOT

TRIM = ROOT / "deploy" / "docker" / "trim.py"
# Of each kind of model one task, and of one with a LoRA; as the services make them, weights and tokenizers from a disk.
TASKS = """
import sys
from pathlib import Path
from PIL import Image
from tests import checkpoints
from tests.workbench import work_of
import transformers
assert transformers.__file__.startswith(sys.argv[1]), transformers.__file__
from edit_service.engine.qwen import QwenEditEngine
from i2v_service.engine.wan import WanI2VEngine

models, here = Path(sys.argv[2]), Path(sys.argv[1])
picture = here / "picture.png"
Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(picture)
lora = None
for name in checkpoints.MODELS:
    if name == "qwen-edit":
        for lora in (None, "made"):
            file = lora and str(checkpoints.lora(here / "lora", engine._pipe))
            engine = QwenEditEngine(str(models / name), lora=file, reference_area=64 * 64, condition_area=56 * 56)
            engine.setup()
            work = work_of("edit", width=64, height=64, steps=2)
            engine.generate(engine.prepare(work, [picture]), lambda step, steps: None)
    else:
        engine = WanI2VEngine(str(models / name))
        engine.setup()
        work = work_of("i2v", width=64, height=64, num_frames=5, steps=2)
        engine.generate(engine.prepare(work, [picture]), lambda step, steps: None)
    print(name)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a transformers of its own, and a package that does not name itself: links, and lists of files."""
    site = tmp_path / "site"
    for name in ("transformers", "structlog"):
        found = metadata.distribution(name)
        shutil.copytree(str(found.locate_file(name)), site / name, copy_function=os.symlink)
        info = f"{name}-{found.version}.dist-info"
        shutil.copytree(str(found.locate_file(info)), site / info)
    (site / info / "top_level.txt").unlink(missing_ok=True)
    return site


def run(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = [site, ROOT, ROOT / "shared", ROOT / "services", checkpoints.SHIM]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def sources(site: Path) -> list[str]:
    models = site / "transformers" / "models"
    return sorted(str(path.relative_to(models)) for path in models.rglob("*.py") if path.name != "__init__.py")


def test_both_engines_run_with_what_is_left(site: Path, tiny_models: dict[str, Path]) -> None:
    before = len(sources(site))
    done = run(site, TRIM)
    assert (done.returncode, done.stderr) == (0, "")
    left = sources(site)
    assert "umt5/modeling_umt5.py" in left
    assert len(left) < before / 10
    [named] = site.glob("structlog-*/top_level.txt")
    assert named.read_text("utf-8") == "structlog\n"
    records = [file.read_text("utf-8").splitlines() for file in site.glob("*.dist-info/RECORD")]
    listed = {line.split(",")[0] for lines in records for line in lines}
    assert {str(named.relative_to(site)), *(f"transformers/models/{name}" for name in left)} <= listed
    assert all((site / name).exists() for name in listed)
    done = run(site, "-c", TASKS, site, tiny_models["qwen-edit"].parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(checkpoints.MODELS)


def test_where_what_is_left_does_not_import_nothing_is_changed(site: Path) -> None:
    """A version that imports models by another way."""
    package = site / "transformers" / "__init__.py"
    text = package.read_text("utf-8")
    package.unlink()
    needs = 'open(__import__("os").path.dirname(__file__) + "/models/bert/modeling_bert.py").close()\n'
    package.write_text(text.replace("__version__ = ", needs + "__version__ = ", 1), "utf-8")
    before = sources(site)
    done = run(site, TRIM)
    assert done.returncode == 1
    assert "does not import everything" in done.stderr
    assert sources(site) == before
