"""Leaves of transformers, in the image of a worker, the models that its engines use.

    python trim.py

Whenever it is imported, transformers reads the files of all its models to learn what is in them: a tenth and more of
the processor's time that a start imports for. Of a model that no pipeline of ours imports only the folder stays, and
its `__init__.py`: some of transformers' tables lead through those of other models. Where the pipelines do not import
just the same without the rest, it fails, and nothing has changed.

Two of the packages also ask, whenever they are imported, which distribution each package is of. Python goes through
all files of one that does not say it in a `top_level.txt`: each gets one.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# What the two engines import, and the classes that the files of their models name beside those.
IMPORTED = """
import json, sys
import accelerate, diffusers.hooks, peft, transformers
from diffusers import QwenImageEditPlusPipeline, WanImageToVideoPipeline
from transformers import (
    AutoImageProcessor, AutoProcessor, AutoTokenizer, AutoVideoProcessor, CLIPImageProcessor, CLIPVisionModel,
    Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor, T5Tokenizer, UMT5EncoderModel,
)
# It makes up modules for names of old, which have no file.
found = {name: vars(module).get("__file__") for name, module in sys.modules.items()}
print(json.dumps([name for name, file in found.items() if file is not None and name.startswith("transformers.")]))
"""
STAYS = "__init__.py"


def imported() -> set[str]:
    """The modules of transformers that the pipelines import; raises CalledProcessError where they cannot."""
    told = subprocess.run([sys.executable, "-c", IMPORTED], stdout=subprocess.PIPE, check=True, text=True)
    return set(json.loads(told.stdout))


def others(models: Path, modules: set[str]) -> Iterator[Path]:
    """All that lies in the folders of models of which nothing was imported, but what must stay."""
    used = {name.split(".")[2] for name in modules if name.startswith("transformers.models.")}
    for folder in sorted(models.iterdir()):
        if folder.is_dir() and (folder / STAYS).is_file() and folder.name not in used:
            yield from (path for path in sorted(folder.iterdir()) if path.name not in (STAYS, "__pycache__"))
            yield from (path for path in sorted(folder.glob("__pycache__/*")) if not path.name.startswith("__init__."))


def told() -> dict[str, list[str]]:
    """The distributions of each package."""
    return {package: sorted(found) for package, found in metadata.packages_distributions().items()}


def name_packages(site: Path) -> None:
    """Have each distribution of a folder say what packages are in it, where its files alone do."""
    before = told()
    made = []
    for distribution in metadata.distributions(path=[str(site)]):
        name = distribution.metadata["Name"]
        packages = sorted(package for package, found in before.items() if name in found)
        if packages and not (distribution.read_text("top_level.txt") or "").split():
            made.append((distribution, record_of(distribution).with_name("top_level.txt")))
            made[-1][1].write_text("".join(f"{package}\n" for package in packages), "utf-8")
    if told() != before:
        for _, file in made:
            file.unlink()
        sys.exit("the distributions do not name the same packages by a file as they do by their files")
    for distribution, file in made:
        list_anew(distribution, file)


def record_of(distribution: metadata.Distribution) -> Path:
    """The list of a distribution's files."""
    found = next(path for path in distribution.files or () if path.name == "RECORD")
    return Path(str(distribution.locate_file(found)))


def list_anew(distribution: metadata.Distribution, *more: Path) -> None:
    """Take out of the list of a distribution's files what is there no more, and put in what came."""
    file = record_of(distribution)
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.reader(opened) if Path(str(distribution.locate_file(row[0]))).exists()]
    rows += [[f"{path.parent.name}/{path.name}", "", ""] for path in more]
    file.unlink()  # it may be a link into the cache of who installed it
    with file.open("x", newline="", encoding="utf-8") as opened:
        csv.writer(opened, lineterminator="\n").writerows(rows)


def main() -> None:
    distribution = metadata.distribution("transformers")
    package = Path(str(distribution.locate_file("transformers")))
    before = imported()
    moved: list[tuple[Path, Path]] = []
    with tempfile.TemporaryDirectory(dir=package.parent) as aside:
        for number, path in enumerate(others(package / "models", before)):
            moved.append((path, path.rename(Path(aside) / str(number))))
        try:
            lost = before - imported()
        except subprocess.CalledProcessError:
            lost = {"everything"}
        if lost:
            for path, there in moved:
                there.rename(path)
            sys.exit(f"without its other models transformers does not import {', '.join(sorted(lost))}")
    list_anew(distribution)
    name_packages(package.parent)
    sys.stdout.write(f"{len(moved)} files of other models are left out of {package}\n")


if __name__ == "__main__":
    if len(sys.argv) != 1:
        sys.exit(__doc__)
    main()
