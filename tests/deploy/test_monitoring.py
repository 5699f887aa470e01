"""What Prometheus and Grafana are given: checked by promtool, by name, and against a real Prometheus and stack."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import yaml
from tests.gpu_service import REFUSED
from tests.servers import finished, skipped_at_home

from vidgen import metrics
from vidgen.client import AsyncClient
from vidgen.contracts import STAGES, EditParams, I2VParams, Job, JobStatus, VideoRequest
from vidgen.local import LocalError, Stack
from vidgen.local.process import POLL, Process, find_program

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
OPERATIONS = ROOT / "docs" / "operations.md"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
BOUND = 120.0
SCRAPE_S = 2

# Names that are not ours, and whose they are.
FOREIGN = {
    "up": "Prometheus itself",
    "nats_varz_jetstream_stats_storage": "prometheus-nats-exporter -varz -prefix=nats",
    "nats_varz_jetstream_config_max_storage": "prometheus-nats-exporter -varz -prefix=nats",
}
FOREIGN_LABELS = {"job", "instance", "server_id", "le"}

GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
MATCHER = re.compile(r"(\w+)\s*=~?\s*\"([^\"]*)\"")
NAME = re.compile(r"(?<![\w:$])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])")
WORDS = {"and", "or", "unless", "offset"}


def alerting() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in alerting() if "alert" in rule]
RECORDED = {rule["record"]: set(rule.get("labels", {})) for rule in alerting() if "record" in rule}


@dataclass(frozen=True)
class Panel:
    """One query of one panel, or an alert's: what it is called and what it asks."""

    title: str
    expr: str
    legend: str = ""


def queries(dashboard: Path) -> Iterator[Panel]:
    for panel in json.loads(dashboard.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", []):
            title = f"{dashboard.stem}: {panel['title']} {target['refId']}"
            yield Panel(title, target["expr"], target.get("legendFormat", ""))


PANELS = [query for dashboard in DASHBOARDS for query in queries(dashboard)]
RULES = [Panel(rule.get("alert") or rule["record"], str(rule["expr"])) for rule in alerting()]


def tool(name: str) -> str:
    found = find_program(name)
    if found is None:
        raise LocalError(f"{name} was not found: install Prometheus", code="not_installed")
    return found


def promtool(*arguments: str) -> None:
    with skipped_at_home():
        command = [tool("promtool"), *arguments]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, check=False, timeout=400, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ── by itself ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_must_not() -> None:
    tests = yaml.safe_load((MONITORING / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    cases = [(case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in ALERTS}

    assert set(cases) == {(name, fires) for name in names for fires in (True, False)}


def test_every_alert_has_a_severity_and_a_heading_in_the_runbook_and_no_heading_is_left_over() -> None:
    runbook = OPERATIONS.read_text(encoding="utf-8").split("\n## Runbook\n")[1].split("\n## ")[0]
    headings = re.findall(r"^### (.+)$", runbook, re.MULTILINE)

    assert sorted(headings) == sorted(rule["alert"] for rule in ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"


# The classic model is what every Grafana provisions from files; the newer one needs its new dashboards switched on.
@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
def test_the_dashboards_are_what_their_source_makes() -> None:
    spec = importlib.util.spec_from_file_location("build", MONITORING / "grafana" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    made = dict(build.files())

    assert sorted(made) == DASHBOARDS
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, "run: python deploy/monitoring/grafana/build.py"


def test_the_repeated_row_is_one_for_each_gpu_and_holds_all_that_is_told_of_it() -> None:
    panels = json.loads((MONITORING / "grafana" / "dashboards" / "gpus.json").read_text(encoding="utf-8"))["panels"]
    [row] = [number for number, panel in enumerate(panels) if panel["type"] == "row"]

    assert panels[row]["repeat"] == "gpu"
    assert all('gpu_uuid=~"$gpu"' in target["expr"] for panel in panels[row + 1 :] for target in panel["targets"])
    told = {name for panel in panels[row + 1 :] for target in panel["targets"] for name in names_in(target["expr"])}
    assert told == {one.name for one in metrics.GATEWAY if set(metrics.ON_WORKER) <= set(one.labels)}


def bare(expr: str) -> str:
    """An expression without its labels, ranges and groupings."""
    expr = re.sub(r"\"[^\"]*\"|\{[^}]*\}|\[[^]]*\]", "", expr)
    return re.sub(r"\boffset\s+[\w$]+", "", GROUPING.sub("", expr))


def names_in(expr: str) -> set[str]:
    return set(NAME.findall(bare(expr))) - WORDS


def exposed() -> dict[str, metrics.Metric]:
    """Every series' name as Prometheus has it."""
    found = {}
    for metric in (*metrics.WORKER, *metrics.GATEWAY):
        suffixes = ("_bucket", "_sum", "_count") if metric.type == "histogram" else ("",)
        found |= {metric.name + suffix: metric for suffix in suffixes}
    return found


@pytest.mark.parametrize("panel", [*PANELS, *RULES], ids=lambda panel: panel.title)
def test_only_metrics_and_labels_that_exist_are_asked_for(panel: Panel) -> None:
    ours, names = exposed(), names_in(panel.expr)
    assert names <= {*ours, *RECORDED, *FOREIGN}
    assert names or panel.expr.replace(".", "").isdigit()

    labels = {label.name: label for name in names & set(ours) for label in ours[name].labels}
    known = {*labels, *FOREIGN_LABELS, *(label for name in names & set(RECORDED) for label in labels_of(name))}
    grouped = {label.strip() for found in GROUPING.findall(panel.expr) for label in found.split(",") if label.strip()}
    asked = MATCHER.findall(panel.expr)
    assert grouped | {label for label, _ in asked} | set(re.findall(r"\{\{(\w+)\}\}", panel.legend)) <= known
    for label, value in asked:
        if label in labels and labels[label].values:
            assert set(value.split("|")) <= set(labels[label].values)


def labels_of(recorded: str) -> set[str]:
    """The labels that a recording rule leaves."""
    [expr, *_] = [str(rule["expr"]) for rule in alerting() if rule.get("record") == recorded]
    outer = GROUPING.search(expr)
    return RECORDED[recorded] | ({label.strip() for label in outer[1].split(",")} if outer else set())


# ── against the real ones ────────────────────────────────────────────────────────────────────────────────────────


class OnFakeGpus(Stack):
    """The stack, its two services each on a GPU of the fake NVML."""

    def _kinds(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        for stage in STAGES:
            yield f"{stage}-service", "tests.gpu_service", (stage,)


class Prometheus:
    """A real one, with the committed configuration; only its targets and its haste are another's."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        self._folder, self._targets = folder, targets
        self.process = Process("prometheus", folder / "log")

    async def start(self) -> None:
        config = shutil.copytree(MONITORING, self._folder / "etc") / "prometheus.yml"
        text = config.read_text(encoding="utf-8")
        assert text.count("15s") == 2
        config.write_text(text.replace("15s", f"{SCRAPE_S}s"), encoding="utf-8")
        for path in (config.parent / "targets").iterdir():
            url = self._targets.get(path.stem)
            path.write_text(json.dumps([{"targets": [url.removeprefix("http://")]}] if url else []), encoding="utf-8")
        self.process.start(
            [tool("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}",
             "--web.listen-address=127.0.0.1:0", "--log.format=json"]
        )  # fmt: skip
        async with asyncio.timeout(BOUND):
            while not self._listens():
                self.process.check()
                await asyncio.sleep(POLL)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=BOUND)

    def _listens(self) -> bool:
        *lines, _ = self.process.log.read_text(encoding="utf-8").split("\n")
        said = {line["msg"]: line for line in map(json.loads, lines) if "msg" in line}
        self.url = f"http://{said['Listening on']['address']}" if "Listening on" in said else ""
        return "Server is ready to receive web requests." in said

    async def get(self, path: str, **params: str) -> Any:
        answer = (await self.http.get(f"/api/v1/{path}", params=params)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def ask(self, expr: str) -> list[float]:
        """The values of a query now; those that are no numbers left out."""
        found = [float(one["value"][1]) for one in (await self.get("query", query=expr))["result"]]
        return [value for value in found if not math.isnan(value)]

    async def until(self, expr: str) -> None:
        """Wait until a query has a result: on a busy machine a scrape may fail, and what it would tell is gone."""
        try:
            async with asyncio.timeout(BOUND):
                while not await self.ask(expr):
                    await asyncio.sleep(SCRAPE_S / 4)
        except TimeoutError as exc:
            raise AssertionError(f"Prometheus has nothing for {expr}") from exc

    async def stop(self) -> None:
        if hasattr(self, "http"):
            await self.http.aclose()
        self.process.kill()


@contextlib.asynccontextmanager
async def scraped_stack(folder: Path) -> AsyncIterator[tuple[AsyncClient, Prometheus]]:
    env = {
        "VIDGEN_ENGINE": "preview", "VIDGEN_HEARTBEAT_S": "0.5", "VIDGEN_GPU_USD_PER_HOUR": "3.6",
        "VIDGEN_PREVIEW_SECONDS_PER_STEP": "0.05", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }  # fmt: skip
    with skipped_at_home():
        tool("prometheus")
    stack = OnFakeGpus(folder / "stack", env=env, ephemeral=True)
    with skipped_at_home():
        await stack.start()
    prometheus = Prometheus(folder, {service.name: service.url for service in stack.services})
    try:
        await prometheus.start()
        async with AsyncClient(stack.gateway_url) as client:
            yield client, prometheus
    finally:
        await prometheus.stop()
        await stack.stop()


def wish(seed: int = 7) -> VideoRequest:
    small = {"width": 320, "height": 192, "steps": 2, "seed": seed}
    return VideoRequest(
        references=("uploads/from-the-form",),
        edit=EditParams.model_validate({"prompt": "warm light"} | small),
        i2v=I2VParams.model_validate({"prompt": "slow zoom in", "num_frames": 9, "fps": 8} | small),
    )


async def ended(client: AsyncClient, *seeds: int) -> list[Job]:
    jobs = [await client.submit(wish(seed), images=[ROOT / "examples" / "portrait.jpg"]) for seed in seeds]
    return [await finished(client, job, BOUND) for job in jobs]


def filled_in(expr: str, gpu: str) -> str:
    """An expression as Grafana sends it."""
    return expr.replace("$__rate_interval", "10m").replace("$__range", "10m").replace("$gpu", gpu)


async def test_every_panel_has_data_while_the_stack_works(tmp_path: Path) -> None:
    async with scraped_stack(tmp_path) as (client, prometheus):
        for job in ("gateway", "edit-service", "i2v-service"):
            await prometheus.until(f'up{{job="{job}"}} == 1')
        # What is measured for the first time has no rate yet: so twice, each seen by Prometheus.
        for times in (1, 2):
            good, bad = await ended(client, 7, REFUSED)
            assert (good.status, bad.status) == (JobStatus.COMPLETED, JobStatus.FAILED)
            await prometheus.until(f'vidgen_job_seconds_count{{status="completed"}} >= {times}')
            await prometheus.until(f'vidgen_dead_letters_total{{stage="edit"}} >= {times}')
            for stage in STAGES:
                await prometheus.until(f'vidgen_worker_tasks_total{{stage="{stage}", outcome="completed"}} >= {times}')
            await prometheus.until(f"count(vidgen_fleet_seconds_per_step) == {len(STAGES)}")
        gpus = await prometheus.get("label/gpu_uuid/values")
        assert len(gpus) == 2

        for expr in sorted({filled_in(panel.expr, gpu) for panel in PANELS for gpu in gpus}):
            await prometheus.until(expr)

        await prometheus.until('sum by (code) (increase(vidgen_errors_total{stage="edit"}[10m])) > 0')
        await prometheus.until("count(vidgen:workers_alive == 1) == 2")
        groups = (await prometheus.get("rules"))["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
