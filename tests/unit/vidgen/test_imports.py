"""What one start found is there for the next one, and both import what a start that keeps nothing does."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path
from typing import Any, NoReturn
from zipfile import ZipFile

import pytest

from vidgen import imports

if sys.platform != "win32":
    pass


def no_need(*given: Any, **more: Any) -> NoReturn:
    raise AssertionError("it is worked out again")


# --- Where it is asked for --------------------------------------------------------------------------------------------


def patched() -> list[Any]:
    return [
        list(sys.meta_path),
        inspect.getmodule,
        vars(dataclasses).get("exec"),
        re._compiler.compile,  # type: ignore[attr-defined]
        importlib.metadata.packages_distributions,
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_behind_it_all_is_as_it_was(tmp_path: Path, fails: bool) -> None:
    before = patched()
    with contextlib.suppress(ZeroDivisionError), imports.kept(tmp_path, "x"):
        assert [one == other for one, other in zip(patched(), before, strict=True)] == [False] * 5
        assert sys.meta_path.index(PathFinder) == before[0].index(PathFinder) + 1
        re._compiler.compile("a")  # type: ignore[attr-defined]
        if fails:
            _ = 1 / 0
    assert patched() == before
    assert "exec" not in vars(dataclasses)
    assert len(list(tmp_path.iterdir())) == 1


def test_without_a_folder_nothing_is_kept() -> None:
    before = patched()
    with imports.kept(None, "x"):
        assert [one == other for one, other in zip(patched(), before, strict=True)] == [True, False, True, True, True]
    assert patched() == before


def test_one_within_another_is_of_no_consequence(tmp_path: Path) -> None:
    before = patched()
    with imports.kept(tmp_path, "x"), imports.kept(tmp_path, "y"):
        assert re._compiler.compile("(a)b").groups == 1  # type: ignore[attr-defined]
        dataclasses.make_dataclass("Made", ["a"])(1)
        importlib.metadata.packages_distributions()
    assert patched() == before


def test_what_others_put_over_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "getmodule", inspect.getmodule)  # to be put back
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    with imports.kept(tmp_path, "x"):
        ours = inspect.getmodule
        theirs = inspect.getmodule = lambda *given: ours(*given)
        del dataclasses.exec  # type: ignore[attr-defined]
        sys.meta_path.remove(next(one for one in sys.meta_path if isinstance(one, imports._Finder)))
    assert inspect.getmodule is theirs
    assert inspect.getmodule(inspect.currentframe()) is sys.modules[__name__]


def test_where_python_looks_in_another_way_it_is_left_to_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if one is not PathFinder])
    before = list(sys.meta_path)
    with imports.kept(tmp_path, "x"):
        assert sys.meta_path == before


def test_each_name_and_each_python_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(name: str = "x") -> int:
        with imports.kept(tmp_path, name):
            re._compiler.compile("a")  # type: ignore[attr-defined]
        return len(list(tmp_path.iterdir()))

    assert [use(), use(), use("y")] == [1, 1, 2]
    for module, name, value in (
        (imports, "FORMAT", 0), (sys, "version", "4"), (sys, "path", [*sys.path, "/a"]),
        (imports, "_distributions", lambda: [("/a", "other-1.1.dist-info", 0)]),
        (importlib.util, "MAGIC_NUMBER", b"1"), (sys, "flags", types.SimpleNamespace(optimize=3)),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            before = len(list(tmp_path.iterdir()))
            assert [use(), use()] == [before + 1] * 2


def test_each_set_of_packages_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By checksums: in an image all files may have one time, and one of the same size may be another tomorrow."""
    about = tmp_path / "site" / "one-1.0.dist-info"
    about.mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    found = [imports._here()]
    (about / "RECORD").write_text("one.py,sha256=a,3\n")
    found.append(imports._here())
    (about / "RECORD").write_text("one.py,sha256=b,3\n")
    found.append(imports._here())
    for number in range(20):  # whichever is met first
        (tmp_path / "site" / f"gone-{number}.dist-info").symlink_to(tmp_path / "nowhere")
    assert imports._here() == found[-1]
    about.rename(about.with_name("one-1.1.dist-info"))
    found.append(imports._here())
    assert len(set(found)) == 4


def test_who_asks_hears_why_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(folder: Path | None) -> str | None:
        with imports.kept(folder, "x") as refused:
            re._compiler.compile("a")  # type: ignore[attr-defined]
        return refused

    assert [use(None), use(tmp_path), use(tmp_path)] == [None, None, None]
    [file] = tmp_path.iterdir()
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    assert use(tmp_path) == f"{file} is no file of this user"


def test_what_was_not_used_for_long_is_given_up(tmp_path: Path) -> None:
    def use(name: str) -> None:
        with imports.kept(tmp_path, name):
            re._compiler.compile("a")  # type: ignore[attr-defined]

    use("x")
    [used] = tmp_path.iterdir()
    others = [tmp_path / f"imports-{name}" for name in ("x-0.bin", "x-0-1.part", "y-0.bin", "x-1.bin")]
    for file in others:
        file.touch()
    for file in (used, *others[:3]):
        os.utime(file, (0, 0))
    use("x")
    assert set(tmp_path.iterdir()) == {used, *others[2:]}
    assert used.stat().st_mtime > 0
    use("nobody")  # a folder that is not there, or takes nothing, is no fault
    os.utime(others[2], (0, 0))
    with imports.kept(tmp_path / "none", "x"):
        pass


# --- Modules ----------------------------------------------------------------------------------------------------------

START = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from vidgen import imports

def start(site, folder, before, within, behind):
    sys.path.insert(0, site)
    opened, said, names = [], [], {"__name__": "__main__"}
    names.update(say=said.append, site=Path(site), imports=imports)
    exec(before, names)
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
    with imports.kept(Path(folder) if folder else None, "x"):
        exec(within, names)
    exec(behind, names)
    return said, sorted({one[len(site) + 1 :] for one in opened if one.startswith(site + "/")})

for line in sys.stdin:
    child = os.fork()
    if not child:
        print(json.dumps(start(*json.loads(line))), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print("null", flush=True)
"""
Pythons = dict[tuple[str, ...], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def pythons() -> Iterator[Pythons]:
    """Processes that have imported what is tested and nothing else, and fork for each start; by their flags."""
    made: Pythons = {}
    yield made
    for one in made.values():
        one.communicate(timeout=60)


@dataclasses.dataclass
class Site:
    """A folder that processes import from, each of which keeps what it finds in another one."""

    path: Path
    folder: Path
    pythons: Pythons

    def write(self, name: str, text: str = "") -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def start(
        self, within: str, *, before: str = "", behind: str = "", keeps: bool = True, flags: tuple[str, ...] = ()
    ) -> tuple[list[Any], list[str]]:
        """What a process says that runs this, and which files of the folder it opens."""
        if flags not in self.pythons:
            # Without what is installed here: it takes time, and has a transformers of its own.
            command = [sys.executable, "-I", "-S", *flags, "-c", START, str(Path(imports.__file__).parents[1])]
            self.pythons[flags] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        python = self.pythons[flags]
        assert python.stdin is not None
        assert python.stdout is not None
        python.stdin.write(
            json.dumps([str(self.path), str(self.folder) if keeps else "", before, within, behind]) + "\n"
        )
        python.stdin.flush()
        answer = json.loads(python.stdout.readline())
        assert answer is not None, "see what it wrote to stderr"
        said, opened = answer
        return said, opened

    def said(self, within: str, **more: Any) -> list[Any]:
        return self.start(within, **more)[0]


@pytest.fixture
def site(tmp_path: Path, pythons: Pythons) -> Site:
    made = Site(tmp_path / "site", tmp_path / "kept", pythons)
    made.write("pack/__init__.py", "HERE = __name__\n")
    made.write("pack/one.py", "from pack.inner import two\nX = 1\n")
    made.write("pack/inner/__init__.py", "from . import two\n")
    made.write("pack/inner/two.py", "X = 2\n")
    return made


USE = "import pack.one\nsay(pack.one.X)\nsay(pack.one.two.X)"


def cached(name: str) -> str:
    return importlib.util.cache_from_source(name)


def later(path: Path) -> None:
    """Clocks of file systems may tick rarely."""
    after = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(after, after))


def changed(file: Path, text: str, *, after_s: int = 10) -> None:
    """Write a file so that its time is another one, and its folder's is not."""
    folder, before = file.parent.stat().st_mtime_ns, file.stat().st_mtime_ns
    file.write_text(text)
    os.utime(file, ns=(before, before + after_s * 10**9))
    os.utime(file.parent, ns=(folder, folder))


def test_what_is_in_a_package_is_read_once(site: Site) -> None:
    assert site.start(USE, keeps=False)[0] == [1, 2]
    assert cached("pack/one.py") in site.start(USE, keeps=False)[1]
    said, read = site.start(USE)
    assert (said, cached("pack/one.py") in read, cached("pack/inner/__init__.py") in read) == ([1, 2], True, True)
    assert site.start(USE) == ([1, 2], [cached("pack/__init__.py")])


def test_a_folder_of_its_name_may_hide_a_module_any_time(site: Site) -> None:
    (site.path / "pack" / "one").mkdir()
    assert site.said(USE) == site.said(USE) == [1, 2]
    site.write("pack/one/__init__.py", "from pack.inner import two\nX = 7\n")
    folder = (site.path / "pack").stat().st_mtime_ns
    os.utime(site.path / "pack", ns=(folder, folder))
    assert site.said(USE) == [7, 2]


def test_what_is_ours_is_not_taken(site: Site) -> None:
    site.write("gateway/__init__.py")
    site.write("gateway/one.py", "X = 1\n")
    for _ in range(2):
        assert cached("gateway/one.py") in site.start("import gateway.one\nimport pack.one")[1] or _ == 0


def test_so_is_what_python_leaves_no_bytecode_of(site: Site) -> None:
    said, read = site.start(USE, flags=("-B",))
    assert (said, "pack/one.py" in read) == ([1, 2], True)
    assert site.start(USE, flags=("-B",)) == ([1, 2], ["pack/__init__.py", cached("pack/__init__.py")])
    assert list(site.path.rglob("__pycache__")) == []


@pytest.mark.parametrize(("text", "after_s"), [("X = 30\n", 0), ("X = 3\n", 10), ("X = 3\n", -10)])
def test_a_file_that_changed_is_read_and_kept_instead(site: Site, text: str, after_s: int) -> None:
    site.start(USE)
    changed(site.path / "pack/inner/two.py", text, after_s=after_s)
    said, read = site.start(USE)
    assert (said, "pack/inner/two.py" in read, cached("pack/one.py") in read) == ([1, int(text[4:])], True, False)
    assert site.start(USE) == (said, [cached("pack/__init__.py")])


def test_a_file_that_is_gone_is_missed(site: Site) -> None:
    site.start(USE)
    folder = site.path / "pack"
    before = folder.stat().st_mtime_ns
    (folder / "one.py").unlink()
    os.utime(folder, ns=(before, before))
    missed = "try:\n import pack.one\nexcept ImportError as exc:\n say([type(exc).__name__, exc.name])"
    assert site.said(missed) == [["ModuleNotFoundError", "pack.one"]]
    shutil.rmtree(folder / "inner")
    assert site.said(missed.replace("one", "inner")) == [["ModuleNotFoundError", "pack.inner"]]


def test_so_is_an_empty_one_of_no_time(site: Site) -> None:
    file = site.write("pack/empty.py")
    os.utime(file, ns=(0, 0))
    assert site.said("import pack.empty\nsay(1)") == [1]
    before = file.parent.stat().st_mtime_ns
    file.unlink()
    os.utime(file.parent, ns=(before, before))
    assert site.said("try:\n import pack.empty\nexcept ImportError as exc:\n say(exc.name)") == ["pack.empty"]


def test_a_file_that_is_new_is_found(site: Site) -> None:
    site.start(USE)
    site.write("pack/three.py", "X = 3\n")
    assert site.said(f"{USE}\nimport pack.three\nsay(pack.three.X)") == [1, 2, 3]


def test_what_hides_another_one_is_found(site: Site) -> None:
    site.start(USE)
    site.write("pack/one/__init__.py", "from pack.inner import two\nX = 11\n")
    later(site.path / "pack")
    assert site.said(USE) == [11, 2]
    assert site.start(USE) == ([11, 2], [cached("pack/__init__.py")])


def test_a_package_may_lie_in_several_folders(site: Site) -> None:
    site.write("pack/__init__.py", f"__path__[:0] = {[f'{site.path}/none', f'{site.path}/more']!r}\n")
    site.write("more/three.py", "X = 3\n")
    use = f"{USE}\nimport pack.three\nsay(pack.three.X)"
    assert site.said(use) == [1, 2, 3]
    assert site.start(use) == ([1, 2, 3], [cached("pack/__init__.py")])
    site.write("more/one.py", "from pack.inner import two\nX = 11\n")
    later(site.path / "more")
    assert site.said(use) == [11, 2, 3]
    assert site.start(use) == ([11, 2, 3], [cached("pack/__init__.py")])


def test_a_package_may_lie_in_another_folder(site: Site) -> None:
    site.write("pack/__init__.py", f"import sys\n__path__[:] = [f'{site.path}/{{sys.where}}']\n")
    for where in ("v1", "v2"):
        os.utime(site.write(f"{where}/one.py", f"X = {where[1:]}\n"), ns=(10**18, 10**18))
        os.utime(site.path / where, ns=(10**18, 10**18))
    for where in ("v1", "v2", "v1"):
        use = "import pack.one\nsay([pack.one.X, pack.one.__file__])"
        said = site.said(use, before=f"import sys\nsys.where = {where!r}", flags=("-B",))
        assert said == [[int(where[1:]), f"{site.path}/{where}/one.py"]]


ELSEWHERE = """
import sys
from importlib.util import spec_from_file_location
class Finder:
    def __init__(self, entry):
        if entry != "elsewhere:":
            raise ImportError
    def find_spec(self, name, target=None):
"""


def test_who_has_a_way_of_its_own_to_find_files_is_asked_first(site: Site) -> None:
    site.write("pack/__init__.py", "__path__ += ['elsewhere:']\n")
    site.write("elsewhere/there.py", "X = 3\n")
    site.write("elsewhere/inside/deep.py", "X = 4\n")
    before = (
        ELSEWHERE
        + """        say([name, target is None])
        path = str(site / "elsewhere" / f"{name[5:]}.py")
        inside = [str(site / "elsewhere" / "inside")] if name == "pack.there" else None
        return spec_from_file_location(name, path, submodule_search_locations=inside)
sys.path_hooks.insert(0, Finder)
"""
    )
    use = """
import pack.there, pack.there.deep
say([pack.there.X, pack.there.deep.X, pack.there.__path__])
try:
    import pack.gone
except Exception as exc:
    say([type(exc).__name__, type(exc.__cause__).__name__])
"""
    alone = site.said(use, before=before, keeps=False)
    assert alone[0] == ["pack.there", True]
    assert alone[-1] == ["FileNotFoundError", "NoneType"]
    assert site.said(use, before=before) == alone
    assert site.said(use) == [alone[1], ["ModuleNotFoundError", "NoneType"]]


def test_who_loads_a_module_anew_says_so(site: Site) -> None:
    site.write("pack/__init__.py", "__path__ = ['elsewhere:']\n")
    before = (
        ELSEWHERE
        + """        say(None if target is None else target.__name__)
        return spec_from_file_location(name, str(site / "pack" / "inner" / "two.py"))
sys.path_hooks.insert(0, Finder)
"""
    )
    use = "import importlib, pack.two\nimportlib.invalidate_caches()\npack.__path__ += ['']\nimportlib.reload(pack.two)"
    alone = site.said(use, before=before, keeps=False)
    assert alone == [None, "pack.two"]
    assert site.said(use, before=before) == alone


def test_what_else_is_in_its_path_is_passed_over(site: Site) -> None:
    site.write(
        "pack/__init__.py", "import pathlib\n__path__ += [None, 2.0, [], pathlib.Path('a'), '/not/there', '\\0']\n"
    )
    assert site.said(USE, keeps=False) == [1, 2]
    assert site.said(USE) == site.said(USE) == [1, 2]


def test_a_package_without_a_file_is_found_as_ever(site: Site) -> None:
    site.write("spread/inner/three.py", "X = 3\n")
    site.write("more/spread/four.py", "X = 4\n")
    before = "import sys\nsys.path.append(str(site / 'more'))"
    use = """
import pack.spread.five, spread.inner.three, spread.four
say([pack.spread.five.X, spread.inner.three.X, spread.four.X])
say([str(type(one.__path__)) for one in (pack.spread, spread, spread.inner)])
say([list(one.__path__) for one in (pack.spread, spread, spread.inner)])
"""
    site.write("pack/spread/five.py", "X = 5\n")
    alone = site.said(use, before=before, keeps=False)
    assert alone[0] == [5, 3, 4]
    assert site.said(use, before=before) == alone
    assert site.start(use, before=before) == (alone, [cached("pack/__init__.py")])


def test_a_package_in_an_archive_is_found_as_ever(site: Site) -> None:
    with ZipFile(site.path / "archive.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/three.py", "X = 3\n")
    use = "import zipped.three\nsay([zipped.three.X, zipped.three.__file__, type(zipped.three.__loader__).__name__])"
    before = "import sys\nsys.path.append(str(site / 'archive.zip'))"
    alone = site.said(use, before=before, keeps=False)
    assert alone[0][::2] == [3, "zipimporter"]
    assert site.said(use, before=before) == site.said(use, before=before) == alone


def test_what_is_written_in_c_is_found_as_ever(site: Site) -> None:
    spec = next(
        (spec for name in ("_json", "_heapq", "_csv", "_bisect") if (spec := importlib.util.find_spec(name)) is not None
         and spec.origin is not None and spec.origin.endswith(EXTENSION_SUFFIXES[0])), None,
    )  # fmt: skip
    if spec is None or spec.origin is None:
        pytest.skip("this Python has none that is a file")
    site.write(f"pack/{spec.name}.py", "raise ImportError('hidden by the other')")
    shutil.copy(spec.origin, site.path / "pack")
    use = f"import pack.{spec.name} as it\nsay([it.__file__, type(it.__loader__).__name__])"
    alone = site.said(use, keeps=False)
    assert alone[0][1] == "ExtensionFileLoader"
    assert site.said(use) == site.said(use) == alone


def test_what_others_find_first_is_theirs(site: Site) -> None:
    site.write("elsewhere/one.py", "X = 11\n")
    before = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "pack.one":
            return importlib.util.spec_from_file_location(name, site / "elsewhere" / "one.py")
sys.meta_path.insert(0, Finder)
"""
    use = "import pack.one\nsay(pack.one.X)"
    assert site.said(use) == [1]
    assert site.said(use, before=before) == [11]
    assert site.said(use) == [1]


ASKED = """
import importlib.resources, inspect, linecache, pack.one, pack.inner, pkgutil, sys
for module in (pack, pack.one, pack.inner, pack.inner.two):
    spec = module.__spec__
    say([module.__name__, module.__file__, module.__cached__, module.__package__, getattr(module, "__path__", None)])
    say([spec.name, spec.origin, spec.cached, spec.parent, spec.has_location, spec.submodule_search_locations])
    say([spec.loader is module.__loader__, spec.loader.name, spec.loader.path, sorted(vars(module))])
    say([inspect.getsource(module), inspect.getsourcefile(module), spec.loader.get_source(module.__name__)])
    say([spec.loader.is_package(module.__name__), spec.loader.get_code(module.__name__).co_filename])
say(inspect.getsource(pack.one.function))
say([pack.one.function.__code__.co_filename, pack.one.function.__code__.co_firstlineno])
say((importlib.resources.files("pack.inner") / "data.txt").read_text())
say(pkgutil.get_data("pack.inner", "data.txt").decode())
say(sorted(module.name for module in pkgutil.walk_packages(pack.__path__, "pack.")))
say(importlib.reload(pack.one).X)
say(repr(pack.one))
"""


@pytest.mark.parametrize("where", ["within", "behind"])
def test_what_is_asked_of_a_module_is_as_ever(site: Site, where: str) -> None:
    site.write("pack/one.py", "from pack.inner import two\nX = 1\n\ndef function():\n    return two\n")
    site.write("pack/inner/data.txt", "data")
    more = {"within": ASKED} if where == "within" else {"within": "import pack.one, pack.inner", "behind": ASKED}
    alone = site.said(**more, keeps=False)
    assert site.said(**more) == site.said(**more) == alone


def test_what_a_module_raises_tells_of_the_same_lines(site: Site) -> None:
    site.write("pack/inner/two.py", "def fail():\n    return 1 / 0\n\nfail()\n")
    site.write("pack/four.py", "import not_there\n")
    use = """
import traceback
for name in ("pack.one", "pack.four"):
    try:
        __import__(name)
    except Exception:
        say(traceback.format_exc())
"""
    alone = site.said(use, keeps=False)
    assert "ZeroDivisionError" in alone[0]
    assert "importlib" not in alone[0]
    assert site.said(use) == site.said(use) == alone


def test_what_a_module_warns_of_is_told_of_who_imports_it(site: Site) -> None:
    site.write("pack/inner/two.py", "import warnings\nX = 2\nwarnings.warn('old', DeprecationWarning, stacklevel=2)\n")
    use = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import pack.one
say([[str(one.message), one.filename, one.lineno] for one in told])
"""
    alone = site.said(use, keeps=False)
    assert alone == [[["old", str(site.path / "pack/inner/__init__.py"), 1]]]
    assert site.said(use) == site.said(use) == alone


def test_a_file_that_cannot_be_compiled_is_read_each_time(site: Site) -> None:
    site.write("pack/one.py", "X = \n")
    use = "try:\n import pack.one\nexcept SyntaxError as exc:\n say([exc.filename, exc.lineno])"
    for _ in range(2):
        said, read = site.start(use)
        assert (said, "pack/one.py" in read) == ([[str(site.path / "pack/one.py"), 1]], True)


def test_what_was_found_may_be_loaded_later(site: Site) -> None:
    within = """
import importlib.util, pack, sys
spec = importlib.util.find_spec("pack.one")
spec.loader = importlib.util.LazyLoader(spec.loader)
one = importlib.util.module_from_spec(spec)
sys.modules["pack.one"] = one
spec.loader.exec_module(one)
"""
    site.start(USE)
    for _ in range(2):
        assert site.said(within, behind="say([one.X, one.two.X])") == [[1, 2]]


def test_python_that_leaves_out_what_is_asserted_has_bytecode_of_its_own(site: Site) -> None:
    site.write("pack/one.py", "X = 1\ntry:\n    assert False\nexcept AssertionError:\n    X = 2\n")
    use = "import pack.one\nsay(pack.one.X)"
    for _ in range(2):
        assert site.said(use) == [2]
        assert site.said(use, flags=("-O",)) == [1]


def test_threads_may_import_at_once(site: Site) -> None:
    for number in range(40):
        of = f"from pack.many import m{number // 2} as of\n" if number else ""
        site.write(f"pack/many/m{number}.py", f"{of}X = {number}\n")
    site.write("pack/many/__init__.py")
    use = """
import importlib, threading
begin, done = threading.Barrier(8), []
def work(first):
    begin.wait()
    for number in range(40):
        done.append(importlib.import_module(f"pack.many.m{(first * 5 + number) % 40}"))
threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
say(sorted(module.X for module in done))
"""
    all_of_them = sorted([*range(40)] * 8)
    assert site.said(use) == [all_of_them]
    assert site.start(use) == ([all_of_them], [cached("pack/__init__.py")])


def test_nothing_that_was_imported_keeps_what_was_kept(site: Site) -> None:
    stand_in_transformers(site)
    stand_in_triton(site)
    within = """
import dataclasses, inspect, pack.one, re, transformers.utils.import_utils, triton.runtime.cache
from pack import one
@dataclasses.dataclass
class Made:
    a: int = 1
re.purge()
pattern = re.compile("a+b")
"""
    behind = """
import gc
gc.collect()
say([type(one).__name__ for one in gc.get_objects() if isinstance(one, imports.Store)])
transformers.utils.import_utils.define_import_structure("x")
say([triton.runtime.cache.triton_key(), len(transformers.utils.import_utils.CALLS)])
"""
    for _ in range(2):
        assert site.said(within, behind=behind) == [[], ["hash", 1]]


# --- What dataclasses write -------------------------------------------------------------------------------------------


def made(postponed: bool) -> dict[str, Any]:
    """Classes of all kinds, in a module of their own, which postpones what it annotates or does not."""
    source = ("from __future__ import annotations\n" if postponed else "") + CLASSES
    module = types.ModuleType("classes")
    sys.modules["classes"] = module
    try:
        exec(source, vars(module))
    finally:
        del sys.modules["classes"]
    return vars(module)


CLASSES = """
import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

@dataclass(order=True)
class Plain:
    a: int
    b: list = field(default_factory=list, compare=False)
    c: str = "c"
    d: ClassVar[int] = 3

@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    a: int
    b: str = "b"
    init: dataclasses.InitVar[int] = 0

    def __post_init__(self, init):
        object.__setattr__(self, "a", self.a + init)

@dataclass(unsafe_hash=True, repr=False)
class Derived(Plain):
    e: float = 1.0

Made = dataclasses.make_dataclass("Made", [("x", int), ("y", int, 5)])
"""


def behaviour(of: dict[str, Any]) -> list[Any]:
    plain, closed, derived, make = of["Plain"], of["Closed"], of["Derived"], of["Made"]
    one, another = plain(1), plain(2, [1], c="d")
    told: list[Any] = [
        one == plain(1, [3]), one < another, one >= another, repr(one), repr(another), one.b is not plain(1).b,
        closed(a=1, init=2) == closed(a=3), repr(closed(a=1)), hash(closed(a=1)) == hash((1, "b")), closed.__slots__,
        hash(derived(1)) == hash((1, "c", 1.0)), derived(1) < derived(2), derived.__init__.__qualname__,
        repr(derived(1)).startswith("<classes.Derived object"), [field.name for field in dataclasses.fields(derived)],
        repr(make(1)), make(1, 5) == make(1), dataclasses.asdict(derived(1)), repr(dataclasses.replace(one, a=7)),
        str(inspect.signature(plain)), str(inspect.signature(closed)),
        plain.__match_args__, plain.__init__.__annotations__,
    ]  # fmt: skip
    for wrong in (plain, lambda: closed(1), lambda: setattr(closed(a=1), "a", 2), lambda: closed(a=1).__dict__):
        with pytest.raises(Exception) as raised:  # noqa: PT011  whichever it is
            wrong()
        told.append(repr(raised.value))
    return told


@pytest.mark.parametrize("postponed", [False, True])
def test_what_dataclasses_write_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postponed: bool
) -> None:
    compiled = []

    def counted(source: str, *more: Any, **others: Any) -> Any:
        compiled.append(source)
        return compile(source, *more, **others)

    alone = behaviour(made(postponed))
    monkeypatch.setattr(imports, "compile", counted, raising=False)
    for first in (True, False):
        with imports.kept(tmp_path, "x"):
            assert behaviour(made(postponed)) == alone
        assert (len(compiled) > 3) == first
        compiled.clear()


def test_what_was_compiled_by_others_is_run_as_it_is(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    with imports.kept(tmp_path, "x"):
        dataclasses.exec(compile("a = 1", "<theirs>", "exec"), names)  # type: ignore[attr-defined]
        dataclasses.exec(type("Text", (str,), {})("b = 2"), names)  # type: ignore[attr-defined]
    assert (names["a"], names["b"]) == (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_compiled_as_dataclasses_would(tmp_path: Path) -> None:
    """They postpone no annotations, as this module and that one do."""
    names: dict[str, Any] = {}
    with imports.kept(tmp_path, "x"):
        dataclasses.exec("def f(a: int): pass", names)  # type: ignore[attr-defined]
    assert names["f"].__annotations__ == {"a": int}
    assert names["f"].__code__.co_filename == "<string>"


# --- Regular expressions ----------------------------------------------------------------------------------------------

EXPRESSIONS: list[tuple[Any, int]] = [
    ("", 0), ("a", 0), ("a+b*?c{2,3}", 0), ("(?P<first>a)(?P<second>b)?(?P=first)", 0), ("(a)(b)(?:c)(d)", 0),
    ("(?<=a)b(?<!c)(?=d)(?!e)", 0), ("straße|ſ|K", re.I), ("(?i:a)B", 0), ("[à-ÿ]+", re.I), ("[^\\W\\d_]+", 0),
    ("[a-zа-я\u0100-\u2fff😀-🙏]+", 0), ("[" + "".join(map(chr, range(0x4E00, 0x9000, 3))) + "]", re.I),
    ("^a.$", re.M | re.S), ("a b # c", re.X), ("(?x) a  b", 0), ("(?aim)\\w", 0), ("\\w\\s\\b", re.A),
    ("(a)?(?(1)b|c)", 0), ("(?>a+)b*+", 0), ("\\Aa|b\\Z", 0), ("\ud800", 0), ("|".join(f"w{n}" for n in range(300)), 0),
    (b"(?P<a>[a-z\xff]+)", re.I), (b"\\w+", re.L), (b"(?i)a", 0),
]  # fmt: skip
TEXT = "aab abb aabccc ab aa ba straSSE ss K k àÀ Wort_1 яЯ 😀 一 \n a b w7 w299 \ud800"


def told(pattern: re.Pattern[Any]) -> list[Any]:
    text: Any = TEXT if isinstance(pattern.pattern, str) else TEXT.encode("utf-8", "surrogatepass")
    return [
        pattern.pattern, pattern.flags, dict(pattern.groupindex), pattern.groups, repr(pattern), hash(pattern),
        [(match.span(), match.groups(), match.groupdict(), match.lastgroup) for match in pattern.finditer(text)],
        pattern.sub(text[:0], text), pattern.split(text),
    ]  # fmt: skip


def compiled(pattern: Any, flags: int) -> re.Pattern[Any]:
    re.purge()
    return re.compile(pattern, flags)


@pytest.mark.parametrize(("pattern", "flags"), EXPRESSIONS)
def test_an_expression_is_translated_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: Any, flags: int
) -> None:
    alone = compiled(pattern, flags)
    for first in (True, False):
        with imports.kept(tmp_path, "x"), monkeypatch.context() as patch:
            if not first and isinstance(pattern, str):
                patch.setattr(re._parser, "parse", no_need)  # type: ignore[attr-defined]
            found = compiled(pattern, flags)
        assert found == alone
        assert found is not alone
        assert told(found) == told(alone)
    re.purge()


def test_the_same_expression_with_other_flags_is_another_one(tmp_path: Path) -> None:
    with imports.kept(tmp_path, "x"):
        assert compiled("a", 0).findall("aA") == ["a"]
        assert compiled("a", re.I).findall("aA") == ["a", "A"]
        assert compiled(b"a", 0).findall(b"a") == [b"a"]
    re.purge()


@pytest.mark.parametrize("pattern", ["(", "[", "a**", "(?P<a>b)(?P<a>c)", "\\", "(?<=a+)b", "(?P=a)", "a{3,2}", b"("])
def test_an_expression_that_is_none_is_refused_as_ever(tmp_path: Path, pattern: Any) -> None:
    def refused() -> list[Any]:
        with pytest.raises(re.error) as raised:
            compiled(pattern, 0)
        return [str(raised.value), raised.value.pattern, raised.value.pos, raised.value.lineno, raised.value.colno]

    alone = refused()
    for _ in range(2):
        with imports.kept(tmp_path, "x"):
            assert refused() == alone


@pytest.mark.parametrize(
    ("pattern", "flags", "error"),
    [
        (1, 0, TypeError),
        ([], 0, TypeError),
        ("a", re.L, ValueError),
        ("a", re.A | re.U, ValueError),
        ("a", "b", TypeError),
    ],
)
def test_so_is_what_is_given_wrongly(tmp_path: Path, pattern: Any, flags: Any, error: type[Exception]) -> None:
    for _ in range(2):
        with imports.kept(tmp_path, "x"), pytest.raises(error):
            compiled(pattern, flags)


def test_what_is_in_bytes_is_translated_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, theirs = [], re._parser.parse  # type: ignore[attr-defined]
    monkeypatch.setattr(re._parser, "parse", lambda *given: parsed.append(given[0]) or theirs(*given))  # type: ignore[attr-defined]
    for _ in range(2):
        with imports.kept(tmp_path, "x"):
            assert compiled(b"ab", 0).match(b"ab")
    assert parsed.count(b"ab") == 2


def test_flags_may_be_given_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (True, False):
        with imports.kept(tmp_path, "x"), monkeypatch.context() as patch:
            if not first:
                patch.setattr(re._parser, "parse", no_need)  # type: ignore[attr-defined]
            assert re._compiler.compile("a", re.I | re.M).flags == re.I | re.M | re.U  # type: ignore[attr-defined]


def test_what_was_parsed_by_others_is_compiled_as_ever(tmp_path: Path) -> None:
    for _ in range(2):
        with imports.kept(tmp_path, "x"):
            found, rest = re.Scanner([("a", lambda scanner, text: text * 2)]).scan("aab")  # type: ignore[attr-defined]
        assert (found, rest) == (["aa", "aa"], "b")


def test_what_is_told_of_an_expression_is_told_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with imports.kept(tmp_path, "x"):
            compiled("ab", re.DEBUG)
        assert "LITERAL 97" in capsys.readouterr().out


def otherwise_pattern(p: Any, flags: int = 0) -> Any:
    """Python's own, as another one may write it: with a function beside it."""
    return THEIRS(p, flags)


def otherwise_arguments(p: Any, flags: int = 0) -> Any:
    parsed = _parser.parse(p, flags)  # type: ignore[name-defined]  # noqa: F821  of where it is put
    return _sre.compile(p, flags | parsed.state.flags, [], 0)  # type: ignore[name-defined]  # noqa: F821


def otherwise_meant(p: Any, flags: int = 0) -> Any:
    """What is handed over is made into another expression."""
    made = _sre.compile(p, 32, [1], 0, {}, (None,))  # type: ignore[name-defined]  # noqa: F821
    return made if type(made) is tuple else THEIRS(p, flags)


class Callable_:  # noqa: N801
    def __call__(self, p: Any, flags: int = 0) -> Any:
        return THEIRS(p, flags)


THEIRS = re._compiler.compile  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "theirs", [otherwise_pattern, otherwise_arguments, otherwise_meant, Callable_(), lambda p, flags=0: 1]
)
def test_where_python_translates_in_another_way_it_is_left_to_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: Callable[..., Any]
) -> None:
    if isinstance(theirs, types.FunctionType):  # of that module
        theirs = types.FunctionType(theirs.__code__, vars(re._compiler), argdefs=(0,))  # type: ignore[attr-defined]
    monkeypatch.setattr(re._compiler, "THEIRS", THEIRS, raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(re._compiler, "compile", theirs)  # type: ignore[attr-defined]
    with imports.kept(tmp_path, "x"):
        assert re._compiler.compile is theirs  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


# --- Which module a frame is of ---------------------------------------------------------------------------------------


def a_frame() -> types.FrameType:
    frame = inspect.currentframe()
    assert frame is not None
    return frame


def frame_of(names: dict[str, Any], file: str = "<string>") -> Any:
    """The frame of code that was run with these names."""
    exec(compile("import inspect\ndef f():\n    return inspect.currentframe()\nframe = f()", file, "exec"), names)
    return names["frame"]


ASKED_OF: list[Callable[[], Any]] = [
    a_frame,
    lambda: Path.cwd.__func__,  # type: ignore[attr-defined]
    lambda: test_behind_it_all_is_as_it_was,
    lambda: test_behind_it_all_is_as_it_was.__code__,
    lambda: Path,
    lambda: len,
    lambda: sys,
    lambda: imports,
    lambda: 1,
    lambda: imports.Store.asked,
    lambda: frame_of({}),
    lambda: frame_of({"__name__": "not there"}),
    lambda: frame_of({"__name__": "os"}),
    lambda: frame_of({"__name__": None}),
    lambda: frame_of({"__name__": []}),
    lambda: frame_of({"__name__": "os"}, os.__file__),
    lambda: frame_of({"__name__": "os", "__file__": "not there.py"}, "not there.py"),
    lambda: frame_of(vars(types.ModuleType("os")), os.__file__),
    lambda: frame_of(dict(vars(os)), os.__file__),
    lambda: frame_of(vars(sys.modules[__name__]), os.__file__),
    lambda: frame_of(vars(sys.modules[__name__])),
    lambda: frame_of(vars(sys.modules[__name__]), "not there.py"),
]


@pytest.mark.parametrize("of", ASKED_OF)
def test_what_is_asked_of_it_is_answered_as_ever(of: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "frame", None)  # to be put back
    asked = of()
    alone = inspect.getmodule(asked)
    with imports.kept(None, "x"):
        assert inspect.getmodule(asked) is alone
        assert inspect.getmodule(object=asked) is alone


def test_a_module_that_is_gone_has_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = a_frame()
    monkeypatch.setitem(sys.modules, __name__, None)  # type: ignore[arg-type]
    alone = inspect.getmodule(frame)
    with imports.kept(None, "x"):
        assert inspect.getmodule(frame) is alone


def test_a_frames_module_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect, "getmodule", no_need)
    with imports.kept(None, "x"):
        assert inspect.getmodule(a_frame()) is sys.modules[__name__]


def test_to_ask_of_nothing_is_refused_as_ever() -> None:
    with imports.kept(None, "x"), pytest.raises(TypeError, match="object"):
        inspect.getmodule()  # type: ignore[call-arg]


# --- Which distribution has which package -----------------------------------------------------------------------------


def install(folder: Path, name: str, *packages: str, kind: str = "dist-info") -> None:
    about = folder / f"{name}-1.0.{kind}"
    about.mkdir(parents=True)
    facts = "METADATA" if kind == "dist-info" else "PKG-INFO"
    (about / facts).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "top_level.txt").write_text("\n".join(packages))


DISTRIBUTIONS = """
import importlib.metadata
read = []
theirs = importlib.metadata.distributions
importlib.metadata.distributions = lambda *given, **more: read.append(1) or theirs(*given, **more)
found = importlib.metadata.packages_distributions()
say([type(found).__name__, found["a"][:], found["b"][:], len(found)])
found["a"].append("mine")
found["mine"] = []
say([importlib.metadata.packages_distributions()["a"], len(read)])
"""


def test_it_is_looked_for_once_by_whoever_keeps_it(site: Site) -> None:
    install(site.path, "first", "a", "b")
    install(site.path, "second", "a", kind="egg-info")
    [about, again] = site.said(DISTRIBUTIONS, keeps=False)
    assert (about[0], sorted(about[1]), about[2], again) == ("dict", ["first", "second"], ["first"], [about[1], 2])
    assert site.said(DISTRIBUTIONS) == [about, [about[1], 1]]
    assert site.said(DISTRIBUTIONS) == [about, [about[1], 0]]


@pytest.mark.parametrize("kind", ["dist-info", "egg-info"])
def test_it_is_looked_for_again_when_something_is_installed(site: Site, kind: str) -> None:
    install(site.path, "first", "a", "b")
    site.start(DISTRIBUTIONS)
    install(site.path, "second", "a", kind=kind)
    about, again = site.said(DISTRIBUTIONS)
    assert (sorted(about[1]), about[2], again[1]) == (["first", "second"], ["first"], 1)
    assert site.said(DISTRIBUTIONS)[1][1] == 0


def test_so_it_is_when_something_is_installed_anew(site: Site) -> None:
    install(site.path, "first", "b")
    install(site.path, "second", "a")
    site.start(DISTRIBUTIONS)
    before = site.path.stat().st_mtime_ns
    shutil.rmtree(site.path / "second-1.0.dist-info")
    install(site.path, "second", "a", "b")
    later(site.path / "second-1.0.dist-info")
    os.utime(site.path, ns=(before, before))
    about, again = site.said(DISTRIBUTIONS)
    assert (about[1], sorted(about[2]), again[1]) == (["second"], ["first", "second"], 1)


def test_so_it_is_when_something_has_another_name(site: Site) -> None:
    install(site.path, "first", "a", "b")
    site.start(DISTRIBUTIONS)
    about = (site.path / "first-1.0.dist-info").rename(site.path / "other-1.0.dist-info") / "METADATA"
    about.write_text(about.read_text().replace("first", "other"))
    found, again = site.said(DISTRIBUTIONS)
    assert (found[1], again[1]) == (["other"], 1)


def test_what_is_installed_here_is_found(site: Site) -> None:
    install(site.path / "here", "first", "a", "b")
    before = "import os, sys\nos.chdir(site / 'here')\nsys.path.append('')"
    site.start(DISTRIBUTIONS, before=before)
    install(site.path / "here", "second", "a")
    found, again = site.said(DISTRIBUTIONS, before=before)
    assert (sorted(found[1]), again[1]) == (["first", "second"], 1)


def test_a_path_that_leads_nowhere_is_passed_over(site: Site) -> None:
    install(site.path, "first", "a", "b")
    site.write("file.zip", "none")
    before = "import sys\nsys.path += ['', '/not/there', str(site / 'file.zip')]"
    for read in (1, 0):
        about, again = site.said(DISTRIBUTIONS, before=before)
        assert (about[1:3], again[1]) == ([["first"], ["first"]], read)


def test_what_else_is_in_the_path_is_left_to_python(site: Site) -> None:
    install(site.path, "first", "a", "b")
    before = "import pathlib, sys\nsys.path.append(pathlib.Path('/'))"
    for _ in range(2):
        about, _ = site.said(DISTRIBUTIONS, before=before)
        assert about[1:3] == [["first"], ["first"]]


# --- What transformers lists, and what Triton's hash of itself is -----------------------------------------------------

FOUND = {frozenset[str](): {"b.c": {"C", "D"}, "a": {"A"}}, frozenset({"torch", "vision"}): {"a": {"B"}}}
LISTS = f"""
CALLS = []

def define_import_structure(module_path, prefix=None):
    "Theirs."
    CALLS.append([str(module_path), prefix])
    return {FOUND!r}
"""
LISTED = f"""
import transformers.utils.import_utils as module
found = [module.define_import_structure("x"), module.define_import_structure(Path("x"), prefix="models")]
found[0][frozenset()]["mine"] = {{"M"}}  # as who asks does
found[1][frozenset()]["a"].add("M")
assert module.define_import_structure(Path("x"), prefix="models") == {FOUND!r}
say(len(module.CALLS))
say([module.define_import_structure.__name__, module.define_import_structure.__doc__])
"""
THEIR_NAME = ["define_import_structure", "Theirs."]


def stand_in_transformers(site: Site) -> None:
    """The real one is in `tests/integration/test_imports.py`."""
    for name in ("__init__.py", "utils/__init__.py", "models/__init__.py", "models/a/__init__.py"):
        site.write(f"transformers/{name}")
    site.write("transformers/utils/import_utils.py", LISTS)
    install(site.path, "transformers", "transformers")


def listed(site: Site, **more: Any) -> int:
    """How often a start that asks thrice, of two things, has it looked for."""
    calls, name = site.said("from pathlib import Path\n" + LISTED, **more)
    assert name == THEIR_NAME
    return int(calls)


@pytest.fixture
def transformers(site: Site) -> Path:
    stand_in_transformers(site)
    return site.path / "transformers"


@pytest.mark.usefixtures("transformers")
def test_what_transformers_found_once_is_not_looked_for_again(site: Site) -> None:
    assert listed(site, keeps=False) == 3
    assert [listed(site) for _ in range(2)] == [2, 0]
    assert len(list(site.folder.iterdir())) == 1


@pytest.mark.usefixtures("transformers")
def test_each_thing_that_it_is_asked_for_is_another_one(site: Site) -> None:
    ask = """
import transformers.utils.import_utils as module
for given, more in [(("x",), {}), (("y",), {}), (("x",), {"prefix": "a"}), (("x", "a"), {}), (("x", "prefix=a"), {})]:
    module.define_import_structure(*given, **more)
say(module.CALLS)
"""
    asked = [["x", None], ["y", None], ["x", "a"], ["x", "a"], ["x", "prefix=a"]]
    assert [site.said(ask) for _ in range(2)] == [[asked], [[]]]


@pytest.mark.parametrize("what", ["version", "time", "size", "models"])
def test_of_another_transformers_nothing_is_kept_yet(site: Site, transformers: Path, what: str) -> None:
    listed(site)
    if what == "version":
        about = site.path / "transformers-1.0.dist-info"
        about.rename(about.with_name("transformers-1.1.dist-info"))
    elif what == "time":
        changed(transformers / "utils" / "import_utils.py", LISTS)
    elif what == "size":
        changed(transformers / "utils" / "import_utils.py", f"{LISTS}\n", after_s=0)
    else:
        (transformers / "models" / "another").mkdir()
    assert [listed(site) for _ in range(2)] == [2, 0]


def test_nor_is_it_of_one_in_another_place(site: Site, transformers: Path) -> None:
    before = "import sys\nsys.path.append(str(site / 'more'))"
    listed(site, before=before)
    (site.path / "more").mkdir()
    transformers.rename(site.path / "more" / "transformers")
    assert [listed(site, before=before) for _ in range(2)] == [2, 0]


def test_bytecode_makes_no_other_transformers_of_it(site: Site, transformers: Path) -> None:
    shutil.rmtree(transformers / "models" / "__pycache__", ignore_errors=True)
    listed(site)
    (transformers / "models" / "__pycache__").mkdir(exist_ok=True)
    assert listed(site) == 0


def test_where_nobody_knows_which_transformers_it_is_it_looks_itself(site: Site, transformers: Path) -> None:
    shutil.rmtree(transformers / "models")
    assert [listed(site) for _ in range(2)] == [3, 3]


def test_a_transformers_that_is_made_otherwise_is_its_own(site: Site, transformers: Path) -> None:
    (transformers / "utils" / "import_utils.py").write_text("")
    use = "import transformers.utils.import_utils as module\nsay(hasattr(module, 'define_import_structure'))"
    assert site.said(use) == site.said(use) == [False]


def test_what_it_finds_in_another_form_it_looks_for_each_time(site: Site, transformers: Path) -> None:
    source = LISTS.replace(f"return {FOUND!r}", "return type('Another', (dict,), {})(a=1)")
    (transformers / "utils" / "import_utils.py").write_text(source)
    use = """
import transformers.utils.import_utils as module
say([type(module.define_import_structure("x")).__name__, len(module.CALLS)])
"""
    assert site.said(use) == site.said(use) == [["Another", 1]]


def test_a_fault_of_transformers_is_its_own(site: Site, transformers: Path) -> None:
    (transformers / "utils" / "import_utils.py").write_text("raise ImportError('no torch')")
    use = "try:\n import transformers.utils.import_utils\nexcept ImportError as exc:\n say(str(exc))"
    assert site.said(use) == site.said(use) == ["no torch"]


@pytest.mark.usefixtures("transformers")
def test_where_it_is_imported_already_nothing_is_in_its_way(site: Site) -> None:
    assert listed(site, before="import transformers.utils.import_utils") == 3


@pytest.mark.usefixtures("transformers")
def test_behind_the_start_it_looks_itself(site: Site) -> None:
    behind = """
calls = len(module.CALLS)
assert module.define_import_structure("x") == module.define_import_structure("x")
say(len(module.CALLS) - calls)
"""
    for _ in range(2):
        assert site.said("from pathlib import Path\n" + LISTED, behind=behind)[2] == 2


@pytest.mark.usefixtures("transformers")
def test_what_is_run_once_more_looks_itself(site: Site) -> None:
    use = """
import transformers.utils.import_utils as module
module.__loader__.exec_module(module)
say(module.define_import_structure.__code__.co_filename == module.__file__)
"""
    assert site.said(use) == site.said(use) == [True]


HASH = """
import functools
CALLS = []

@functools.lru_cache()
def triton_key():
    CALLS.append(1)
    return "hash"
"""
HASHED = """
import triton.runtime.cache as module
say([module.triton_key(), module.triton_key(), len(module.CALLS)])
"""
HASHES = [["hash", "hash", 1]], [["hash", "hash", 0]]


def stand_in_triton(site: Site) -> None:
    names = "__init__", "runtime/__init__", "compiler/code", "backends/one/driver", "language/extra/libdevice"
    for name in names:
        site.write(f"triton/{name}.py", "# here")
    site.write("triton/runtime/cache.py", HASH)
    site.write("triton/_C/libtriton.so", "machine code")


def test_what_triton_is_is_worked_out_once(site: Site) -> None:
    stand_in_triton(site)
    behind = f"{HASHED}module.triton_key.cache_clear()"
    assert site.said(HASHED, behind=behind, keeps=False) == HASHES[0] * 2
    assert [site.said(HASHED, behind=behind) for _ in range(2)] == [HASHES[0] * 2, HASHES[1] * 2]


def test_of_another_triton_it_is_worked_out_anew(site: Site) -> None:
    stand_in_triton(site)
    site.start(HASHED)
    files = {file for file in (site.path / "triton").rglob("*") if file.suffix in (".py", ".so")}
    files.remove(site.path / "triton" / "runtime" / "__init__.py")
    assert len(files) == 6
    for file, (more, after_s) in zip(files, itertools.cycle([("", 10), ("\n", 0)]), strict=False):
        changed(file, file.read_text() + more, after_s=after_s)
        assert site.said(HASHED) == HASHES[0], (file, more, after_s)
    site.write("triton/backends/another/driver.py")
    assert [site.said(HASHED) for _ in range(2)] == [*HASHES]


def test_a_link_to_nothing_is_no_file_of_it(site: Site) -> None:
    stand_in_triton(site)
    (site.path / "triton" / "language" / ".#open.py").symlink_to("somebody@somewhere:1")
    assert [site.said(HASHED) for _ in range(2)] == [*HASHES]


def test_a_triton_that_is_made_otherwise_is_its_own(site: Site) -> None:
    stand_in_triton(site)
    site.write("triton/runtime/cache.py")
    use = "import triton.runtime.cache as module\nsay(hasattr(module, 'triton_key'))"
    assert site.said(use) == site.said(use) == [False]
