"""Nothing that comes from outside is ever run: no pickles, no code of model repositories, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("shared", "services", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"torch.load", "torch.hub.load", "np.load", "numpy.load", "yaml.load", "eval", "exec", "os.system", "os.popen"}
# The arguments of a process of our own, through a pipe that nobody else has.
OWN_PROCESS = "shared/vidgen/accel/guidance.py"
# Bytecode, which Python reads by marshal as well: from the folder in which torch and Triton keep programs, if it is
# this user's own.
OWN_BYTECODE = {"shared/vidgen/kept.py": {"marshal"}, "shared/vidgen/imports.py": {"exec"}}

AUDIT = ROOT / ".github" / "workflows" / "audit.yml"


def dangers(tree: ast.AST) -> Iterator[str]:
    """What in a source could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in RUNS_WHAT_IT_READS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_WHAT_IT_READS:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield ast.unparse(node.func)
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and not off:
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg == "weights_only" or (keyword.arg == "use_safetensors" and off):
                    yield str(keyword.arg)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "f(trust_remote_code=True)",
        "f(trust_remote_code=trusted)", "np.load(f, allow_pickle=True)", "f(use_safetensors=False)", "eval(text)",
        "subprocess.run(line, shell=True)",
    ],
)  # fmt: skip
def test_the_check_sees_what_it_is_for(source: str) -> None:
    assert list(dangers(ast.parse(source)))


def test_no_source_runs_what_it_reads() -> None:
    found = {str(path.relative_to(ROOT)): set(dangers(ast.parse(path.read_text("utf-8")))) for path in SOURCES}

    told = {OWN_PROCESS: {"pickle"}} | OWN_BYTECODE
    assert {path: what for path, what in found.items() if what} == told


def test_wherever_a_pipeline_is_loaded_code_of_its_repository_is_refused() -> None:
    """`trust_remote_code` is written out where it matters: a default may change."""
    loads = [
        node
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipeline.from_pretrained"
    ]

    assert loads
    assert all("trust_remote_code" in {keyword.arg for keyword in node.keywords} for node in loads)


def test_dependencies_are_audited_each_week_and_with_each_change_of_them() -> None:
    workflow = yaml.safe_load(AUDIT.read_text("utf-8"))
    (job,) = workflow["jobs"].values()

    assert "constraints.txt" in workflow["on"]["pull_request"]["paths"]
    assert workflow["on"]["schedule"]
    assert (workflow["permissions"], job["permissions"]) == ({}, {"contents": "read"})
    assert job["steps"][-1]["run"] == "make audit"
    recipe = (ROOT / "Makefile").read_text("utf-8").split("\naudit:")[1].split("\n\n")[0]
    assert "--strict" in recipe
    assert "-r constraints.txt" in recipe
