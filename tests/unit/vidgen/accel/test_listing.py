"""The libraries are imported with half the reading, and without what no engine uses; what they find stays the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

LISTED = """
import builtins, importlib.metadata, json, sys
opened, listed = [], []
open_stock, list_stock = builtins.open, importlib.metadata.packages_distributions
def counted_open(file, *args, **options):
    opened.append(str(file))
    return open_stock(file, *args, **options)
def counted_list():
    listed.append(None)
    return list_stock()
builtins.open, importlib.metadata.packages_distributions = counted_open, counted_list
if sys.argv[1] == "once":
    from vidgen.accel.listing import import_libraries
    import_libraries(loras=True)
else:
    import transformers.models, diffusers
from diffusers.utils import import_utils
print(json.dumps({
    "reads": sum(file.endswith("/modeling_umt5.py") for file in opened), "lists": len(listed),
    "put back": importlib.metadata.packages_distributions is counted_list,
    "models": sys.modules["transformers.models"]._class_to_module, "packages": import_utils._package_map,
    "one": sys.modules["transformers"].UMT5Config.__module__,
}, default=sorted))
"""

EDITED = """
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests import checkpoints
checkpoints.install_shim()
from PIL import Image
from edit_service.main import make_engine
from vidgen.choice import Choice
from vidgen.settings import WorkerSettings
settings = WorkerSettings(
    engine="real", device="cpu", edit_model=sys.argv[2], edit_reference_area=4096, edit_condition_area=3136,
    **json.loads(sys.argv[4]),
)
engine = make_engine(settings, Choice("real", "a test"))
engine.setup()
from edit_service.engine.qwen import WARM_UP
photo = Path(sys.argv[3])
Image.linear_gradient("L").convert("RGB").resize((64, 48)).save(photo)
work = WARM_UP.model_copy(update={"width": 64, "height": 64})
pixels = engine.generate(engine.prepare(work, [photo]), lambda step, steps: None).output.pixels
print(json.dumps({"peft": "peft" in sys.modules, "pixels": hashlib.sha256(pixels.tobytes()).hexdigest()}))
"""


def run(program: str, *arguments: str) -> dict[str, object]:
    made = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    found: dict[str, object] = json.loads(made.stdout.splitlines()[-1])
    return found


def test_what_is_found_is_the_same_with_half_the_reading() -> None:
    once, stock = run(LISTED, "once"), run(LISTED, "stock")
    assert (once.pop("reads"), once.pop("lists")) == (1, 1)
    assert stock.pop("reads") == 2, "transformers lists its models once: vidgen.accel.listing can do without that part"
    stock.pop("lists")
    assert once == stock
    assert once["put back"]
    assert once["one"] == "transformers.models.umt5.configuration_umt5"


def test_peft_is_there_for_a_lora_alone(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import QwenImageEditPlusPipeline
    from tests import checkpoints

    root, model, photo = str(Path(__file__).parents[4]), str(tiny_models["qwen-edit"]), str(tmp_path / "photo.png")
    lora = checkpoints.lora(tmp_path, QwenImageEditPlusPipeline.from_pretrained(model))
    without, others, own = (
        run(EDITED, root, model, photo, json.dumps(loras))
        for loras in ({}, {"i2v_lora": str(lora)}, {"edit_lora": str(lora)})
    )
    assert [one["peft"] for one in (without, others, own)] == [False, True, True]
    assert without["pixels"] == others["pixels"] != own["pixels"]


@pytest.mark.parametrize("name", ["edit_lora", "i2v_lora", "i2v_lora_2"])
def test_any_lora_of_the_process_counts(name: str) -> None:
    from vidgen.settings import WorkerSettings

    assert not WorkerSettings().has_loras()
    assert WorkerSettings(**{name: "/loras/one.safetensors"}).has_loras()
