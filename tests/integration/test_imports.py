"""What is kept of the real packages is what they find by themselves, and the next start reads next to none of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import contextlib, importlib.metadata, json, re, sys
from pathlib import Path
from vidgen import imports

read = set()
sys.addaudithook(lambda event, args: read.add(str(args[0])) if event == "open" else None)
with imports.kept(Path(sys.argv[1]) if len(sys.argv) > 1 else None, "test"):
    import diffusers, torch, transformers
    import transformers.models
    from diffusers import FlowMatchEulerDiscreteScheduler
    from transformers import Qwen2Config, Qwen2Tokenizer
    config = Qwen2Config(hidden_size=64)
    pattern = re.compile(r"(?P<layer>layers)\\.(\\d+)\\.[^.]*weight")
    packages = importlib.metadata.packages_distributions()
inside = re.compile(r"/site-packages/(torch|transformers|diffusers)/(?!(__pycache__/)?__init__\\.).*\\.pyc$")
print(json.dumps({
    "names": [sorted(dir(package)) for package in (diffusers, torch, transformers)],
    "modules": [transformers._class_to_module, diffusers._class_to_module],
    "models": transformers.models._class_to_module,
    "found": [Qwen2Tokenizer.__module__, FlowMatchEulerDiscreteScheduler.__module__],
    "config": config.to_dict(),
    "pattern": [pattern.pattern, pattern.flags, pattern.match("layers.7.mlp_weight").groupdict()],
    "packages": packages,
    "imported": sorted(name for name in sys.modules if name.split(".")[0] in ("torch", "transformers", "diffusers")),
    "read": [
        sum("/transformers/models/" in path and path.endswith(".py") for path in read),
        len([path for path in read if inside.search(path)]),
    ],
}))
"""


def imported(*folder: Path) -> Any:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_second_start_does_not_read_what_the_first_one_read(tmp_path: Path) -> None:
    alone, first = imported(), imported(tmp_path)
    [file] = tmp_path.iterdir()
    before = file.stat().st_ino
    second = imported(tmp_path)
    assert file.stat().st_ino == before  # there is next to nothing that it did not hold
    [models, bytecode] = zip(*[one.pop("read") for one in (alone, first, second)], strict=True)
    assert models[0] == models[1] > 1000
    assert bytecode[0] == bytecode[1] > 1000  # of some they read the source themselves, at each start
    assert models[2] < 20
    assert bytecode[2] == 0
    assert alone == first == second
