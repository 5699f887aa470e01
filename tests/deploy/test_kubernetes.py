"""The manifests: every combination is valid, its names are ours, and KEDA would start as many GPUs as is meant."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx
import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from tests.servers import held_ports, skipped_at_home

import vidgen
from gateway.api import ops
from vidgen import bootstrap, credentials, errors, handler, jetstream, metrics, probes, settings, topology
from vidgen.cli import app as cli
from vidgen.contracts import LANES, STAGES, Lane, Stage
from vidgen.identities import Identities
from vidgen.jetstream import JetStreamBus
from vidgen.local import NatsServer

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
SCHEMAS = Path(__file__).parent / "schemas"
ALERTS = ROOT / "deploy" / "monitoring" / "alerts.yml"
VALUES = yaml.safe_load((K8S / "nats" / "values.yaml").read_text(encoding="utf-8"))

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
KUBERNETES = "1.34"
OPTIONAL = ("keda", "monitoring", "tracing", "warm-floor")
COMBINATIONS = [
    ("local", ()),
    ("local", ("tracing",)),
    ("local", ("keda", "monitoring")),
    ("gpu", ()),
    ("gpu", ("keda",)),
    ("gpu", ("monitoring",)),
    ("gpu", ("keda", "monitoring")),
    ("gpu", ("keda", "warm-floor")),
    ("gpu", ("keda", "warm-floor", "monitoring", "tracing")),
]
DECLARED = {"local": (), "gpu": ("keda", "monitoring")}
# Made by whoever installs, by the command in docs/operations.md.
SECRETS = {"identity-gateway", "identity-edit-service", "identity-i2v-service", "store", "hub", "webhooks"}
CLUSTER_WIDE = {"Namespace", "PriorityClass"}
TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT"
OTHER_VARIABLES = {"MODEL", "REVISION", "HF_TOKEN", "HF_HOME", "USER", "HOME"}
WORKERS = tuple(f"{stage}-service" for stage in STAGES)

combinations = pytest.mark.parametrize(
    ("overlay", "components"), COMBINATIONS, ids=lambda part: part if isinstance(part, str) else "+".join(part) or "-"
)

Manifest = dict[str, Any]


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────


def builder() -> list[str]:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl") is None and not os.environ.get("CI"):
        pytest.skip("neither kubectl (1.27 or later) nor kustomize (4.5.4 or later) is installed")
    return ["kubectl", "kustomize"]


@functools.cache
def built(overlay: str, components: tuple[str, ...]) -> list[Manifest]:
    """An overlay with these of the optional components in place of those that it declares."""
    command = builder()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(K8S, Path(folder) / "k8s"))
        file = copy / "overlays" / overlay / "kustomization.yaml"
        kustomization = yaml.safe_load(file.read_text(encoding="utf-8"))
        kept = [path for path in kustomization["components"] if Path(path).name not in OPTIONAL]
        kustomization["components"] = [*kept, *(f"../../components/{name}" for name in components)]
        file.write_text(yaml.safe_dump(kustomization), encoding="utf-8")
        made = subprocess.run([*command, str(file.parent)], capture_output=True, check=False, timeout=120)
    assert made.returncode == 0, made.stderr.decode()
    return list(yaml.load_all(made.stdout, LOADER))


def kinds(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] == kind}


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates by the name of their Deployment."""
    return {name: one["spec"]["template"] for name, one in kinds(manifests, "Deployment").items()}


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def variables(manifests: list[Manifest]) -> dict[str, str]:
    """What the services read from the ConfigMap."""
    return next(one["data"] for name, one in kinds(manifests, "ConfigMap").items() if name.startswith("settings-"))


# ── every combination ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("overlay", DECLARED)
def test_what_an_overlay_declares_is_among_what_is_tested(overlay: str) -> None:
    kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
    names = [Path(path).name for path in kustomization["components"]]

    assert tuple(name for name in names if name in OPTIONAL) == DECLARED[overlay]
    assert (overlay, DECLARED[overlay]) in COMBINATIONS
    assert {path.parent.name for path in (K8S / "components").glob("*/kustomization.yaml")} == {
        *OPTIONAL, "preview-engine",
    }  # fmt: skip


def check(manifest: Manifest) -> None:
    """Raise where the schema of the manifest's kind does not allow it, or a field is unknown."""
    _check(json.dumps(manifest, sort_keys=True))


@functools.cache  # most manifests are the same in all combinations
def _check(text: str) -> None:
    manifest = json.loads(text)
    schema = SCHEMAS / f"{manifest['kind'].lower()}.json"
    if schema.exists():
        jsonschema.validate(manifest, json.loads(schema.read_bytes()), jsonschema.Draft202012Validator)
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@combinations
def test_every_combination_is_valid_and_in_one_namespace(overlay: str, components: tuple[str, ...]) -> None:
    manifests = built(overlay, components)

    for manifest in manifests:
        check(manifest)
        assert (manifest["metadata"].get("namespace") == "vidgen") == (manifest["kind"] not in CLUSTER_WIDE)
    assert len(kinds(manifests, "ScaledObject")) == (len(STAGES) if "keda" in components else 0)
    assert bool(kinds(manifests, "PodMonitor")) == ("monitoring" in components)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ScaledObject", ("spec", "cooldownPeriods"), 300),
        ("ScaledObject", ("spec", "triggers", 0, "metadata", "consumr"), "edit-batch"),
        ("ScaledObject", ("spec", "advanced", "scalingModifiers", "target"), 15),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "interval"), "15"),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "ports"), "metrics"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "severity"), "page"),
        ("Deployment", ("spec", "template", "spec", "graceSeconds"), 1),
    ],
)
def test_the_schemas_refuse_what_is_misspelt(kind: str, path: tuple[str | int, ...], value: object) -> None:
    manifest = json.loads(json.dumps(next(iter(kinds(built("gpu", DECLARED["gpu"]), kind).values()))))
    part = manifest
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value

    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_a_rollout_keeps_what_the_autoscalers_decided() -> None:
    for name, deployment in kinds(built("gpu", DECLARED["gpu"]), "Deployment").items():
        assert "replicas" not in deployment["spec"], name


@combinations
def test_what_a_pod_names_is_there(overlay: str, components: tuple[str, ...]) -> None:
    manifests = built(overlay, components)
    there = {kind: set(kinds(manifests, kind)) for kind in ("ConfigMap", "PersistentVolumeClaim", "ServiceAccount")}
    there["Secret"], there["PriorityClass"] = SECRETS, set(kinds(manifests, "PriorityClass"))

    for name, pod in pods(manifests).items():
        wanted = [("ServiceAccount", pod["spec"]["serviceAccountName"])]
        wanted += [("PriorityClass", pod["spec"]["priorityClassName"])] if "priorityClassName" in pod["spec"] else []
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
            if "secret" in volume:
                wanted.append(("Secret", volume["secret"]["secretName"]))
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes), name
            for source in container.get("envFrom", []):
                wanted += [("ConfigMap", one["name"]) for key, one in source.items() if key == "configMapRef"]
                wanted += [("Secret", one["name"]) for key, one in source.items() if key == "secretRef"]
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {})
                wanted += [("ConfigMap", one["name"]) for key, one in source.items() if key == "configMapKeyRef"]
                wanted += [("Secret", one["name"]) for key, one in source.items() if key == "secretKeyRef"]
        assert [one for one in wanted if one[1] not in there[one[0]]] == [], name
    targets = [one["spec"]["scaleTargetRef"]["name"] for kind in ("ScaledObject", "HorizontalPodAutoscaler")
               for one in kinds(manifests, kind).values()]  # fmt: skip
    assert set(targets) <= set(pods(manifests))


# ── our names ────────────────────────────────────────────────────────────────────────────────────────────────────


@combinations
def test_every_variable_is_a_setting_that_the_services_accept(
    overlay: str, components: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = built(overlay, components)
    given = variables(manifests)
    every = (settings.Settings, settings.GatewaySettings, settings.WorkerSettings)
    known = {f"VIDGEN_{name.upper()}" for kind in every for name in kind.model_fields}

    assert set(given) - {TRACES} <= known
    for name in (*WORKERS, "gateway"):
        own = {variable["name"] for one in containers(pods(manifests)[name]) for variable in one.get("env", [])}
        assert own <= known | OTHER_VARIABLES
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    assert settings.read(settings.GatewaySettings).stream_replicas == (3 if overlay == "gpu" else 1)
    assert settings.read(settings.WorkerSettings).traces_url == (
        f"{given[TRACES]}/v1/traces" if "tracing" in components else None
    )
    assert settings.read(settings.WorkerSettings).engine == ("real" if overlay == "gpu" else "preview")


def test_three_servers_are_asked_for_three_replicas() -> None:
    assert variables(built("gpu", ()))["VIDGEN_STREAM_REPLICAS"] == str(VALUES["config"]["cluster"]["replicas"])


def test_nothing_secret_is_in_a_manifest() -> None:
    secret = {
        "VIDGEN_S3_ACCESS_KEY",
        "VIDGEN_S3_SECRET_KEY",
        "VIDGEN_NATS_NKEY_SEED",
        "VIDGEN_NATS_PASSWORD",
        "VIDGEN_WEBHOOK_SECRET",
        "HF_TOKEN",
    }
    for overlay, components in COMBINATIONS:
        manifests = built(overlay, components)
        assert not kinds(manifests, "Secret")
        for config in kinds(manifests, "ConfigMap").values():
            assert not secret & set(config["data"])
        for pod in pods(manifests).values():
            given = [variable for one in containers(pod) for variable in one.get("env", []) if "value" in variable]
            assert not secret & {variable["name"] for variable in given}


def test_images_have_the_version_of_the_package_and_no_tag_that_moves() -> None:
    for overlay, components in COMBINATIONS:
        for pod in pods(built(overlay, components)).values():
            for container in containers(pod):
                name, _, tag = container["image"].partition(":")
                assert tag == vidgen.__version__ if name.startswith("vidgen/") else re.fullmatch(r"\d+(\.\d+)+", tag)


def test_containers_run_our_programs() -> None:
    scripts = {one.name for one in importlib.metadata.entry_points(group="console_scripts") if one.dist is not None}
    for name, pod in pods(built("gpu", ())).items():
        theirs = [container for container in containers(pod) if container["command"][0] not in scripts]
        assert [container["command"] for container in theirs] in ([], [["mkdir", "-p", "/weights/compiled"]])
        for container in pod["spec"].get("initContainers", []):
            if container in theirs:
                continue
            command: Any = typer.main.get_command(cli)
            arguments = container["command"][1:]
            while hasattr(command, "commands"):
                command = command.commands[arguments.pop(0)]
            parsed = command.make_context(name, arguments).params
            assert (parsed["model"], parsed["revision"]) == ("$(MODEL)", "$(REVISION)")
            stage = name.removesuffix("-service").upper()
            (model,) = (
                one["value"] for one in pod["spec"]["containers"][0]["env"] if one["name"] == f"VIDGEN_{stage}_MODEL"
            )
            assert str(parsed["to"]) == model


async def test_probes_ask_what_is_served_where_it_is_served() -> None:
    manifests = built("gpu", ())
    given = variables(manifests)
    served = {"gateway": {route.path for route in ops.router.routes if hasattr(route, "path")}}
    serving = probes.serve("127.0.0.1", 0, healthy=lambda: True, ready=lambda: (True, ""), metrics=lambda: (b"", ""))
    async with serving as url, httpx.AsyncClient(base_url=url) as client:
        paths = ("/healthz", "/readyz", "/metrics")
        answered = [path for path in paths if (await client.get(path)).status_code == 200]
    served |= {name: set(answered) for name in WORKERS}

    for name, pod in pods(manifests).items():
        container = pod["spec"]["containers"][0]
        port = int(given["VIDGEN_HTTP_PORT" if name == "gateway" else "VIDGEN_METRICS_PORT"])
        assert [one["containerPort"] for one in container["ports"]] == [port]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in served[name]
            assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]
        # Alive is not ready: a worker that loads its model must not be killed for it.
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"


@pytest.mark.parametrize("monitor", ["gateway", "workers"])
def test_prometheus_is_sent_to_ports_that_have_metrics(monitor: str) -> None:
    manifests = built("gpu", ("monitoring",))
    found = kinds(manifests, "PodMonitor")[monitor]["spec"]
    wanted = found["selector"]["matchLabels"].items()
    chosen = {name: pod for name, pod in pods(manifests).items() if wanted <= pod["metadata"]["labels"].items()}

    assert set(chosen) == ({"gateway"} if monitor == "gateway" else set(WORKERS))
    for pod in chosen.values():
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in found["podMetricsEndpoints"]} == ports
        assert {endpoint["path"] for endpoint in found["podMetricsEndpoints"]} == {"/metrics"}


def test_the_alerts_are_those_of_the_rule_file_and_name_metrics_that_are() -> None:
    groups = next(iter(kinds(built("gpu", ("monitoring",)), "PrometheusRule").values()))["spec"]["groups"]
    expressions = " ".join(str(rule["expr"]) for group in groups for rule in group["rules"])
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bvidgen_\w+", expressions)}

    remedy = "run: python k8s/components/monitoring/build.py"
    assert groups == yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"], remedy
    assert named - metrics.names() - {topology.JOBS_BUCKET, topology.WORKERS_BUCKET} == set()


def test_the_rules_are_built_from_any_rule_file() -> None:
    path = K8S / "components" / "monitoring" / "build.py"
    spec = importlib.util.spec_from_file_location("build_rules", path)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    groups = [{"name": "g", "rules": [{"alert": "A", "expr": "vidgen_gateway_bus_up == 0", "for": "1m"}]}]

    made = build.rule({"groups": groups})

    made["metadata"]["namespace"] = "vidgen"  # as kustomize adds it
    check(made)
    assert made["spec"] == {"groups": groups}
    assert ALERTS == build.ALERTS


# ── what a pod may ───────────────────────────────────────────────────────────────────────────────────────────────

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def liberties(pod: Manifest) -> list[str]:
    """What a pod has that the Pod Security Standard `restricted` forbids, and what ours forgo besides."""
    spec, found = pod["spec"], []
    security = spec.get("securityContext", {})
    found += [] if security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0 else ["root"]
    found += [] if security.get("seccompProfile", {}).get("type") == "RuntimeDefault" else ["seccomp"]
    found += [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    found += [] if spec.get("automountServiceAccountToken") is False else ["token"]
    for volume in spec.get("volumes", []):
        found += [] if set(volume) - {"name"} <= VOLUMES else [f"volume {volume['name']}"]
    for container in containers(pod):
        own = container.get("securityContext", {})
        found += [] if own.get("allowPrivilegeEscalation") is False else ["escalation"]
        found += [] if own.get("capabilities") == {"drop": ["ALL"]} else ["capabilities"]
        found += [] if own.get("readOnlyRootFilesystem") is True else ["writable root"]
        found += [name for name in ("privileged", "runAsUser", "runAsNonRoot", "seccompProfile") if name in own]
        found += ["host port"] if any("hostPort" in port for port in container.get("ports", [])) else []
    return found


@combinations
def test_every_pod_is_restricted(overlay: str, components: tuple[str, ...]) -> None:
    manifests = built(overlay, components)

    assert {name: found for name, pod in pods(manifests).items() if (found := liberties(pod))} == {}
    labels = kinds(manifests, "Namespace")["vidgen"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for account in kinds(manifests, "ServiceAccount").values():
        assert account["automountServiceAccountToken"] is False
    assert not {one["kind"] for one in manifests} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


@pytest.mark.parametrize(
    ("liberty", "change"),
    [
        ("root", {"securityContext": {"runAsNonRoot": False}}),
        ("hostNetwork", {"hostNetwork": True}),
        ("token", {"automountServiceAccountToken": True}),
        ("volume disk", {"volumes": [{"name": "disk", "hostPath": {"path": "/"}}]}),
        ("escalation", {"containers": [{"name": "open"}]}),
    ],
)
def test_a_liberty_is_noticed(liberty: str, change: Manifest) -> None:
    pod = pods(built("gpu", ()))["gateway"]

    assert liberty in liberties({**pod, "spec": {**pod["spec"], **change}})


def test_the_pods_of_nats_are_restricted_too() -> None:
    spec = VALUES["podTemplate"]["merge"]["spec"]
    parts = [{"name": name, **VALUES[name]["merge"]} for name in ("container", "reloader", "promExporter")]

    assert liberties({"spec": {**spec, "containers": parts}}) == []


# Of Qwen-Image-Edit-2511 as the hub has it, and of Wan2.2-I2V-A14B with both experts in float32: 57.2 each, 11.4, 0.5.
MODEL_BYTES = {"edit": 57.7e9, "i2v": 126.3e9}


@pytest.mark.parametrize("stage", STAGES)
def test_a_volume_has_room_for_the_next_commit_beside_the_one_that_serves(stage: Stage) -> None:
    """That of the edit had none: a new commit filled it, and the stage's pod did not start."""
    claim = kinds(built("gpu", ()), "PersistentVolumeClaim")[f"weights-{stage}"]["spec"]
    size = claim["resources"]["requests"]["storage"]

    assert size.endswith("Gi")
    assert int(size.removesuffix("Gi")) * 2**30 > 2 * MODEL_BYTES[stage]


def told(heading: str) -> str:
    """A section of docs/operations.md."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return re.split(r"^#{2,3} ", text.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_an_upgrade_has_nats_read_anew_all_that_it_reads() -> None:
    """What identities may hear is in the Secret, which the page left as it was."""
    (volume,) = (one["value"] for one in VALUES["podTemplate"]["patch"] if one["path"] == "/spec/volumes/-")
    sources = [next(iter(source.values()))["name"] for source in volume["projected"]["sources"]]

    assert len(sources) == 2
    assert [name for name in (*sources, "identities init") if name not in told("Upgrade")] == []


@pytest.mark.parametrize(
    ("heading", "secret", "service"),
    [("Identities", "identity-edit-service", "edit-service"), ("Webhooks", "webhooks", "gateway")],
)
def test_who_has_a_secret_in_its_environment_is_started_anew_when_that_changes(
    heading: str, secret: str, service: str
) -> None:
    sources = pods(built("gpu", ()))[service]["spec"]["containers"][0]["envFrom"]

    assert secret in {source["secretRef"]["name"] for source in sources if "secretRef" in source}
    _, _, behind = told(heading).partition(f" {secret} --from-")
    assert f"rollout restart deployment/{service}" in behind


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_one_gpu_and_a_preview_none(name: str) -> None:
    real, preview = (pods(built(overlay, ()))[name]["spec"] for overlay in ("gpu", "local"))

    assert real["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [one["key"] for one in real["tolerations"]] == ["nvidia.com/gpu"]
    assert real["priorityClassName"] == "vidgen-gpu"
    mounts = {mount["mountPath"]: mount for mount in real["containers"][0]["volumeMounts"]}
    assert mounts["/weights"]["readOnly"] is True
    assert "nvidia.com/gpu" not in json.dumps(preview)
    assert "weights" not in json.dumps(preview)
    assert preview["containers"][0]["image"] == f"vidgen/gateway:{vidgen.__version__}"


@pytest.mark.parametrize("name", WORKERS)
def test_what_one_pod_of_a_stage_compiles_the_next_one_finds(name: str) -> None:
    """Each had compiled everything anew: it was kept with the pod."""
    spec = pods(built("gpu", ()))[name]["spec"]
    given = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
    [cache] = [
        one for one in spec["containers"][0]["volumeMounts"] if one["mountPath"] == given["VIDGEN_COMPILE_CACHE"]
    ]
    assert not cache.get("readOnly")
    [volume] = [volume for volume in spec["volumes"] if volume["name"] == cache["name"]]
    assert volume["persistentVolumeClaim"]["claimName"] == f"weights-{name.removesuffix('-service')}"
    # As a part of the volume it has to be there first, and be the user's who writes to it.
    [maker] = [one for one in spec["initContainers"] if one["command"][0] == "mkdir"]
    [whole] = [one for one in maker["volumeMounts"] if one["name"] == cache["name"]]
    assert maker["command"][-1] == f"{whole['mountPath']}/{cache['subPath']}"


def test_the_gateway_is_never_away_as_a_whole() -> None:
    manifests = built("gpu", ())
    autoscaler = kinds(manifests, "HorizontalPodAutoscaler")["gateway"]["spec"]
    budget = kinds(manifests, "PodDisruptionBudget")["gateway"]["spec"]
    labels = pods(manifests)["gateway"]["metadata"]["labels"]

    assert autoscaler["minReplicas"] == 2
    assert autoscaler["metrics"][0]["resource"]["name"] == "cpu"
    assert pods(manifests)["gateway"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"]["matchLabels"].items() <= labels.items()


# ── who may speak to whom ────────────────────────────────────────────────────────────────────────────────────────

NATS = {"app.kubernetes.io/name": "nats"}
ELSEWHERE = "elsewhere"


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    among = (labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))
    return selector.get("matchLabels", {}).items() <= labels.items() and all(among)


def peers(rule: Manifest, side: str, namespace: dict[str, str] | None, labels: dict[str, str]) -> bool:
    """Whether a rule names this pod; without a namespace it is somewhere outside the cluster."""
    for peer in rule[side]:
        if namespace is None:
            if "ipBlock" in peer:
                return True
        elif "ipBlock" not in peer:
            inside = (
                namespace == {} if "namespaceSelector" not in peer else matches(peer["namespaceSelector"], namespace)
            )
            if inside and matches(peer.get("podSelector", {}), labels):
                return True
    return False


def allowed(
    manifests: list[Manifest], direction: str, labels: dict[str, str], port: int | str,
    other: dict[str, str], namespace: dict[str, str] | None,
) -> bool:  # fmt: skip
    """Whether a pod with `labels` may send to, or be reached by, `other`: {} is our namespace, None the world."""
    side = "to" if direction == "Egress" else "from"
    for policy in kinds(manifests, "NetworkPolicy").values():
        spec = policy["spec"]
        if direction in spec["policyTypes"] and matches(spec["podSelector"], labels):
            for rule in spec.get(direction.lower(), []):
                ports = {one["port"] for one in rule["ports"]}
                if port in ports and peers(rule, side, namespace, other):
                    return True
    return False


@combinations
def test_only_the_real_arrows_pass(overlay: str, components: tuple[str, ...]) -> None:
    manifests = built(overlay, components)
    assert kinds(manifests, "NetworkPolicy")["default-deny"]["spec"] == {
        "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
    }  # fmt: skip
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(manifests).items()}
    client, publisher = {"vidgen/clients": "true"}, {"vidgen/publishers": "true"}
    keda, prometheus, tracing, stranger = (
        {"kubernetes.io/metadata.name": name} for name in ("keda", "monitoring", "tracing", "default")
    )
    collector = urlsplit(variables(manifests).get(TRACES, "http://collector.tracing.svc.cluster.local:4318"))
    assert (collector.hostname or "").split(".")[1] == "tracing"

    for name in ("gateway", *WORKERS):
        own = labels[name]
        assert allowed(manifests, "Egress", own, 4222, NATS, {})
        assert allowed(manifests, "Ingress", NATS, 4222, own, {})
        assert not allowed(manifests, "Egress", own, 8222, NATS, {})
        assert allowed(manifests, "Egress", own, collector.port or 80, {}, tracing) == ("tracing" in components)
        assert not allowed(manifests, "Ingress", NATS, 8222, own, {})
        if overlay == "local":
            assert allowed(manifests, "Egress", own, 8333, labels["store"], {})
            assert allowed(manifests, "Ingress", labels["store"], 8333, own, {})
            assert not allowed(manifests, "Egress", own, 443, {}, None)
        else:
            assert allowed(manifests, "Egress", own, 443, {}, None)
    assert allowed(manifests, "Ingress", labels["gateway"], 8080, {}, client)
    for port in (8080, "http"):
        assert not allowed(manifests, "Ingress", labels["gateway"], port, {}, stranger)
        assert not allowed(manifests, "Ingress", labels["gateway"], port, labels["edit-service"], {})
    assert allowed(manifests, "Ingress", NATS, 8222, {}, keda) == ("keda" in components)
    assert allowed(manifests, "Ingress", NATS, 6222, NATS, {})
    # The bus is a way in like HTTP, for other namespaces than those of the browsers; nobody has its other ports.
    assert allowed(manifests, "Ingress", NATS, 4222, {}, publisher)
    for other in (client, stranger):
        assert not allowed(manifests, "Ingress", NATS, 4222, {}, other)
    for port in (6222, 8222, VALUES["promExporter"]["port"]):
        assert not allowed(manifests, "Ingress", NATS, port, {}, publisher)
    for name in WORKERS:
        assert not allowed(manifests, "Egress", labels["gateway"], 9100, labels[name], {})
        assert not allowed(manifests, "Ingress", labels[name], "metrics", {}, stranger)
        assert allowed(manifests, "Ingress", labels[name], "metrics", {}, prometheus) == ("monitoring" in components)
    assert allowed(manifests, "Ingress", labels["gateway"], "http", {}, prometheus) == ("monitoring" in components)
    assert allowed(manifests, "Ingress", NATS, VALUES["promExporter"]["port"], {}, prometheus) == (
        "monitoring" in components
    )


# ── leaving ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_given_the_time_that_its_drain_takes(name: str) -> None:
    manifests = built("gpu", ())
    spec = pods(manifests)[name]["spec"]
    longest_step = 90  # 720p with guidance: 2 forwards of 11.2 s on an H200, here a GPU a quarter as fast

    assert spec["terminationGracePeriodSeconds"] > (
        float(variables(manifests)["VIDGEN_GRACE_S"]) + longest_step + handler.KEEP_S
    )
    assert "lifecycle" not in spec["containers"][0]  # SIGTERM itself is the drain


def replicas_in_the_dark(spec: Manifest, current: int) -> int:
    """The pods that KEDA 2.20 has of a stage whose queues it cannot read, once it has failed to for long enough.

    Its `doFallback` takes so many pods times the target for the metric, which activates a stage like any other.
    """
    fallback = spec["fallback"]
    match fallback["behavior"]:
        case "currentReplicas":
            meant = current
        case "currentReplicasIfHigher":
            meant = max(current, fallback["replicas"])
        case other:
            raise ValueError(f"{other} may take pods that work")
    modifiers = spec["advanced"]["scalingModifiers"]
    return meant if meant * float(modifiers["target"]) > float(modifiers["activationTarget"]) else 0


@pytest.mark.parametrize("name", WORKERS)
def test_no_gpu_is_started_where_nats_cannot_be_read(name: str) -> None:
    """One of each stage was, at every outage of NATS and before the first gateway had made the queues."""
    assert replicas_in_the_dark(kinds(built("gpu", ("keda",)), "ScaledObject")[name]["spec"], 0) == 0


@pytest.mark.parametrize("components", [("keda",), ("keda", "warm-floor")])
@pytest.mark.parametrize("name", WORKERS)
def test_scaling_down_takes_nothing_from_a_stage_that_just_started(name: str, components: tuple[str, ...]) -> None:
    manifests = built("gpu", components)
    scaled = kinds(manifests, "ScaledObject")[name]["spec"]
    probe = pods(manifests)[name]["spec"]["containers"][0]["startupProbe"]
    cold_start = probe["periodSeconds"] * probe["failureThreshold"]
    down = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]

    assert scaled["cooldownPeriod"] > cold_start
    assert scaled["fallback"]["replicas"] >= 1  # else KEDA takes all pods at the first error
    assert [replicas_in_the_dark(scaled, pods) for pods in (1, 5)] == [1, 5]
    if scaled["minReplicaCount"] == 0:
        assert down == {"selectPolicy": "Disabled"}
    else:
        # KEDA itself never takes a pod from a stage with a floor: with Disabled none would ever leave.
        assert down.get("selectPolicy") != "Disabled"
        assert down["stabilizationWindowSeconds"] > cold_start
        assert [(one["type"], one["value"]) for one in down["policies"]] == [("Pods", 1)]


# ── how many GPUs ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_triggers_name_every_queue_of_their_stage_and_i2v_those_of_edit_too() -> None:
    manifests = built("gpu", ("keda",))
    for stage in STAGES:
        spec = kinds(manifests, "ScaledObject")[f"{stage}-service"]["spec"]
        looked_at: tuple[Stage, ...] = ("i2v", "edit") if stage == "i2v" else (stage,)
        wanted = {
            (consumer.stream, consumer.name): consumer.name.replace("-", "_") + end
            for one in looked_at for lane in LANES
            for of, end in ((topology.consumer_of, ""), (topology.consumer_of_held, "_held"))
            for consumer in (of(one, lane),)
        }  # fmt: skip
        names = {
            (trigger["metadata"]["stream"], trigger["metadata"]["consumer"]): trigger["name"]
            for trigger in spec["triggers"]
        }

        assert names == wanted
        for trigger in spec["triggers"]:
            host, _, port = trigger["metadata"]["natsServerMonitoringEndpoint"].partition(":")
            assert host == "nats-headless.vidgen.svc.cluster.local"
            assert int(port) == VALUES["config"]["monitor"]["port"]
            assert trigger["metadata"]["lagThreshold"] == spec["advanced"]["scalingModifiers"]["target"]
        assert spec["maxReplicaCount"] <= topology.consumer_of(stage, "batch").max_ack_pending
        free = {node.id for node in ast.walk(ast.parse(spec["advanced"]["scalingModifiers"]["formula"]))
                if isinstance(node, ast.Name)}  # fmt: skip
        assert free - {"min", "max"} == set(names.values())


def evaluate(formula: str, values: dict[str, float]) -> float:
    """A formula of KEDA's language (expr), as far as it means the same in Python: sums, min and max."""

    def of(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.Name(id=name):
                return values[name]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return of(left) + of(right)
            case ast.Call(func=ast.Name(id="min" | "max" as name), args=arguments, keywords=[]):
                return (min if name == "min" else max)(map(of, arguments))
        raise ValueError(f"{ast.unparse(node)} may mean something else to KEDA: say it with +, min and max")

    return of(ast.parse(formula, mode="eval").body)


def asked(server: NatsServer, path: str) -> Any:
    with urllib.request.urlopen(f"{server.monitor_url}/{path}", timeout=30) as answer:
        return json.load(answer)


def waiting(server: NatsServer, metadata: dict[str, str]) -> int:
    """What KEDA's scaler for NATS reads for one trigger: what waits, and what workers hold."""
    query = urlencode({"acc": metadata["account"], "consumers": "true", "config": "true"})
    accounts = asked(server, f"jsz?{query}")["account_details"]
    (found,) = (
        consumer
        for account in accounts if metadata["account"] in (account["id"], account["name"])
        for stream in account["stream_detail"] if stream["name"] == metadata["stream"]
        for consumer in stream["consumer_detail"] if consumer["name"] == metadata["consumer"]
    )  # fmt: skip
    return int(found["num_pending"]) + int(found["num_ack_pending"])


def replicas(server: NatsServer, scaled: Manifest) -> int:
    """The pods that KEDA and its HPA would have of a stage that has none: the composite metric over its target."""
    spec, modifiers = scaled["spec"], scaled["spec"]["advanced"]["scalingModifiers"]
    read = {trigger["name"]: float(waiting(server, trigger["metadata"])) for trigger in spec["triggers"]}
    value = evaluate(modifiers["formula"], read)
    if value <= float(modifiers["activationTarget"]):
        return int(spec["minReplicaCount"])
    least = max(1, spec["minReplicaCount"])
    return int(min(spec["maxReplicaCount"], max(least, math.ceil(value / float(modifiers["target"])))))


def conf(value: object) -> str:
    """A configuration as the chart writes it: `<< x >>` is x without quotes."""
    if isinstance(value, dict):
        return "{\n" + "".join(f"{json.dumps(key)}: {conf(one)}\n" for key, one in value.items()) + "}"
    bare = re.fullmatch(r"<<\s*(.*?)\s*>>", value) if isinstance(value, str) else None
    return bare[1] if bare else json.dumps(value)


def mounted_users(folder: Path) -> dict[str, Any]:
    """Lay the volume that values.yaml mounts beside the servers' folders; how its admin connects."""
    identities = Identities(folder / "identities")
    identities.complete()
    identities.add("admin")
    (volume,) = (one["value"] for one in VALUES["podTemplate"]["patch"] if one["path"] == "/spec/volumes/-")
    (mount,) = (one["value"] for one in VALUES["container"]["patch"] if one["path"] == "/volumeMounts/-")
    assert mount["name"] == volume["name"]
    secret, config = volume["projected"]["sources"]
    place = folder / Path(mount["mountPath"]).name
    shutil.copytree(ROOT / "deploy" / "nats" / "roles", folder / "config", dirs_exist_ok=True)
    (place / "roles").mkdir(parents=True)
    assert secret["secret"]["name"] == "nats-users"
    shutil.copy(folder / "identities" / "users.conf", place)
    for item in config["configMap"]["items"]:
        shutil.copy(folder / "config" / item["key"], place / item["path"])
    return credentials.nkey(str(identities.env_file("admin")))


# What the chart's reloader (natsio/nats-server-config-reloader 0.23) takes for an include.
INCLUDE = re.compile(r"^\s*include\s+(['\"]?[^'\";\n]*)", re.MULTILINE)


def watched(conf: Path) -> set[Path]:
    """The files on which that reloader has nats-server read everything anew, from one of them on."""
    included = [conf.parent / found.strip("'\"") for found in INCLUDE.findall(conf.read_text(encoding="utf-8"))]
    return {conf}.union(*map(watched, included))


def test_nats_reads_anew_what_a_role_may_do_when_that_alone_changed(tmp_path: Path) -> None:
    """The reloader did not see the includes: after an upgrade the new gateway was denied what it may do."""
    mounted_users(tmp_path)
    (mount,) = (one["value"]["mountPath"] for one in VALUES["container"]["patch"])
    place = tmp_path / Path(mount).name

    assert watched(place / "users.conf") == {place / "users.conf", *(place / "roles").iterdir()}


class ChartServer(NatsServer):
    """One server with the settings of `k8s/nats/values.yaml` as the chart renders them; ports and folder are ours."""

    cluster: Manifest | None = None
    admin: dict[str, Any]

    def _config(self) -> str:
        config = VALUES["config"]
        store = config["jetstream"]
        include = config["merge"]["$include"]  # as the chart writes what is named so
        return f"include {json.dumps(include)}\n" + "\n".join(
            f"{key}: {conf(value)}"
            for key, value in {
                **{key: value for key, value in config["merge"].items() if key != "$include"},
                **(self.cluster or {}),
                "listen": "127.0.0.1:-1",
                "http": "127.0.0.1:-1",
                "ports_file_dir": str(self.folder),
                "jetstream": {
                    "store_dir": str(self.folder / "data"),
                    "max_file_store": f"<< {store['fileStore']['maxSize']} >>",
                    "max_memory_store": f"<< {store['memoryStore']['maxSize']} >>",
                    **store["merge"],
                    **({} if self.sync_always else {"sync_interval": "2m"}),
                },
            }.items()
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChartServer]:
    """One for all tests of the queues; it need not survive a power cut."""
    with asyncio.Runner() as runner:
        folder = tmp_path_factory.mktemp("nats")
        server = ChartServer(folder / "nats-config", sync_always=False)
        server.admin = mounted_users(folder)
        with skipped_at_home():
            runner.run(server.start())
        try:
            yield server
        finally:
            runner.run(server.kill())


async def emptied(bus: JetStreamBus, wanted: topology.Topology) -> None:
    """Make the topology, with nothing in any queue; tried again while a busy machine's servers are late."""
    async with asyncio.timeout(240):
        while True:
            try:
                await bootstrap.ensure(bus, wanted)
                with jetstream.translated():
                    await bus.jetstream.purge_stream(topology.TASKS)
                return
            except errors.BusError:
                await asyncio.sleep(0.1)


@pytest.fixture
async def bus(server: ChartServer) -> AsyncIterator[JetStreamBus]:
    """A connection with nothing in any queue."""
    async with jetstream.connect(server.url, "test", **server.admin) as connected:
        await emptied(connected, topology.Topology())
        yield connected


@pytest.fixture
def scaled() -> dict[str, Manifest]:
    return kinds(built("gpu", ("keda",)), "ScaledObject")


async def queue(bus: JetStreamBus, stage: Stage, numbers: Iterable[int], lanes: tuple[Lane, ...] = LANES) -> None:
    """Have tasks of a stage wait, in turn in its lanes."""
    for number in numbers:
        subject = topology.subject_of_task(stage, lanes[number % len(lanes)], f"job-{number}")
        await bus.publish(subject, b"{}", message_id=secrets.token_hex(8))
    consumers = [topology.consumer_of(one, lane) for one in STAGES for lane in LANES]
    stored = (await bus.held(topology.TASKS)).messages
    async with asyncio.timeout(240):
        # What waits for a consumer is counted a moment after it was stored.
        while sum([(await bus.depth(consumer)).pending for consumer in consumers]) < stored:
            await asyncio.sleep(0.02)


async def pods_while_more_come(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest], stage: Stage
) -> dict[int, tuple[int, ...]]:
    """The pods of edit and i2v by how many tasks of `stage` wait."""
    found = {}
    for before, count in itertools.pairwise((0, 0, 1, 5, 50)):
        await queue(bus, stage, range(before, count))
        found[count] = tuple(replicas(server, scaled[f"{one}-service"]) for one in ("edit", "i2v"))
    return found


async def test_the_settings_of_the_chart_are_those_that_the_topology_needs(tmp_path: Path) -> None:
    mounted_users(tmp_path)
    with skipped_at_home():
        async with ChartServer(tmp_path / "nats-config") as server:
            found = asked(server, "varz")
    config = found["jetstream"]["config"]

    assert config["sync_always"] is True
    assert config["max_memory"] > 0  # progress and the registry of workers
    assert config["max_storage"] > sum(max(0, stream.max_bytes) for stream in topology.STREAMS)
    assert found["max_payload"] == 262144
    assert found["auth_required"] is True
    assert VALUES["config"]["cluster"] == {"enabled": True, "replicas": 3, "noAdvertise": False}


async def test_edits_that_wait_start_their_gpus_and_the_first_of_the_video(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    found = await pods_while_more_come(server, bus, scaled, "edit")

    assert found == {0: (0, 0), 1: (1, 1), 5: (1, 1), 50: (4, 1)}


async def test_edits_alone_keep_the_pods_of_the_video(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    """Its metric is above what activates it, and nothing takes a pod before: the docs say so."""
    await queue(bus, "edit", range(1))

    spec = scaled["i2v-service"]["spec"]
    assert replicas(server, scaled["i2v-service"]) == 1
    assert spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"] == {"selectPolicy": "Disabled"}
    assert "An edit that waits or runs keeps those of the video" in told("Scaling")


async def test_videos_that_wait_start_their_gpus_up_to_the_limit_and_none_of_the_edit(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    found = await pods_while_more_come(server, bus, scaled, "i2v")

    assert found == {0: (0, 0), 1: (0, 1), 5: (0, 3), 50: (0, 16)}


async def test_the_look_ahead_adds_nothing_where_videos_wait_already(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    await queue(bus, "i2v", range(4))
    await queue(bus, "edit", range(30))

    assert replicas(server, scaled["i2v-service"]) == 2
    assert replicas(server, scaled["edit-service"]) == 2


async def test_what_is_held_behind_a_tenants_share_starts_gpus_too(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    for number in range(30):
        subject = topology.subject_of_held("edit", "interactive", f"job-{number}", "acme")
        await bus.publish(subject, b"{}", message_id=secrets.token_hex(8))

    assert replicas(server, scaled["edit-service"]) == 2
    assert replicas(server, scaled["i2v-service"]) == 1
    await bus.purge(topology.HELD, "vidgen.held.>")
    assert replicas(server, scaled["edit-service"]) == 0


async def test_a_task_that_a_worker_holds_keeps_its_stage_up(
    server: NatsServer, bus: JetStreamBus, scaled: dict[str, Manifest]
) -> None:
    await queue(bus, "edit", range(1), ("batch",))
    held = await bus.pull(topology.consumer_of("edit", "batch"), wait=5)
    assert held is not None

    assert replicas(server, scaled["edit-service"]) == 1
    assert replicas(server, scaled["i2v-service"]) == 1
    await held.ack()
    assert replicas(server, scaled["edit-service"]) == 0


async def test_a_warm_floor_stays_with_nothing_to_do(server: NatsServer, bus: JetStreamBus) -> None:
    warm = kinds(built("gpu", ("keda", "warm-floor")), "ScaledObject")

    assert {replicas(server, one) for one in warm.values()} == {1}


async def test_three_servers_hold_three_replicas_of_everything_and_one_of_them_tells_the_queue(
    tmp_path: Path, scaled: dict[str, Manifest]
) -> None:
    admin = mounted_users(tmp_path)
    chart = VALUES["config"]["cluster"]
    async with contextlib.AsyncExitStack() as stack:
        ports = stack.enter_context(held_ports([0] * chart["replicas"]))
        servers = {f"nats-{n}": ChartServer(tmp_path / str(n), sync_always=False) for n in range(len(ports))}
        for (name, server), port in zip(servers.items(), ports, strict=True):
            routes = [f"nats://127.0.0.1:{one}" for one in ports]
            own = {
                "name": "nats",
                "listen": f"127.0.0.1:{port}",
                "no_advertise": chart["noAdvertise"],
                "routes": routes,
            }
            server.cluster = {"server_name": name, "cluster": own}
            stack.push_async_callback(server.kill)
            with skipped_at_home():
                await server.start()
        async with asyncio.timeout(120):
            # Before they have chosen a leader, every request to make something waits for its whole limit.
            while not all(asked(server, "jsz").get("meta_cluster", {}).get("leader") for server in servers.values()):
                await asyncio.sleep(0.05)
        bus = await stack.enter_async_context(jetstream.connect(servers["nats-0"].url, "test", **admin))
        await emptied(bus, topology.Topology(replicas=3))

        names = [stream.name for stream in topology.STREAMS]
        names += [f"KV_{bucket.name}" for bucket in topology.BUCKETS]
        for stream in names:
            assert (await bus.jetstream.stream_info(stream)).config.num_replicas == 3, stream
        await queue(bus, "edit", range(5), ("interactive",))
        consumer = await bus.jetstream.consumer_info(topology.TASKS, "edit-interactive")
        assert consumer.cluster is not None
        # KEDA looks for it in this way: each server says where the others are, and one is the consumer's leader.
        leader = servers[str(consumer.cluster.leader)]
        assert all(len(asked(server, "varz")["connect_urls"]) == 3 for server in servers.values())
        assert waiting(leader, scaled["edit-service"]["spec"]["triggers"][0]["metadata"]) == 5


def test_a_formula_that_python_and_keda_may_read_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="may mean something else"):
        evaluate("edit_batch and 1", {"edit_batch": 1.0})
