"""Where model weights are, whether they may be loaded, and how a pinned commit is fetched. Never imports torch.

Only a diffusers folder of safetensors with known classes passes: nothing in it can run code.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidgen.errors import FatalError

INDEX = "model_index.json"
EDIT_PIPELINES = frozenset({"QwenImageEditPlusPipeline"})
# TI2V-5B is published as a text-to-video pipeline that can also start from an image: `expand_timesteps` tells it.
I2V_PIPELINES = frozenset({"WanImageToVideoPipeline", "WanPipeline"})
PIPELINES = EDIT_PIPELINES | I2V_PIPELINES

LIBRARIES = frozenset({"diffusers", "transformers"})
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
# Formats that run code when they are read.
PICKLED = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
# What a pipeline of safetensors consists of: configurations, tokenizers, chat templates and weights.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Weights:
    """A model that is on this machine: its folder, its id (or the folder's name), its commit, and its size."""

    folder: Path
    model: str
    revision: str | None
    bytes: int


def locate(model: str, revision: str | None = None) -> Weights | None:
    """Find a model in its local folder, or in the hub cache at `revision`; None where it is not. Downloads nothing.

    What it finds has not been looked into: `verify` does that.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return Weights(folder, folder.resolve().name, _downloaded_commit(folder), _size(folder))
    return _cached(model, revision)


def verify(folder: Path, pipelines: frozenset[str] = PIPELINES) -> None:
    """Raise FatalError unless `folder` is one of `pipelines`, complete, all safetensors and without code.

    The codes: `weights_missing` for what is not there, `weights_refused` for what must not be loaded.
    """
    index = _read(folder / INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in pipelines:
        raise _refused(folder, f"it holds a {name}, and this service runs {' or '.join(sorted(pipelines))}")
    if name == "WanPipeline" and not index.get("expand_timesteps"):
        raise _refused(folder, "it turns text into video and cannot start from an image: use an I2V or TI2V model")
    _refuse_code(folder)
    for component, library, kind in _components(folder, index):
        if library not in LIBRARIES:
            raise _refused(folder, f"{component} wants {library}.{kind}, which is code of its own")
        _complete(folder, component)


def pull(model: str, revision: str | None, *, pipelines: frozenset[str] = PIPELINES) -> Weights:
    """Download one commit of a hub model, safetensors and configuration only, and verify it.

    Raises FatalError where `revision` is no full commit id: a branch or tag can be moved to other weights.
    """
    if revision is None or not COMMIT.fullmatch(revision):
        raise FatalError(
            f"{model} is only downloaded at a pinned commit, not at {revision or 'its newest'}: "
            "set the revision to the 40 hexadecimal digits of the commit that you trust",
            code="weights_unpinned",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise FatalError('downloading needs huggingface-hub: pip install "vidgen[gpu]"', code="not_installed") from exc
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(PATTERNS)))
    except (OSError, ValueError, RuntimeError) as exc:  # its HTTP errors are OSErrors, its validation ValueErrors
        raise FatalError(
            f"{model} at {revision} could not be downloaded ({type(exc).__name__}: {_first_line(exc)}): "
            "check the id, the commit, the network and, for a gated model, HF_TOKEN",
            code="weights_missing",
        ) from exc
    verify(folder, pipelines)
    return Weights(folder, model, revision, _size(folder))


def why_not(
    model: str, revision: str | None = None, *, pipelines: frozenset[str] = PIPELINES, gpu: bool = False
) -> str | None:
    """Say in one sentence why the real engine cannot run this model here and what to do, or None if it can.

    With `gpu`, a torch that was built without CUDA is a reason too.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        return f'{_listed(missing)} not installed: pip install "vidgen[gpu]"'
    if gpu and importlib.metadata.version("torch").endswith("+cpu"):
        return "torch is a build for the CPU: install the one for this GPU's CUDA"
    try:
        require(model, revision, pipelines=pipelines)
    except FatalError as exc:
        return exc.message
    return None


def require(model: str, revision: str | None = None, *, pipelines: frozenset[str] = PIPELINES) -> Weights:
    """Locate and verify; raises FatalError that names the remedy where either fails."""
    found = locate(model, revision)
    if found is None:
        at = f" at {revision}" if revision else ""
        raise FatalError(
            f"the weights of {model}{at} are not on this machine: "
            f"download them with `python -m vidgen.weights {model} COMMIT`, or set the model to their folder",
            code="weights_missing",
        )
    verify(found.folder, pipelines)
    return found


def lora_file(path: str) -> Path:
    """Find the one .safetensors of a LoRA given as a file or a folder; raises FatalError for anything else."""
    given = Path(path).expanduser()
    if given.is_file() and given.suffix == ".safetensors":
        return given
    if given.is_file():
        raise FatalError(f"the LoRA {given} is not a .safetensors file: convert it", code="weights_refused")
    if not given.is_dir():
        raise FatalError(f"there is no LoRA at {given}: give a .safetensors file or its folder", code="weights_missing")
    found = sorted(given.glob("*.safetensors"))
    if len(found) != 1:
        raise FatalError(
            f"the LoRA folder {given} holds {len(found)} .safetensors files: name the one to use",
            code="weights_missing",
        )
    return found[0]


def _cached(model: str, revision: str | None) -> Weights | None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; not an id at all
        return None
    # The cache names a snapshot's folder after its commit.
    commit = folder.name if COMMIT.fullmatch(folder.name) else None
    return Weights(folder, model, commit, _size(folder))


def _downloaded_commit(folder: Path) -> str | None:
    """The commit that the hub's client noted beside files it downloaded into a plain folder."""
    note = folder / ".cache" / "huggingface" / "download" / f"{INDEX}.metadata"
    try:
        line = note.read_text("utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError):
        return None
    return line if COMMIT.fullmatch(line) else None


def component_sizes(folder: Path) -> dict[str, int]:
    """The bytes of weights in each component's folder of a model."""
    return {part.name: size for part in sorted(folder.iterdir()) if part.is_dir() and (size := _size(part))}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.is_file())


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FatalError(f"{path.parent} has no {path.name}: download the model again", code="weights_missing")
    try:
        read = json.loads(path.read_bytes())
    except ValueError as exc:
        raise FatalError(f"{path} is not valid JSON: download the model again", code="weights_missing") from exc
    if not isinstance(read, dict):
        raise FatalError(f"{path} is not a JSON object: download the model again", code="weights_missing")
    return read


def _components(folder: Path, index: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for component, value in index.items():
        if not isinstance(value, list) or component.startswith("_"):
            continue
        if value == [None, None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise _refused(folder, f"{INDEX} does not say what {component} is")
        yield component, value[0], value[1]


def _refuse_code(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in PICKLED:
            raise _refused(folder, f"{name} is a pickle, which runs code when it is read; only safetensors are loaded")
        if path.suffix == ".py":
            raise _refused(folder, f"{name} is code, and no code of a model is ever run")
        if name.endswith("config.json") and "auto_map" in _read(path):
            raise _refused(folder, f"{name} asks for custom code (auto_map), and no code of a model is ever run")


def _complete(folder: Path, component: str) -> None:
    part = folder / component
    if not part.is_dir():
        raise FatalError(f"{folder} has no {component} folder: download the model again", code="weights_missing")
    # Only a model has a config.json; schedulers and tokenizers name theirs differently and have no weights.
    if (part / "config.json").is_file() and not any(part.glob("*.safetensors")):
        raise FatalError(f"{part} has no safetensors: download the model again", code="weights_missing")
    for index in part.glob("*.safetensors.index.json"):
        shards = set(_read(index).get("weight_map", {}).values())
        lost = sorted(shard for shard in shards if not (part / shard).is_file())
        if lost:
            raise FatalError(f"{part} lacks {_listed(lost)}: download the model again", code="weights_missing")


def _refused(folder: Path, why: str) -> FatalError:
    return FatalError(f"the weights in {folder} are refused: {why}", code="weights_refused")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0][:200]


def main(arguments: list[str]) -> int:
    """`python -m vidgen.weights MODEL COMMIT` downloads a model at a pinned commit."""
    if len(arguments) != 2:
        sys.stderr.write("usage: python -m vidgen.weights MODEL COMMIT\n")
        return 2
    try:
        pulled = pull(arguments[0], arguments[1])
    except FatalError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return 1
    sys.stdout.write(f"{pulled.folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
