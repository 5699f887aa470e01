"""The images' recipes: what can be known of them where nothing can be built."""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.deploy.compose import ROOT

from vidgen.local.process import find_program

DOCKER = ROOT / "deploy" / "docker"
GATEWAY, WORKER = DOCKER / "gateway.Dockerfile", DOCKER / "worker.Dockerfile"
WORKFLOW = ROOT / ".github" / "workflows" / "images.yml"
LAYERS = runpy.run_path(str(DOCKER / "layers.py"))
packed: Callable[..., list[list[str]]] = LAYERS["packed"]


def run(program: str, *arguments: object) -> str:
    """What a checker says: nothing, where all is well."""
    found = find_program(program)
    assert found is not None, f"{program} is missing: pip install -e '.[test]'"
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr


def stages(path: Path) -> dict[str, str]:
    """A Dockerfile's stages: their lines, without comments, by name; the last one is `` where it has none."""
    text = re.sub(r"^#.*\n", "", path.read_text("utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    return {(re.match(r"\S+(?: AS (\S+))?", part) or [""])[1] or "": part for part in parts}


def test_the_recipes_are_clean() -> None:
    assert run("hadolint", GATEWAY, WORKER) == ""


@pytest.mark.parametrize("path", [GATEWAY, WORKER], ids=lambda path: path.stem)
def test_every_base_is_pinned(path: Path) -> None:
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", path.read_text("utf-8"), re.MULTILINE))
    known = stages(path)
    for line in known.values():
        base = re.sub(r"\$\{(\w+)\}", lambda name: defaults[name[1]], line.split()[0])
        assert base in known or re.search(r":\d+\.\d+\.\d+-", base)


@pytest.mark.parametrize("path", [GATEWAY, WORKER], ids=lambda path: path.stem)
def test_what_is_built_unasked_runs_without_rights_and_without_weights(path: Path) -> None:
    found = stages(path)
    last = found[""]
    recipe = found.get(last.split()[0], last)
    assert re.findall(r"^USER (\S+)$", recipe, re.MULTILINE) == ["10001:10001"]
    assert "/scratch/layers" not in recipe
    assert re.search(r"^CMD \[", recipe, re.MULTILINE)


@pytest.mark.parametrize("path", [GATEWAY, WORKER], ids=lambda path: path.stem)
def test_whatever_a_service_imports_has_its_bytecode_in_the_image(path: Path) -> None:
    """It may not write any, and without it the imports of a GPU service take about twice as long."""
    found = stages(path)
    assert "UV_COMPILE_BYTECODE=1" in found["build"]
    for stage in found.values():
        for line in (line for line in stage.splitlines() if line.startswith("RUN ")):
            assert "--no-compile" not in line
            if "uv pip install" in line and "/wheels" in line:  # where that variable is not set
                assert "--compile-bytecode" in line
            if "/src/build.py" in line:
                assert "-m compileall" in line


def test_a_token_is_only_ever_a_mounted_file() -> None:
    text = re.sub(r"^#.*\n", "", WORKER.read_text("utf-8"), flags=re.MULTILINE)
    assert not re.search(r"(?i)^(?:ARG|ENV)\b.*token", text, re.MULTILINE)
    (step,) = [line for line in text.replace("\\\n", " ").splitlines() if "token" in line]
    assert "--mount=type=secret,id=hf-token,target=/run/secrets/hf-token" in step
    assert "HF_TOKEN_PATH=/run/secrets/hf-token" in step
    assert "token" not in stages(WORKER)["baked"]


def test_the_hubs_client_reads_a_token_from_that_variables_file(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")  # no attribute of the package until it is imported
    (tmp_path / "token").write_text("hf_from_the_file\n")
    (tmp_path / "none").write_text((DOCKER / "no-token").read_text())
    with pytest.MonkeyPatch.context() as patched:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            patched.delenv(name, raising=False)
        patched.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        assert hub.get_token() == "hf_from_the_file"
        patched.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert hub.get_token() is None


def test_every_layer_of_the_weights_is_copied() -> None:
    copied = re.findall(
        r"^COPY --from=weights /scratch/layers/(\d+)/ /models/\$\{STAGE\}/$", stages(WORKER)["baked"], re.M
    )
    assert copied == [f"{number:02}" for number in range(LAYERS["LAYERS"])]
    assert LAYERS["LIMIT"] <= 10_000_000_000


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 40), max_size=30), st.integers(1, 8), st.integers(1, 40))
def test_every_file_is_in_one_layer_and_none_is_too_large(sizes: dict[str, int], layers: int, limit: int) -> None:
    try:
        found = packed(sizes, layers, limit)
    except ValueError:
        assert max(sizes.values()) > limit or sum(sizes.values()) * 2 > layers * limit
        return
    assert sorted(name for layer in found for name in layer) == sorted(sizes)
    assert len(found) == layers
    assert all(sum(sizes[name] for name in layer) <= limit for layer in found)
    assert found == packed(dict(reversed(sizes.items())), layers, limit)


def test_a_file_that_fits_nowhere_is_named() -> None:
    with pytest.raises(ValueError, match=r"^b \(11 bytes\) does not fit into 2 layers of 10 bytes: keep the weights"):
        packed({"a": 5, "b": 11}, 2, 10)


def test_a_model_is_moved_into_its_layers_without_the_clients_notes(tmp_path: Path) -> None:
    model, made = tmp_path / "model", tmp_path / "layers"
    for name in ("model_index.json", "transformer/one.safetensors", ".cache/huggingface/note"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(name)
    LAYERS["main"](model, made)
    found = [path.relative_to(made) for path in sorted(made.rglob("*")) if path.is_file()]
    assert [str(path) for path in found] == ["00/model_index.json", "00/transformer/one.safetensors"]
    assert len(list(made.iterdir())) == LAYERS["LAYERS"]


def test_what_is_built_from_is_named_and_holds_no_secrets() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").split()
    wanted = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert all((ROOT / path).exists() for path in wanted)
    copied = {
        source
        for path in (GATEWAY, WORKER)
        for sources in re.findall(r"^COPY ((?!--)\S.*) \S+$", path.read_text("utf-8"), re.MULTILINE)
        for source in sources.split()
    }
    assert copied == set(wanted)


def test_the_workflow_is_valid_and_asks_for_little() -> None:
    workflows = sorted(WORKFLOW.parent.glob("*.yml"))
    said = run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    assert said.strip() == "ok -- validation done"
    workflow = yaml.safe_load(WORKFLOW.read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    assert workflow["permissions"] == {}
    assert job["permissions"] == {"contents": "read", "packages": "write"}
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in job["steps"] if "uses" in step)
    assert {one["file"] for one in job["strategy"]["matrix"]["include"]} == {
        str(path.relative_to(ROOT)) for path in (GATEWAY, WORKER)
    }


def test_only_what_was_scanned_is_pushed_with_its_provenance() -> None:
    (job,) = yaml.safe_load(WORKFLOW.read_text("utf-8"))["jobs"].values()
    names = [step["name"] for step in job["steps"]]
    assert names.index("Build") < names.index("Scan") < names.index("Push")
    steps = {step["name"]: step for step in job["steps"]}
    assert steps["Scan"]["with"]["image"] == steps["Build"]["with"]["tags"]
    assert steps["Push"]["with"]["provenance"] == "mode=max"
    assert steps["Push"]["with"]["sbom"] is True
    for name in ("Log in to the registry", "Push"):
        assert steps[name]["if"] == "github.event_name == 'push'"
