"""What a start works out while it imports and builds, kept for the next one.

A worker imports 3,400 modules. Much of the time that takes goes into what comes out the same at each start: to find and
read the bytecode of every module, to compile what dataclasses write, to translate regular expressions, to look up in
which of transformers' 1,700 files each name is, and which distribution has which package, and to hash all of Triton. It
is kept in one file beside what is compiled for the GPU, under a name that says what is installed and keys that say what
else it depends on: a file's size and time, above all. Python and those packages work out for themselves whatever is not
there. Whoever changes files of an installed package by hand, other than Python's bytecode would notice, removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from vidgen.kept import Key, Store

LISTS = "transformers.utils.import_utils"
LIST = "define_import_structure"  # of a path, and of a prefix for the modules' names
TRITON = "triton.runtime.cache"
HASH = "triton_key"  # of all that compiles, half a gigabyte
FORMAT = 2  # of what is kept under a key, by which another vidgen does not take it for its own
UNUSED_S = 30 * 24 * 3600.0  # behind which a file is removed: each image of a cluster, say, has its own
# Not ours: in an image all files may have one time, and of one size there may be another tomorrow.
OWN = ("vidgen", "edit_service", "i2v_service", "gateway")


@contextlib.contextmanager
def kept(folder: Path | None, name: str) -> Iterator[str | None]:
    """Within it what importing works out is taken from the folder, or else left there under this name.

    Where the folder takes nothing, or None is given, all is worked out at each start; so it is where what is there is
    refused, and then this says why.
    """
    refused = None
    with contextlib.ExitStack() as stack:
        _put(stack, inspect, "getmodule", functools.partial(_module_of, inspect.getmodule))
        if folder is not None:
            store = Store(folder / f"imports-{name}-{_here()}.bin")
            stack.callback(_give_up, folder, name)
            stack.callback(store.close)
            _adopt(stack, store)
            refused = store.refused
        yield refused


def _give_up(folder: Path, name: str) -> None:
    """Remove what no start of this name has used for long."""
    with contextlib.suppress(OSError):
        for file in folder.glob(f"imports-{name}-*"):
            if file.stat().st_mtime < time.time() - UNUSED_S:
                file.unlink(missing_ok=True)


def _adopt(stack: contextlib.ExitStack, store: Store) -> None:
    """Have Python, torch and transformers ask the store, until the stack ends."""
    if PathFinder in sys.meta_path:  # others that are asked before it find what they find
        finder = _Finder(store)
        sys.meta_path.insert(sys.meta_path.index(PathFinder), finder)
        stack.callback(_remove, finder)
    _put(stack, dataclasses, "exec", functools.partial(_execute, store))
    _put(stack, re._compiler, "compile", _expressions(store))  # type: ignore[attr-defined]
    theirs = importlib.metadata.packages_distributions
    _put(
        stack, importlib.metadata, "packages_distributions",
        lambda: store.asked(("packages", *_distributions()), lambda: {name: list(of) for name, of in theirs().items()}),
    )  # fmt: skip


def _put(stack: contextlib.ExitStack, module: ModuleType, name: str, value: Any) -> None:
    """Put something into a module until the stack ends; what others put over it meanwhile stays."""
    missing = object()
    before = vars(module).get(name, missing)
    setattr(module, name, value)

    @stack.callback
    def put_back() -> None:
        if vars(module).get(name) is not value:
            return
        if before is missing:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _remove(finder: MetaPathFinder) -> None:
    with contextlib.suppress(ValueError, AttributeError):  # others may have, with all the rest; at its end Python does
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds what is in packages; those at the top are found as ever, so that none hides another one."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None or name.partition(".")[0] in OWN:
            return None
        # By the time of a folder Python, too, knows that nothing came into it, which could hide what was found.
        key, times = ("spec", name, *path), [_time(folder) for folder in path]
        found = self._store.found(key)
        if found is not None and found[0] == times and (spec := self._spec(name, *found[1:])) is not None:
            return spec
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or type(spec.loader) is not SourceFileLoader:
            return spec
        spec.loader = own = _loader(name, spec.loader.path, self._store)
        # A folder of its name would hide it as soon as it were a package, which no time of a folder here tells.
        if own.version is not None and not Path(own.path).with_suffix("").is_dir():
            self._store.add(key, (times, own.path, own.version, spec.submodule_search_locations))
        return spec

    def _spec(self, name: str, path: str, version: tuple[int, int], inside: list[str] | None) -> ModuleSpec | None:
        loader = _loader(name, path, self._store)
        if loader.version != version:
            return None
        return importlib.util.spec_from_file_location(name, path, loader=loader, submodule_search_locations=inside)


def _time(folder: str) -> int | None:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116  it is done for each module
    except (OSError, TypeError, ValueError):  # a package may have anything in its path, which Python passes over
        return None


class _Loader(SourceFileLoader):
    """Loads a module as ever, but for where its bytecode comes from.

    It has no frame of its own beneath what the module does: Python leaves its own ones out of tracebacks, and out of
    what a warning counts.
    """

    def __init__(self, name: str, path: str, store: Store) -> None:
        super().__init__(name, path)
        self._store: Store | None = store
        # The size and the time of the file, by which Python, too, knows whose bytecode it has.
        self.version: tuple[int, int] | None = None
        with contextlib.suppress(OSError):
            found = os.stat(path)  # noqa: PTH116
            self.version = (found.st_size, found.st_mtime_ns)

    def get_code(self, fullname: str) -> CodeType | None:
        store, self._store = self._store, None  # a module keeps its loader, and need not keep all of that
        own = functools.partial(super().get_code, fullname)
        if store is None or self.version is None:
            return own()
        found: CodeType | None = store.asked(("code", self.path, *self.version), own)
        return found


class _AdoptingLoader(_Loader):
    """Loads a module, and has it ask the store first."""

    def exec_module(self, module: ModuleType) -> None:
        store = self._store
        super().exec_module(module)
        if store is not None:
            ADOPTED[self.name](store, module, Path(self.path))


def _loader(name: str, path: str, store: Store) -> _Loader:
    return _AdoptingLoader(name, path, store) if name in ADOPTED else _Loader(name, path, store)


def _keep_lists(store: Store, module: ModuleType, path: Path) -> None:
    theirs: Callable[..., Any] | None = getattr(module, LIST, None)
    if theirs is None:
        return
    try:
        version = _version(path)
    except OSError:
        return

    known = weakref.ref(store)  # the module outlives it

    @functools.wraps(theirs)
    def listed(*given: Any, **more: Any) -> Any:
        key = ("lists", version, repr(([str(one) for one in given], sorted(more.items()))))
        return _ask(known(), key, functools.partial(theirs, *given, **more))

    setattr(module, LIST, listed)


def _keep_hash(store: Store, module: ModuleType, path: Path) -> None:
    theirs: Callable[[], str] | None = getattr(module, HASH, None)
    if theirs is None:
        return
    known = weakref.ref(store)
    setattr(module, HASH, functools.cache(lambda: _ask(known(), ("hash", *_files(path.parents[1])), theirs)))


def _ask(store: Store | None, key: Key, work_out: Callable[[], Any]) -> Any:
    return work_out() if store is None else store.asked(key, work_out)


def _files(triton: Path) -> Iterator[Hashable]:
    """What Triton's hash of itself depends on: each file with its size and its time."""
    hashed = [triton / "__init__.py", triton / "runtime" / "cache.py", *triton.glob("_C/libtriton.*")]
    for folder in ("compiler", "backends", "language"):
        hashed += (triton / folder).rglob("*.py")
    for file in sorted(hashed):
        with contextlib.suppress(OSError):  # an editor may leave links to nothing
            found = file.stat()
            yield str(file), found.st_size, found.st_mtime_ns


def _version(path: Path) -> tuple[Hashable, ...]:
    """What the files of transformers depend on, of which this one is in its folder `utils`; raises OSError."""
    # Folders tell nothing of when: bytecode may be put into them.
    models = sorted({one.name for one in (path.parents[1] / "models").iterdir()} - {"__pycache__"})
    own = path.stat()
    return (str(path), own.st_size, own.st_mtime_ns, *models)


ADOPTED: dict[str, Callable[[Store, ModuleType, Path], None]] = {LISTS: _keep_lists, TRITON: _keep_hash}


def _execute(store: Store, source: Any, *where: Any) -> None:
    """`exec`, for those who write code for themselves: dataclasses write 5,000 times."""
    if type(source) is str:
        source = store.asked(("exec", source), lambda: compile(source, "<string>", "exec", dont_inherit=True))
    exec(source, *where)  # noqa: S102  what it does instead of whoever asks


def _expressions(store: Store) -> Callable[..., re.Pattern[Any]]:
    """`re._compiler.compile`, which keeps what it hands to the engine that is written in C."""
    compiler: Any = re._compiler  # type: ignore[attr-defined]
    theirs = compiler.compile
    # The same function, but that it returns what it would have handed over.
    returns = SimpleNamespace(compile=lambda *given: given)

    def translated(pattern: str, flags: int) -> tuple[Any, ...]:
        text, all_flags, code, groups, names, numbers = translate(pattern, flags)
        return text, int(all_flags), [int(one) for one in code], groups, names, numbers

    def compiled(pattern: Any, flags: int = 0) -> re.Pattern[Any]:
        # What is in bytes may depend on the locale, and DEBUG wants to be told. A warning is by who translates it.
        if type(pattern) is not str or flags & re.DEBUG:
            made: re.Pattern[Any] = theirs(pattern, flags)
            return made
        given = store.asked(("re", pattern, int(flags)), functools.partial(translated, pattern, flags))
        found: re.Pattern[Any] = compiler._sre.compile(*given)
        return found

    try:
        translate = FunctionType(theirs.__code__, {**vars(compiler), "_sre": returns})
        alike = compiler._sre.compile(*translated("(?P<a>a)", 0)) == theirs("(?P<a>a)", 0)
    except Exception:  # another Python's does it in another way
        return theirs  # type: ignore[no-any-return]
    return compiled if alike else theirs


def _module_of(theirs: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """`inspect.getmodule`, which torch asks of the frame that declares an operator, at each of them.

    For a frame it looks up the path of every module there is.
    """
    if given and isinstance(given[0], FrameType):
        own, file = given[0].f_globals, given[0].f_code.co_filename
        name = own.get("__name__")
        module = sys.modules.get(name) if isinstance(name, str) else None
        if getattr(module, "__dict__", None) is own and own.get("__file__") == file:  # no code from elsewhere
            return module
    return theirs(*given, **more)


def _distributions() -> Iterator[tuple[str, str, int]]:
    """What is installed: in which folder, under which name, and since when."""
    for folder in sys.path:
        found = []
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")):
                    with contextlib.suppress(OSError):  # a link to nothing is no distribution
                        found.append((folder, entry.name, entry.stat().st_mtime_ns))
        yield from sorted(found)


def _here() -> str:
    """A name for this interpreter and what is installed for it.

    Others' bytecode it may not be able to read. And in an image all files may have one time, and another one of the
    same size tomorrow: what is installed is known by the checksums in its RECORD.
    """
    said = hashlib.sha256(
        repr((FORMAT, sys.version, sys.flags.optimize, importlib.util.MAGIC_NUMBER, sys.path)).encode()
    )
    for folder, name, _ in _distributions():
        said.update(f"{folder}/{name}".encode())
        with contextlib.suppress(OSError):
            said.update((Path(folder) / name / "RECORD").read_bytes())
    return said.hexdigest()[:16]
