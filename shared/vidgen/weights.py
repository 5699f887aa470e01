"""Where model weights are, whether they may be loaded, and how a pinned commit is fetched. Never imports torch.

Only a diffusers folder of safetensors with known classes passes: nothing in it can run code.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidgen import __version__, extras, manifest
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
# How diffusers and transformers name the files of a model.
STEMS = ("diffusion_pytorch_model", "model")
DISK_REFUSES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
CAST = ("transformer", "text_encoder")  # components that are always held in the precision that was asked for
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the bytes of a number, of the types that are cast
SCALE = ".weight_scale"  # of a layer in FP8
LARGEST_TABLE = 100 << 20
SAMPLES, SAMPLE = 32, 4096  # of a file's content, and the bytes of each
# So many faults are named in a sentence; `vidgen weights verify` names them all.
NAMED = 3

OnProgress = Callable[[str, int, int | None], None]
Check = Literal["structure", "size", "full"]


def unheard(phase: str, done: int, total: int | None) -> None:
    """For those who do not want to hear of the progress."""


@dataclass(frozen=True)
class Weights:
    """A model that is on this machine: its folder, its id (or the folder's name), its commit, and its size.

    `profile` says whether its transformers' layers are stored in FP8.
    """

    folder: Path
    model: str
    revision: str | None
    bytes: int
    profile: manifest.Profile = "bf16"


def locate(model: str, revision: str | None = None) -> Weights | None:
    """Find a model in its local folder, or in the hub cache at `revision`; None where it is not. Downloads nothing.

    What it finds has not been looked into: `verify` does that.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return _cached(model, revision)
    told = _manifest(folder)
    if told is not None:
        return Weights(folder, told.model, told.revision, _size(folder), told.profile)
    return Weights(folder, folder.resolve().name, _downloaded_commit(folder), _size(folder))


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
    for component, library, kind in components(folder):
        if library not in LIBRARIES:
            raise _refused(folder, f"{component} wants {library}.{kind}, which is code of its own")
        _complete(folder, component)


def pull(
    model: str,
    revision: str | None,
    *,
    to: Path | None = None,
    pipelines: frozenset[str] = PIPELINES,
    on_progress: OnProgress = unheard,
) -> Weights:
    """Download one commit of a hub model, safetensors and configuration only, verify it and write its manifest.

    It goes into the hub's cache, or into the folder `to`. What was downloaded before is not downloaded again, and a
    file that broke off goes on where it did. `on_progress` hears of the phases `download` and `check`, in bytes, in
    any thread. Raises FatalError where `revision` is no full commit id: a branch or tag can be moved to other weights.
    """
    if revision is None or not manifest.COMMIT.fullmatch(revision):
        raise FatalError(
            f"{model} is only downloaded at a pinned commit, not at {revision or 'its newest'}: "
            "set the revision to the 40 hexadecimal digits of the commit that you trust",
            code="weights_unpinned",
        )
    if to is not None and (told := _manifest(to)) is not None and (told.model, told.revision) != (model, revision):
        manifest.remove(to)  # from now on it is not what the folder holds
    folder = _download(model, revision, to, on_progress)
    verify(folder, pipelines)
    wrong = _account_for(folder, model, revision, on_progress)
    if wrong:
        raise FatalError(
            f"{_faults(wrong)} in {folder}, which the download should have made right: "
            "delete what is named there and pull again",
            code="weights_damaged",
        )
    return Weights(folder, model, revision, _size(folder))


def damage(found: Weights, on_progress: OnProgress = unheard) -> list[manifest.Fault]:
    """Everything that is wrong with a model's files, told by their checksums; reads all of them.

    They are compared with the manifest, else with what the hub told when they were downloaded; raises FatalError
    where there is neither.
    """
    folder, told = found.folder, manifest.read(found.folder)
    if told is not None:
        return manifest.check(folder, told, counted(folder, [file.path for file in told.files], on_progress))
    sums = manifest.of_hub(folder)
    unknown = [name for name in manifest.paths(folder) if name.endswith(".safetensors") and name not in sums]
    if unknown:
        raise FatalError(
            f"{folder} has no {manifest.NAME}, and the hub told nothing of {_listed(unknown[:NAMED])}: "
            "`vidgen weights pull` downloads a model with its manifest",
            code="weights_unverified",
        )
    return manifest.unlike(folder, sums, counted(folder, list(sums), on_progress))


def why_not(
    model: str, revision: str | None = None, *, pipelines: frozenset[str] = PIPELINES, gpu: bool = False
) -> str | None:
    """Say in one sentence why the real engine cannot run this model here and what to do, or None if it can.

    With `gpu`, a torch that was built without CUDA is a reason too.
    """
    missing = not_installed()
    if missing is not None:
        return missing
    if gpu and importlib.metadata.version("torch").endswith("+cpu"):
        return "torch is a build for the CPU: install the one for this GPU's CUDA"
    try:
        require(model, revision, pipelines=pipelines)
    except FatalError as exc:
        return exc.message
    return None


def not_installed() -> str | None:
    """Say which packages of the real engines are not here and what to do, or None."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    return f"{_listed(missing)} not installed: {extras.install('gpu')}" if missing else None


def require(
    model: str, revision: str | None = None, *, pipelines: frozenset[str] = PIPELINES, check: Check = "size"
) -> Weights:
    """Locate and verify; raises FatalError that names the remedy where either fails.

    Where there is a manifest, the files must have the sizes in it, and with `full`, which reads them, the checksums.
    """
    found = locate(model, revision)
    if found is None:
        at = f" at {revision}" if revision else ""
        raise FatalError(
            f"the weights of {model}{at} are not on this machine: "
            f"download them with `vidgen weights pull {model} --revision COMMIT`, or set the model to their folder",
            code="weights_missing",
        )
    if revision and manifest.COMMIT.fullmatch(revision) and found.revision not in (None, revision):
        raise FatalError(
            f"the weights in {found.folder} are of {found.revision}, and {revision} is wanted: "
            "set the revision to theirs or leave it out, or set the model to the folder of the other one",
            code="weights_missing",
        )
    verify(found.folder, pipelines)
    told = manifest.read(found.folder)
    if told is None and len(revisions := set(manifest.commits(found.folder).values())) > 1:
        raise FatalError(
            f"the files in {found.folder} are of {len(revisions)} revisions, as a download leaves them that broke off: "
            "download the model again",
            code="weights_damaged",
        )
    if told is None or check == "structure":
        return found
    wrong = manifest.check(found.folder, told) if check == "full" else manifest.wrong_sizes(found.folder, told)
    if wrong:
        raise FatalError(
            f"the weights in {found.folder} are not those of their manifest ({_faults(wrong)}): "
            "download or quantize the model again",
            code="weights_damaged",
        )
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


def _download(model: str, revision: str, to: Path | None, on_progress: OnProgress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as exc:
        raise FatalError(f"downloading needs huggingface-hub: {extras.install('gpu')}", code="not_installed") from exc
    try:
        return Path(
            snapshot_download(
                model, revision=revision, local_dir=to, allow_patterns=list(manifest.PATTERNS),
                tqdm_class=_bar(on_progress),
            )
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as exc:  # its HTTP errors are OSErrors, its validation ValueErrors
        if isinstance(exc, OSError) and exc.errno in DISK_REFUSES:
            where = exc.filename or to or "the hub's cache"
            raise FatalError(
                f"{model} could not be written to {where} ({exc.strerror}): make room there, or name another folder "
                "(--to); what is downloaded by now is kept",
                code="not_written",
            ) from exc
        raise FatalError(
            f"{model} at {revision} could not be downloaded ({type(exc).__name__}: {_first_line(exc)}): "
            "check the id, the commit, the network and, for a gated model, HF_TOKEN",
            code="weights_missing",
        ) from exc


def _bar(on_progress: OnProgress) -> type:
    """A bar for the hub's client that shows nothing and tells `on_progress` of the bytes that are on the disk."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # a thread that would outlive the download

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of the client's bars one counts files, and one what came over the network, packed.
            self._told = kwargs.get("unit") == "B" and not str(kwargs.get("desc")).startswith("Downloading")
            super().__init__(*args, **kwargs | {"file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            updated: bool | None = super().update(n)
            if self._told:
                on_progress("download", int(self.n), int(self.total) if self.total else None)
            return updated

    return Bar


def _account_for(folder: Path, model: str, revision: str, on_progress: OnProgress) -> list[manifest.Fault]:
    """Write the manifest of what was downloaded; where that is not what the hub told of it, say so instead."""
    files = manifest.describe(folder, on_bytes=counted(folder, manifest.paths(folder), on_progress))
    sums = manifest.of_hub(folder)
    notes = manifest.commits(folder)
    wrong = [manifest.Fault(file.path, "wrong checksum") for file in files
             if sums.get(file.path, file.sha256) != file.sha256]  # fmt: skip
    # Of a model that was there before: one file where there are shards now, or shards where there is one, is loaded.
    if notes:
        names = (file.path for file in files)
        others = [
            name for name in names if notes.get(name, "" if name.endswith(manifest.WEIGHTS) else revision) != revision
        ]
        wrong += [manifest.Fault(name, "of another revision") for name in others]
    if not wrong:
        made = manifest.Manifest(model=model, revision=revision, created_by=f"vidgen {__version__}", files=tuple(files))
        manifest.write(folder, made)
    return wrong


def counted(folder: Path, names: Collection[str], on_progress: OnProgress) -> manifest.OnBytes:
    """Tell `on_progress` how much of some files several threads have checked together."""
    total = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    done, lock = 0, threading.Lock()

    def count(more: int) -> None:
        nonlocal done
        with lock:
            done += more
            on_progress("check", done, total)

    return count


def _faults(wrong: Sequence[manifest.Fault]) -> str:
    more = [f"{len(wrong) - NAMED} more"] if len(wrong) > NAMED else []
    return _listed([*map(str, wrong[:NAMED]), *more])


def _manifest(folder: Path) -> manifest.Manifest | None:
    try:
        return manifest.read(folder)
    except FatalError:  # `require` says so
        return None


def _cached(model: str, revision: str | None) -> Weights | None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        # Of what was never asked for, a model card above all, the client would else say that it is missing.
        wanted = list(manifest.PATTERNS)
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; not an id at all
        return None
    # The cache names a snapshot's folder after its commit.
    commit = folder.name if manifest.COMMIT.fullmatch(folder.name) else None
    told = _manifest(folder)
    return Weights(folder, model, commit, _size(folder), told.profile if told else "bf16")


def _downloaded_commit(folder: Path) -> str | None:
    """The commit that the hub's client noted beside files it downloaded into a plain folder."""
    return manifest.commits(folder).get(INDEX)


def sampled(files: Sequence[Path]) -> str:
    """A name for what files hold: of their sizes and of a sample of each, so not for those who mean to deceive.

    It takes milliseconds where they were just read. Raises FatalError where one cannot be.
    """
    said = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                said.update(size.to_bytes(8, "little"))
                for number in range(SAMPLES):
                    said.update(os.pread(file.fileno(), SAMPLE, max(0, size - SAMPLE) * number // (SAMPLES - 1)))
        except OSError as exc:
            raise FatalError(f"{path} cannot be read: {exc.strerror}", code="weights_missing") from exc
    return said.hexdigest()[:32]


def component_sizes(folder: Path, width: int | None = None) -> dict[str, int]:
    """The bytes of weights in each component's folder of a model, as they are stored.

    With `width`, as they are held where a number takes so many bytes: what is stored in 8 bits stays so, and so do its
    scales. Of the small components, which some models keep wider than the rest, it is the larger of both.
    """
    sizes = {part.name: size for part in sorted(folder.iterdir()) if part.is_dir() and (size := _size(part))}
    if width is None:
        return sizes
    held = {name: sum(_held(file, width) for file in _files(folder / name)) for name in sizes}
    return {name: held[name] if name.startswith(CAST) else max(held[name], size) for name, size in sizes.items()}


def tensor_files(component: Path) -> list[Path]:
    """The files that hold a component's weights: the shards of its index, or the one that there is; raises FatalError.

    A scheduler or tokenizer, which has no config.json, has none.
    """
    if not (component / "config.json").is_file():
        return []
    for stem in STEMS:
        index, single = (component / f"{stem}.safetensors{more}" for more in (".index.json", ""))
        if index.is_file():
            return [component / shard for shard in _shards(index)]
        if single.is_file():
            return [single]
    raise FatalError(f"{component} has no weights: download the model again", code="weights_missing")


def in_reading_order(folder: Path) -> list[Path]:
    """All files with weights of a verified model, transformers' models first: those take their time to be filled."""
    parts = sorted(components(folder), key=lambda part: part[1] == "diffusers")
    return [file for name, *_ in parts for file in tensor_files(folder / name)]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [path for path in manifest.walk(folder) if path.suffix == ".safetensors"]


def _held(file: Path, width: int) -> int:
    """The bytes of a file's tensors where their numbers have this width; of one that cannot be read, its own."""
    try:
        with file.open("rb") as opened:
            table = json.loads(opened.read(min(int.from_bytes(opened.read(8), "little"), LARGEST_TABLE)))
        total = 0
        for name, told in table.items():
            if name != "__metadata__":
                begin, end = told["data_offsets"]
                stored = None if name.endswith(SCALE) else WIDTHS.get(told["dtype"])
                total += end - begin if stored is None else (end - begin) // stored * width
        return total
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return file.stat().st_size


def _shards(index: Path) -> list[str]:
    """The files that an index of weights names, beside it."""
    listed = _read(index).get("weight_map")
    names: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
    if not all(isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") for name in names):
        raise FatalError(f"{index} does not tell its files: download the model again", code="weights_missing")
    return sorted(set(names))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FatalError(f"{path.parent} has no {path.name}: download the model again", code="weights_missing")
    try:
        read = json.loads(path.read_bytes())
    except OSError as exc:
        raise FatalError(f"{path} cannot be read: {exc.strerror}", code="weights_missing") from exc
    except ValueError as exc:
        raise FatalError(f"{path} is not valid JSON: download the model again", code="weights_missing") from exc
    if not isinstance(read, dict):
        raise FatalError(f"{path} is not a JSON object: download the model again", code="weights_missing")
    return read


def components(folder: Path) -> Iterator[tuple[str, str, str]]:
    """The components of a model with the library and the class of each, as its index tells them; raises FatalError."""
    for component, value in _read(folder / INDEX).items():
        if not isinstance(value, list) or component.startswith("_"):
            continue
        if value == [None, None]:
            continue
        if component != Path(component).name or component in ("", ".."):
            raise _refused(folder, f"{INDEX} names a component outside of it: {component}")
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            raise _refused(folder, f"{INDEX} does not say what {component} is")
        yield component, value[0], value[1]


def _refuse_code(folder: Path) -> None:
    for path in sorted(manifest.walk(folder)):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in PICKLED:
            raise _refused(folder, f"{name} is a pickle, which runs code when it is read; only safetensors are loaded")
        if path.suffix.lower() == ".py":
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
        lost = [shard for shard in _shards(index) if not (part / shard).is_file()]
        if lost:
            raise FatalError(f"{part} lacks {_listed(lost)}: download the model again", code="weights_missing")


def _refused(folder: Path, why: str) -> FatalError:
    return FatalError(f"the weights in {folder} are refused: {why}", code="weights_refused")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0][:200]
