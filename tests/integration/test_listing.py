"""What is kept of the real transformers is what it finds by itself, and it looks at its models' files once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = """
import contextlib, json, sys
from pathlib import Path
from vidgen import listing

read = set()
sys.addaudithook(lambda event, args: read.add(str(args[0])) if event == "open" else None)
with listing.kept(Path(sys.argv[1]) if len(sys.argv) > 1 else None):
    import transformers
    import transformers.models
    from transformers import Qwen2Tokenizer
print(json.dumps({
    "names": sorted(dir(transformers)),
    "modules": transformers._class_to_module,
    "models": transformers.models._class_to_module,
    "found": Qwen2Tokenizer.__module__,
    "read": sum("/transformers/models/" in path and path.endswith(".py") for path in read),
}))
"""


def imported(*folder: Path) -> Any:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_second_start_does_not_read_what_the_first_one_read(tmp_path: Path) -> None:
    alone, first, second = imported(), imported(tmp_path), imported(tmp_path)
    read = [one.pop("read") for one in (alone, first, second)]
    assert read[0] == read[1] > 1000
    assert read[2] < 20
    assert alone == first == second
