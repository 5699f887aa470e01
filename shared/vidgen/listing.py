"""What transformers finds in its own files at each import, kept for the next start.

To know which of its modules has which name it reads the 1,700 files of its models, twice: a sixth of what a service
takes to import. What it finds depends on nothing but those files, so a start that finds it beside what is compiled
takes it from there; of another version, or installation, transformers looks for itself. Whoever changes files of an
installed package by hand removes what is kept of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "transformers"
MODULE = f"{PACKAGE}.utils.import_utils"
FUNCTION = "define_import_structure"  # of a path, and of a prefix for the modules' names

# Of the names that need the same other packages: by the module in which they are.
Structure = dict[frozenset[str], dict[str, set[str]]]


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[None]:
    """Within it transformers, if it is imported, finds there what it found before; else it is left there."""
    if folder is None or MODULE in sys.modules:
        yield
        return
    finder = _Finder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.keep()


class _Finder(MetaPathFinder):
    """Finds that one module as ever, and then has it ask here first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: Path | None = None
        self._found: dict[str, Any] = {}
        self._more = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODULE:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path, self._adopt)
        return spec

    def keep(self) -> None:
        """Keep what was found anew; where the folder takes nothing, the next start looks once more."""
        if self._file is None or not self._more:
            return
        text = json.dumps(dict(self._found))  # of a copy: a thread may be importing still
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._folder, suffix=".part", delete=False) as file:
                temporary = Path(file.name)
                try:
                    file.write(text)
                    file.flush()
                    temporary.replace(self._file)
                except OSError:
                    temporary.unlink()
                    raise

    def _adopt(self, module: ModuleType, path: Path) -> None:
        theirs = getattr(module, FUNCTION, None)
        if theirs is None:
            return
        with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
            self._file = self._folder / f"{PACKAGE}-{_version(path)}.json"
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(self._file.read_bytes())
                self._found = found if isinstance(found, dict) else {}
        if self._file is not None:
            setattr(module, FUNCTION, functools.wraps(theirs)(functools.partial(self._asked, theirs)))

    def _asked(self, theirs: Callable[..., Structure], *given: Any, **more: Any) -> Structure:
        name = repr(([str(one) for one in given], sorted(more.items())))
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            return _read(self._found[name])
        found = theirs(*given, **more)
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            written = [[sorted(needed), {name: sorted(names) for name, names in modules.items()}]
                       for needed, modules in found.items()]  # fmt: skip
            if _read(written) == found:
                self._found[name], self._more = written, True
        return found


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, adopt: Callable[[ModuleType, Path], None]) -> None:
        super().__init__(name, path)
        self._adopt = adopt

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self._adopt(module, Path(self.path))


def _read(written: Any) -> Structure:
    return {
        frozenset(_words(needed)): {name: set(_words(names)) for name, names in modules.items()}
        for needed, modules in written
    }


def _words(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise TypeError(found)
    return found


def _version(path: Path) -> str:
    """A name for the files of a package, of which this one is in its folder `utils`: where, of when, and which."""
    # Folders tell nothing of when: bytecode may be put into them.
    models = sorted({one.name for one in (path.parents[1] / "models").iterdir()} - {"__pycache__"})
    own = path.stat()
    version = importlib.metadata.version(PACKAGE)
    said = repr((str(path), version, own.st_size, own.st_mtime_ns, models))
    return f"{version}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"
