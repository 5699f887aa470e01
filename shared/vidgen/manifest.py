"""The manifest of a model folder: what is in it, where it comes from, and the SHA-256 of every file.

`vidgen weights pull` and `quantize` write it, `verify` checks a folder against it; whatever serves checks the sizes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vidgen.errors import FatalError

NAME = "vidgen.manifest.json"
# What a pipeline of safetensors consists of: configurations, tokenizers, chat templates and weights.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = (".safetensors", ".safetensors.index.json")
SHA256 = re.compile(r"[0-9a-f]{64}")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOTES = Path(".cache", "huggingface", "download")  # of the hub's client, beside what it downloads into a plain folder
# Enough for a fast disk; hashing lets go of the interpreter's lock.
THREADS = 8
BLOCK = 4 << 20

Profile = Literal["bf16", "fp8"]
OnBytes = Callable[[int], None]


def _unheard(count: int) -> None:
    return None


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts:
        raise ValueError("a path inside the folder is needed")
    return path


class File(BaseModel):
    """A file of the folder; `size` in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Annotated[str, AfterValidator(_inside)]
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a model folder holds. `profile` says whether the transformers' linear layers are stored in FP8."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    revision: str | None = None
    created_by: str
    profile: Profile = "bf16"
    files: tuple[File, ...]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Fault:
    """A file that is not as it should be: `missing`, `extra`, `wrong size`, `wrong checksum`, `of another revision`."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder, None where it has none; raises FatalError where it cannot be understood."""
    try:
        return Manifest.model_validate_json((folder / NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as exc:
        raise FatalError(
            f"{folder / NAME} cannot be understood by this version: make it again with `vidgen weights pull`",
            code="weights_missing",
        ) from exc


def write(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into its folder, all of it or nothing; raises FatalError where the folder takes none."""
    # Containers that share a volume may have one process number.
    written = folder / f".{NAME}.{secrets.token_hex(8)}"
    try:
        written.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        written.replace(folder / NAME)
    except OSError as exc:
        with contextlib.suppress(OSError):
            written.unlink()
        raise FatalError(f"{folder / NAME} could not be written: {exc.strerror or exc}", code="not_written") from exc


def remove(folder: Path) -> None:
    """Take the manifest away; raises FatalError where the folder does not let it."""
    try:
        (folder / NAME).unlink(missing_ok=True)
    except OSError as exc:
        raise FatalError(f"{folder / NAME} could not be removed: {exc.strerror or exc}", code="not_written") from exc


def walk(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below, through links to other folders as well, for models are loaded through them."""
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if os.path.realpath(Path(at, name)) not in seen]  # a link may lead back
        yield from (path for name in files if (path := Path(at, name)).is_file())


def paths(folder: Path) -> list[str]:
    """The files that belong into the manifest of a folder, in order."""
    found = (path for path in walk(folder) if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in PATTERNS))
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name != NAME and not any(part.startswith(".") for part in name.split("/"))]


def describe(folder: Path, known: Mapping[str, str] | None = None, on_bytes: OnBytes = _unheard) -> list[File]:
    """Every file of a folder with its checksum; those in `known` are taken from there and not read."""
    known = known or {}
    names = paths(folder)
    sums = dict(hashes(folder, [name for name in names if name not in known], on_bytes)) | dict(known)
    return [File(path=name, size=(folder / name).stat().st_size, sha256=sums[name]) for name in names]


def wrong_sizes(folder: Path, manifest: Manifest) -> list[Fault]:
    """What can be told without reading: files that are missing or have another size, and weights that are extra."""
    listed = {file.path: file.size for file in manifest.files}
    faults = [Fault(name, "extra") for name in paths(folder) if name not in listed and name.endswith(WEIGHTS)]
    for name, size in listed.items():
        try:
            actual = (folder / name).stat().st_size
        except OSError:
            faults.append(Fault(name, "missing"))
        else:
            if actual != size:
                faults.append(Fault(name, "wrong size"))
    return sorted(faults, key=lambda fault: fault.path)


def check(folder: Path, manifest: Manifest, on_bytes: OnBytes = _unheard) -> list[Fault]:
    """Everything that is wrong with a folder; reads all of it."""
    faults = wrong_sizes(folder, manifest)
    named = {fault.path for fault in faults}
    sums = {file.path: file.sha256 for file in manifest.files if file.path not in named}
    faults += unlike(folder, sums, on_bytes)
    return sorted(faults, key=lambda fault: fault.path)


def unlike(folder: Path, sums: Mapping[str, str], on_bytes: OnBytes = _unheard) -> list[Fault]:
    """The files whose checksums are others than `sums` says."""
    found = hashes(folder, list(sums), on_bytes)
    return [Fault(name, "wrong checksum") for name, sha256 in found if sha256 != sums[name]]


def hashes(folder: Path, names: list[str], on_bytes: OnBytes = _unheard) -> Iterator[tuple[str, str]]:
    """The SHA-256 of files, several at a time; `on_bytes` hears from several threads how much more was read."""

    def digest(name: str) -> str:
        found = hashlib.sha256()
        with (folder / name).open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                found.update(block)
                on_bytes(len(block))
        return found.hexdigest()

    # The largest first: the last thread then does not have a whole one left.
    names = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(THREADS, "checksum") as pool:
        try:
            yield from zip(names, pool.map(digest, names), strict=True)
        except OSError as exc:
            raise FatalError(
                f"{exc.filename or folder} cannot be read: {exc.strerror}", code="weights_missing"
            ) from exc


def commits(folder: Path) -> dict[str, str]:
    """Of which commit each file is, as the hub's client noted beside a plain folder; not all need have a note."""
    found = {}
    for name in paths(folder):
        try:
            commit = (folder / NOTES / f"{name}.metadata").read_text("utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError):
            continue
        if COMMIT.fullmatch(commit):
            found[name] = commit
    return found


def of_hub(folder: Path) -> dict[str, str]:
    """The checksums that the hub told of the large files when they were downloaded.

    In the hub's cache a file is a link to a blob that is named so; beside a plain folder they are noted.
    """
    sums = {}
    for name in paths(folder):
        path = folder / name
        note = folder / NOTES / f"{name}.metadata"
        if path.is_symlink():
            told = path.resolve().name
        else:
            try:
                told = note.read_text("utf-8").split("\n")[1].strip()
            except (OSError, UnicodeDecodeError, IndexError):
                continue
        if SHA256.fullmatch(told):
            sums[name] = told
    return sums
