"""The docs name what is there, and all of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from fastapi.routing import APIRoute

from gateway import plan
from gateway.api.app import ROUTERS
from vidgen import contracts, metrics, settings, topology
from vidgen.cli import app as cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/**/*.md")])
REFERENCE = ROOT / "docs" / "reference.md"
REQUESTS = ROOT / "docs" / "requests.md"
SOURCES = [path for folder in ("shared", "services") for path in sorted((ROOT / folder).rglob("*.py"))]

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:shared|services|tests|docs|examples|benchmarks|\.ci)/[\w./-]*|[\w.-]+\.(?:md|toml|txt)|Makefile")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
VARIABLE = re.compile(r"\bVIDGEN_[A-Z0-9]+(?:_[A-Z0-9]+)*\b")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def section(title: str) -> str:
    """One section of the reference."""
    return REFERENCE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]


def spans(title: str) -> set[str]:
    return set(SPAN.findall(section(title)))


# ── every page ───────────────────────────────────────────────────────────────────────────────────────────────────


@pages
def test_every_path_and_test_that_is_named_exists(page: Path) -> None:
    missing = []
    for span in SPAN.findall(prose(page)):
        path, _, test = span.partition("::")
        if PATH.fullmatch(path):
            file = ROOT / path
            if not file.exists() or (test and f"def {test}(" not in file.read_text(encoding="utf-8")):
                missing.append(span)

    assert not missing


@pages
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in filter(None, (one for found in LINK.findall(prose(page)) for one in found)):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)

    assert not broken


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_has_vidgen_installed_by_its_name(file: Path) -> None:
    """On PyPI that is another project's."""
    assert not re.search(r"""install ['"]?vidgen\b""", file.read_text(encoding="utf-8"))


@pages
def test_every_variable_that_is_named_is_read_somewhere(page: Path) -> None:
    kinds = (settings.Settings, settings.GatewaySettings, settings.WorkerSettings)
    known = {f"VIDGEN_{name.upper()}" for kind in kinds for name in kind.model_fields}
    known |= {str(option.envvar) for _, command in commands() for option in command.params if option.envvar}
    known |= {stream.name for stream in topology.STREAMS}

    assert set(VARIABLE.findall(page.read_text(encoding="utf-8"))) <= known


@pages
def test_no_page_promises_what_is_still_to_do(page: Path) -> None:
    assert not re.findall(r"\b(?:TODO|FIXME|TBD)\b", page.read_text(encoding="utf-8"))


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("begin", "end", "table", "module"),
    [
        (metrics.BEGIN, metrics.END, metrics.reference_table, "vidgen.metrics"),
        (settings.BEGIN, settings.END, settings.reference_table, "vidgen.settings"),
    ],
)
def test_the_generated_tables_are_in_step(begin: str, end: str, table: Callable[[], str], module: str) -> None:
    between = REFERENCE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]

    assert between.strip() == table().strip(), f"run: python -m {module} docs/reference.md"


@pytest.mark.parametrize("kind", [kind for _, kind in settings.GROUPS])
def test_every_setting_says_what_it_is_for(kind: type[settings.Settings]) -> None:
    assert [name for name, field in kind.model_fields.items() if not field.description] == []


def commands(command: Any = None, name: str = "vidgen") -> Iterator[tuple[str, Any]]:
    """Every command with its full name, and the root."""
    command = command or typer.main.get_command(cli)
    yield name, command
    for part, child in getattr(command, "commands", {}).items():
        yield from commands(child, f"{name} {part}")


def test_every_command_and_option_is_listed() -> None:
    listed = section("Command line")
    rows = {name: f"`{name}" for name, _ in commands()}
    options = {
        max(option.opts, key=len) for _, command in commands() for option in command.params if "--" in str(option.opts)
    }

    assert [name for name, row in rows.items() if row not in listed] == []
    assert sorted(option for option in options if option not in listed) == []


def test_every_route_is_listed_and_no_other() -> None:
    served = {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods
    }
    listed = {span for span in spans("HTTP") if re.match(r"(?:GET|POST|PUT|DELETE) /", span)}

    assert listed == served


def codes_of(tree: ast.AST) -> Iterator[str]:
    """The error codes in a source: `code = "…"` in a class, `code="…"` in a call, the second argument of the edge's."""
    for node in ast.walk(tree):
        found: list[ast.expr] = []
        if isinstance(node, ast.ClassDef):
            assigned = [part for part in node.body if isinstance(part, ast.Assign)]
            found += [part.value for part in assigned if ast.unparse(part.targets[0]) == "code"]
        elif isinstance(node, ast.Call):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            if ast.unparse(node.func).rpartition(".")[2] in ("HttpError", "document"):
                found += node.args[1:2]
            if ast.unparse(node.func).endswith(".fail"):
                found += node.args[:1]
        yield from (one.value for one in found if isinstance(one, ast.Constant) and isinstance(one.value, str))


def test_every_error_code_is_listed_and_no_other() -> None:
    raised = {code for path in SOURCES for code in codes_of(ast.parse(path.read_text(encoding="utf-8")))}
    rows = [line.split("|")[1] for line in section("Error codes").splitlines() if line.startswith("| `")]
    listed = {code for row in rows for code in SPAN.findall(row)}

    assert listed == raised


def test_everything_on_the_bus_is_listed() -> None:
    names = {stream.name for stream in topology.STREAMS} | {bucket.name for bucket in topology.BUCKETS}
    names |= {consumer.name for consumer in topology.CONSUMERS}
    types = {kind.model_fields["type"].default for kind in get_args(contracts.AnyEvent)}

    assert (names | types) - spans("On the bus") == set()


def test_qualities_and_presets_are_listed_as_they_are() -> None:
    presets = {*get_args(contracts.Background), *get_args(contracts.Style), *get_args(contracts.Viewpoint)}
    text = section("Qualities and presets")

    assert presets - spans("Qualities and presets") == set()
    for quality in get_args(contracts.Quality):
        edit, i2v = plan.EDIT_EFFORT[quality], plan.I2V_EFFORT[quality]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{quality}`"))
        cells = [cell.strip().split(" ")[0] for cell in row.split("|")[2:5]]
        assert [float(cell) for cell in cells] == [edit.steps, edit.guidance, i2v.guidance]
        assert edit.steps == i2v.steps


# ── the public subject ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["publish.py", "publish.mjs", "package.json", "receive.py", "receive.mjs"])
def test_the_page_on_requests_shows_the_examples_as_they_are(name: str) -> None:
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")

    assert f"\n{source}```\n" in REQUESTS.read_text(encoding="utf-8")
