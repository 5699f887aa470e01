"""Which workers the embedded stack has: two services, or one process for both stages where there is a GPU for it."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from vidgen import gpu, weights
from vidgen.contracts import GpuFigures, Stage
from vidgen.local import S3Server, Stack, servers
from vidgen.local.process import LocalError

H200 = GpuFigures(index=0, uuid="GPU-aaaa", name="NVIDIA H200")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENGINE", "DEVICE", "EDIT_MODEL", "I2V_MODEL"):
        monkeypatch.delenv(f"VIDGEN_{name}", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A machine with a GPU; the models whose weights are there."""
    here = {"models/edit", "models/i2v"}
    monkeypatch.setattr(gpu, "visible", lambda: (H200,))
    monkeypatch.setattr(weights, "why_not", lambda model, revision, *, gpu: None if model in here else "not here")
    return here


def workers(folder: Path, *stages: Stage, **env: str) -> list[tuple[str, str, tuple[str, ...]]]:
    models = {"VIDGEN_EDIT_MODEL": "models/edit", "VIDGEN_I2V_MODEL": "models/i2v"}
    stack = Stack(folder, env=models | env, stages=stages or ("edit", "i2v"), workers=1)
    return [(name, module, tuple(arguments)) for name, module, arguments in stack._kinds()]


SERVICES = [("edit-service", "edit_service.main", ()), ("i2v-service", "i2v_service.main", ())]


@pytest.mark.usefixtures("machine")
def test_a_gpu_with_the_weights_of_both_models_has_one_worker(tmp_path: Path) -> None:
    assert workers(tmp_path) == [("worker", "vidgen.cli", ("worker", "--stages", "edit,i2v"))]
    assert workers(tmp_path, VIDGEN_ENGINE="real") == workers(tmp_path)
    assert workers(tmp_path, VIDGEN_PROFILE="", VIDGEN_ENGINE="") == workers(tmp_path)  # empty is not set


def test_without_the_weights_of_one_there_are_two_services(tmp_path: Path, machine: set[str]) -> None:
    machine.remove("models/i2v")
    assert workers(tmp_path) == SERVICES


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "env", [{"VIDGEN_ENGINE": "preview"}, {"VIDGEN_DEVICE": "cpu"}, {"VIDGEN_ENGINE": "none of them"}]
)
def test_where_the_gpu_is_not_wanted_there_are_two_services(tmp_path: Path, env: dict[str, str]) -> None:
    assert workers(tmp_path, **env) == SERVICES


def test_without_a_gpu_there_are_two_services(
    tmp_path: Path, machine: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "visible", lambda: ())
    assert machine
    assert workers(tmp_path, VIDGEN_ENGINE="real") == SERVICES


@pytest.mark.usefixtures("machine")
def test_one_stage_has_its_service(tmp_path: Path) -> None:
    assert workers(tmp_path, "edit") == SERVICES[:1]


@pytest.mark.parametrize("lost", [True, False])
async def test_a_port_that_was_lost_is_found_above_all_that_ran_in_the_servers_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """SeaweedFS lists thirty lines of where it was behind the one that says why it ends."""
    server, chosen, held = S3Server(tmp_path), [], []
    why = "F1130 listen tcp 127.0.0.1:1: bind: address already in use" if lost else "F1130 the disk is full"

    async def starts(executable: str) -> None:
        chosen.append(server.endpoint)
        if len(chosen) == 1:
            held.append(socket.create_server(("127.0.0.1", urlsplit(server.endpoint).port or 0)))
            server.process.log.write_text("\n".join([why, *["goroutine 1 [running]:"] * 30]))
            raise LocalError("it ended before it was ready")

    monkeypatch.setattr(servers, "program", lambda name: name)
    monkeypatch.setattr(server, "_start", starts)
    if not lost:
        with pytest.raises(LocalError, match="ended before it was ready"):
            await server.start()
        held[0].close()
        assert len(chosen) == 1
        return
    await server.start()
    held[0].close()
    assert len(set(chosen)) == 2
