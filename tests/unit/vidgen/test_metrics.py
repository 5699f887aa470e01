from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from vidgen import contracts, metrics, topology
from vidgen.bus import Depth, Held
from vidgen.contracts import GpuFigures, WorkerInfo
from vidgen.engine import EngineInfo

REFERENCE = Path(__file__).parents[3] / "docs" / "reference.md"
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GPU = GpuFigures(
    index=1, uuid="GPU-aaaa", name="NVIDIA H200", utilization=0.5, memory_used=10, memory_total=20, power_watts=300.0,
    temperature_celsius=60.0,
)  # fmt: skip
ON_GPU = {"gpu": "1", "gpu_uuid": "GPU-aaaa", "gpu_name": "NVIDIA H200"}
TIMINGS = contracts.Timings(queued=100, prepare=1, denoise=16, decode=2, encode=0.5, store=0.25)


def families(exposed: metrics.WorkerMetrics | metrics.GatewayMetrics) -> list[Family]:
    return list(text_string_to_metric_families(exposed.render()[0].decode()))


def value(exposed: metrics.WorkerMetrics | metrics.GatewayMetrics, name: str, **labels: str) -> float | None:
    """The one sample of `name` that carries `labels`, among others; None if there is none."""
    found = [
        sample.value
        for family in families(exposed)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) < 2, f"{name} {labels} is ambiguous"
    return found[0] if found else None


def job(**given: Any) -> contracts.Job:
    request = contracts.VideoRequest(
        references=("uploads/a.png",), edit=contracts.EditParams(prompt="x"), lane=given.pop("lane", "batch")
    )
    return contracts.Job(**{"id": "j1", "created_at": NOW, "updated_at": NOW, "request": request, **given})


EDIT_WORK = contracts.EditWork(
    prompt="x", user_prompt="x", negative_prompt=" ", steps=8, true_cfg_scale=1, guidance_scale=1, seed=5, width=64,
    height=64, candidates=1,
)  # fmt: skip


def common(**given: Any) -> dict[str, Any]:
    return {"job_id": "j1", "at": NOW, "stage": "edit", "attempt": 1, "tries": 1, "worker": "w", **given}


def completed(**given: Any) -> contracts.StageCompleted:
    artifact = contracts.Artifact(
        name="edit-0.png", key="jobs/j1/edit-0.png", content_type="image/png", size=2000, sha256="0"
    )
    fields = {
        "engine": "qwen", "model": "m", "seed": 1, "steps": 8, "artifacts": (artifact,), "timings": TIMINGS,
        "gpu_seconds": 18.0, "cost_usd": 0.5,
    }  # fmt: skip
    return contracts.StageCompleted(**common(**fields, **given))


def worker(name: str = "w1", **given: Any) -> WorkerInfo:
    fields = {
        "id": name, "stage": "edit", "state": "busy", "engine": "qwen", "model": "m", "device": "cuda:1",
        "gpus": (GPU,), "seconds_per_step": 0.4, "busy_seconds": 77.0, "load_seconds": 30.0, "version": "1",
        "host": "h", "started_at": NOW, "at": NOW,
    }  # fmt: skip
    return WorkerInfo(**{**fields, **given})


DEPTHS: dict[tuple[contracts.Stage, contracts.Lane], Depth] = {
    ("edit", "interactive"): Depth(3, 1, 0, NOW - timedelta(seconds=9), NOW - timedelta(seconds=4)),
    ("i2v", "batch"): Depth(0, 0, 0, None),
}


@pytest.fixture
def on_worker() -> metrics.WorkerMetrics:
    return metrics.WorkerMetrics("edit", (GPU,))


@pytest.fixture
def on_gateway() -> metrics.GatewayMetrics:
    return metrics.GatewayMetrics()


@pytest.fixture
def busy_worker(on_worker: metrics.WorkerMetrics) -> metrics.WorkerMetrics:
    """Everything that a worker can measure, measured once."""
    on_worker.describe(EngineInfo("qwen", "m", "abc", "bf16", "cuda:1"))
    on_worker.state("ready")
    on_worker.model_loaded({"weights": 12.0, "warm_up": 3.0})
    on_worker.task_settled("batch", "completed")
    on_worker.task_timed(TIMINGS)
    on_worker.step(0.5, 0.4)
    on_worker.gpu_busy(2.5)
    on_worker.redelivered()
    on_worker.dead_lettered()
    on_worker.cancelled_after(0.3)
    on_worker.artifact_moved("put", 2000, 0.02)
    on_worker.switched(1.5)
    on_worker.heartbeat_failed()
    return on_worker


@pytest.fixture
def busy_gateway(on_gateway: metrics.GatewayMetrics) -> metrics.GatewayMetrics:
    """Everything that a gateway can measure, measured once."""
    on_gateway.request_accepted()
    on_gateway.observe(contracts.StageStarted(**common(engine="qwen", model="m", deliveries=2)), job())
    on_gateway.observe(completed(), job())
    on_gateway.observe(contracts.StageCancelled(**common(cancel_latency_s=0.3)), job())
    on_gateway.job_finished(job(), contracts.JobCompleted(job_id="j1", at=NOW + timedelta(seconds=50)))
    on_gateway.dead_lettered(None)
    on_gateway.handed_back("edit")
    on_gateway.http_request("/v1/jobs/{id}", "GET", 200, 0.01)
    on_gateway.observe(failed(final=True), job())
    on_gateway.fleet([worker()], DEPTHS, NOW)
    on_gateway.bus({topology.CONSUMERS[0]: Depth(5, 2, 1, NOW)}, {topology.TASKS: Held(3, 300, 1000)}, 0.004)
    on_gateway.store(True, 0.02)
    on_gateway.swept("uploads", 2, 200)
    on_gateway.webhook("delivered")
    on_gateway.webhook_tried(0.2)
    return on_gateway


def exposed_names(found: list[Family]) -> Iterator[str]:
    for family in found:
        assert family.samples, f"{family.name} is never measured"
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_what_is_exposed_is_what_is_declared_and_each_can_be_measured(
    busy_worker: metrics.WorkerMetrics, busy_gateway: metrics.GatewayMetrics
) -> None:
    on_worker, on_gateway = families(busy_worker), families(busy_gateway)

    assert sorted(exposed_names(on_worker)) == sorted(metric.name for metric in metrics.WORKER)
    assert sorted(exposed_names(on_gateway)) == sorted(metric.name for metric in metrics.GATEWAY)
    assert metrics.names() == {metric.name for metric in (*metrics.WORKER, *metrics.GATEWAY)}


def test_the_exposition_carries_type_help_and_only_declared_labels(
    busy_worker: metrics.WorkerMetrics, busy_gateway: metrics.GatewayMetrics
) -> None:
    declared = {metric.name: metric for metric in (*metrics.WORKER, *metrics.GATEWAY)}
    for family in (*families(busy_worker), *families(busy_gateway)):
        metric = declared[f"{family.name}_total" if family.type == "counter" else family.name]
        assert (family.type, family.documentation) == (metric.type, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.label_names)


@pytest.mark.skipif(
    shutil.which("promtool") is None and "CI" not in os.environ,
    reason="promtool is not installed: it comes with Debian's package prometheus",
)
def test_promtool_finds_nothing_to_say(
    busy_worker: metrics.WorkerMetrics, busy_gateway: metrics.GatewayMetrics
) -> None:
    for exposed in (busy_worker, busy_gateway):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=exposed.render()[0], capture_output=True, check=False, timeout=60
        )
        assert (checked.returncode, checked.stderr.decode()) == (0, "")


def test_names_are_well_formed() -> None:
    every = [*metrics.WORKER, *metrics.GATEWAY]

    assert len({metric.name for metric in every}) == len(every)
    for metric in every:
        assert metric.name.endswith("_total") == (metric.type == "counter"), metric.name
        assert bool(metric.buckets) == (metric.type == "histogram"), metric.name
        assert metric.name.startswith("vidgen_worker_" if metric in metrics.WORKER else "vidgen_")
        assert "|" not in metric.help


@pytest.mark.parametrize("metric", [*metrics.WORKER, *metrics.GATEWAY], ids=lambda metric: metric.name)
def test_a_job_is_never_a_label(metric: metrics.Metric) -> None:
    assert not [name for name in metric.label_names if "job" in name or name == "id"]


def test_durations_are_told_apart_up_to_an_hour() -> None:
    for metric in (*metrics.WORKER, *metrics.GATEWAY):
        if metric.name.endswith(("stage_seconds", "phase_seconds", "job_seconds")):
            assert metric.buckets[-1] >= 3600
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_two_workers_in_one_process_share_nothing() -> None:
    first, second = metrics.WorkerMetrics("edit", (GPU,)), metrics.WorkerMetrics("i2v")

    first.redelivered()

    assert value(first, "vidgen_worker_redeliveries_total", stage="edit") == 1
    assert value(second, "vidgen_worker_redeliveries_total", stage="i2v") == 0


def test_counters_with_known_labels_begin_at_zero(
    on_worker: metrics.WorkerMetrics, on_gateway: metrics.GatewayMetrics
) -> None:
    assert value(on_worker, "vidgen_worker_tasks_total", stage="edit", lane="batch", outcome="fenced") == 0
    assert value(on_worker, "vidgen_worker_gpu_busy_seconds_total", **ON_GPU) == 0
    assert value(on_gateway, "vidgen_tasks_total", stage="i2v", lane="interactive", outcome="retried") == 0
    assert value(on_gateway, "vidgen_jobs_total", status="failed") == 0
    assert value(on_gateway, "vidgen_dead_letters_total", stage="request") == 0


# ── the worker ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_time_in_the_queue_is_a_phase_and_no_part_of_the_work(busy_worker: metrics.WorkerMetrics) -> None:
    assert value(busy_worker, "vidgen_worker_stage_seconds_sum") == 19.75
    assert value(busy_worker, "vidgen_worker_phase_seconds_sum", phase="queued") == 100
    assert value(busy_worker, "vidgen_worker_phase_seconds_sum", phase="denoise") == 16
    assert value(busy_worker, "vidgen_worker_phase_seconds_count", phase="load") is None


def test_busy_seconds_are_counted_on_the_gpu(busy_worker: metrics.WorkerMetrics) -> None:
    busy_worker.gpu_busy(1.5)

    assert value(busy_worker, "vidgen_worker_gpu_busy_seconds_total", stage="edit", **ON_GPU) == 4.0


def test_a_step_gives_its_own_time_and_the_smoothed_one(busy_worker: metrics.WorkerMetrics) -> None:
    assert value(busy_worker, "vidgen_worker_steps_total") == 1
    assert value(busy_worker, "vidgen_worker_step_seconds_sum") == 0.5
    assert value(busy_worker, "vidgen_worker_seconds_per_step") == 0.4


def test_a_figure_that_can_no_longer_be_read_has_no_series(busy_worker: metrics.WorkerMetrics) -> None:
    assert value(busy_worker, "vidgen_worker_gpu_power_watts", **ON_GPU) == 300

    busy_worker.gpu_figures([GPU.model_copy(update={"power_watts": None, "utilization": 0.9})])

    assert value(busy_worker, "vidgen_worker_gpu_power_watts") is None
    assert value(busy_worker, "vidgen_worker_gpu_utilization_ratio", **ON_GPU) == 0.9
    assert value(busy_worker, "vidgen_worker_info", engine="qwen") == 1


def test_a_worker_is_in_one_state_and_runs_one_engine(busy_worker: metrics.WorkerMetrics) -> None:
    busy_worker.state("draining")
    busy_worker.describe(EngineInfo("preview", "preview"))

    states = {state: value(busy_worker, "vidgen_worker_state", state=state) for state in metrics.STATES}
    assert states == {"starting": 0, "ready": 0, "busy": 0, "draining": 1, "unhealthy": 0}
    assert value(busy_worker, "vidgen_worker_info", engine="preview", revision="") == 1
    assert value(busy_worker, "vidgen_worker_info", engine="qwen") is None


# ── the gateway ──────────────────────────────────────────────────────────────────────────────────────────────────


def outcomes(exposed: metrics.GatewayMetrics) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in families(exposed)
        for sample in family.samples
        if sample.name == "vidgen_tasks_total" and sample.value
        if (sample.labels["stage"], sample.labels["lane"]) == ("edit", "batch")
    }


def failed(*, final: bool) -> contracts.StageFailed:
    error = contracts.JobError(code="oom", message="out of memory")
    return contracts.StageFailed(**common(error=error, final=final, gpu_seconds=3.0, cost_usd=0.25))


def test_each_end_of_an_attempt_is_counted_once_with_its_gpu_seconds(on_gateway: metrics.GatewayMetrics) -> None:
    for event in (
        completed(), failed(final=False), failed(final=True),
        contracts.StageReleased(**common(gpu_seconds=1.0)), contracts.StageCancelled(**common(gpu_seconds=2.0)),
    ):  # fmt: skip
        on_gateway.observe(event, job())

    assert outcomes(on_gateway) == {"completed": 1, "retried": 1, "failed": 1, "released": 1, "cancelled": 1}
    assert value(on_gateway, "vidgen_gpu_seconds_total", stage="edit") == 27
    assert value(on_gateway, "vidgen_cost_dollars_total", stage="edit") == 1.0


def test_a_completed_stage_gives_durations_steps_and_bytes(on_gateway: metrics.GatewayMetrics) -> None:
    on_gateway.observe(completed(), job())

    assert value(on_gateway, "vidgen_stage_seconds_sum", stage="edit") == 19.75
    assert value(on_gateway, "vidgen_phase_seconds_sum", stage="edit", phase="queued") == 100
    assert value(on_gateway, "vidgen_steps_total", stage="edit") == 8
    assert value(on_gateway, "vidgen_seconds_per_step_sum", stage="edit") == 2
    assert value(on_gateway, "vidgen_artifact_bytes_total", stage="edit") == 2000


def test_the_seconds_of_a_few_last_steps_are_not_told_as_those_of_all(on_gateway: metrics.GatewayMetrics) -> None:
    record = contracts.StageRecord(stage="edit", work=EDIT_WORK, charged=("1.1", "2.1", "2.2"))
    on_gateway.observe(completed(), job(stages=(record,)))
    assert value(on_gateway, "vidgen_seconds_per_step_count", stage="edit") is None
    assert value(on_gateway, "vidgen_steps_total", stage="edit") == 8

    again = record.model_copy(update={"charged": ("1.1", "1.2", "2.1")})  # the second run began anew
    on_gateway.observe(completed(), job(stages=(again,)))
    assert value(on_gateway, "vidgen_seconds_per_step_sum", stage="edit") == 2


def test_results_are_images_and_clips_and_no_posters(on_gateway: metrics.GatewayMetrics) -> None:
    def artifact(name: str, content_type: str) -> contracts.Artifact:
        return contracts.Artifact(name=name, key=f"jobs/j1/{name}", content_type=content_type, size=1, sha256="0")

    images = tuple(artifact(f"edit-{n}.png", "image/png") for n in range(3))
    clip = (artifact("video.mp4", "video/mp4"), artifact("poster.jpg", "image/jpeg"))
    on_gateway.observe(completed().model_copy(update={"artifacts": images}), job())
    on_gateway.observe(completed().model_copy(update={"stage": "i2v", "artifacts": clip}), job())

    assert value(on_gateway, "vidgen_results_total", stage="edit") == 3
    assert value(on_gateway, "vidgen_results_total", stage="i2v") == 1


def test_every_failed_attempt_and_every_refused_request_counts_under_its_code(
    on_gateway: metrics.GatewayMetrics,
) -> None:
    on_gateway.observe(failed(final=False), job())
    on_gateway.observe(failed(final=True), job())
    error = contracts.JobError(code="bad_request", message="the request does not validate")
    on_gateway.observe(
        contracts.Rejected(job_id="j1", at=NOW, errors=()), job(request=None, status="rejected", error=error)
    )

    assert value(on_gateway, "vidgen_errors_total", stage="edit", code="oom") == 2
    assert value(on_gateway, "vidgen_errors_total", stage="request", code="bad_request") == 1


def test_a_reused_artifact_does_not_pull_the_durations_down(on_gateway: metrics.GatewayMetrics) -> None:
    on_gateway.observe(completed(reused=True), job())

    assert outcomes(on_gateway) == {"reused": 1}
    assert value(on_gateway, "vidgen_stage_seconds_count", stage="edit") is None
    assert value(on_gateway, "vidgen_steps_total", stage="edit") == 0
    assert value(on_gateway, "vidgen_artifact_bytes_total", stage="edit") == 2000


def test_only_a_final_failure_is_a_dead_letter(on_gateway: metrics.GatewayMetrics) -> None:
    on_gateway.observe(failed(final=False), job())
    assert value(on_gateway, "vidgen_dead_letters_total", stage="edit") == 0

    on_gateway.observe(failed(final=True), job())
    assert value(on_gateway, "vidgen_dead_letters_total", stage="edit") == 1


def test_a_rejected_request_is_counted_and_is_a_dead_letter(on_gateway: metrics.GatewayMetrics) -> None:
    wrong = (contracts.FieldError(field="request", message="not JSON"),)

    on_gateway.observe(contracts.Rejected(job_id="j1", at=NOW, errors=wrong), job(request=None, status="rejected"))
    on_gateway.request_duplicate()

    assert value(on_gateway, "vidgen_requests_total", outcome="rejected") == 1
    assert value(on_gateway, "vidgen_requests_total", outcome="duplicate") == 1
    assert value(on_gateway, "vidgen_dead_letters_total", stage="request") == 1


def test_only_a_start_after_an_earlier_delivery_is_a_redelivery(on_gateway: metrics.GatewayMetrics) -> None:
    for deliveries in (1, 2, 5):
        event = contracts.StageStarted(**common(engine="qwen", model="m", deliveries=deliveries))
        on_gateway.observe(event, job())

    assert value(on_gateway, "vidgen_redeliveries_total", stage="edit") == 2


@pytest.mark.parametrize(
    "event",
    [
        contracts.CancelRequested(job_id="j1", at=NOW),
        contracts.RetryRequested(job_id="j1", at=NOW),
        contracts.Approved(job_id="j1", at=NOW),
        contracts.JobCompleted(job_id="j1", at=NOW),
    ],
    ids=lambda event: event.type,
)
def test_an_event_that_ends_no_attempt_counts_nothing(
    event: contracts.AnyEvent, on_gateway: metrics.GatewayMetrics
) -> None:
    before = on_gateway.render()

    on_gateway.observe(event, job())

    assert on_gateway.render() == before


def test_a_job_is_timed_from_acceptance_to_its_end(on_gateway: metrics.GatewayMetrics) -> None:
    error = contracts.JobError(code="out_of_memory", message="no room")
    on_gateway.job_finished(job(), contracts.JobCompleted(job_id="j1", at=NOW + timedelta(hours=1, minutes=30)))
    on_gateway.job_finished(job(), contracts.JobFailed(job_id="j1", at=NOW + timedelta(seconds=5), error=error))

    assert value(on_gateway, "vidgen_jobs_total", status="completed") == 1
    assert value(on_gateway, "vidgen_job_seconds_sum", status="completed") == 5400
    assert value(on_gateway, "vidgen_job_seconds_bucket", status="completed", le="3600.0") == 0
    assert value(on_gateway, "vidgen_job_seconds_bucket", status="completed", le="7200.0") == 1
    assert value(on_gateway, "vidgen_job_seconds_sum", status="failed") == 5


def test_strange_http_requests_make_no_new_series(on_gateway: metrics.GatewayMetrics) -> None:
    for path in range(3):
        on_gateway.http_request(None, f"BREW{path}", 405, 0.001)

    assert value(on_gateway, "vidgen_http_requests_total", route="unmatched", method="other", status="405") == 3


def test_the_fleet_shows_each_gpu_of_each_worker(busy_gateway: metrics.GatewayMetrics) -> None:
    where = {"stage": "edit", "worker": "w1", **ON_GPU}

    assert value(busy_gateway, "vidgen_fleet_gpu_utilization_ratio", **where) == 0.5
    assert value(busy_gateway, "vidgen_fleet_gpu_memory_used_bytes", **where) == 10
    assert value(busy_gateway, "vidgen_fleet_gpu_busy_seconds_total", **where) == 77
    assert value(busy_gateway, "vidgen_fleet_seconds_per_step", **where) == 0.4
    assert value(busy_gateway, "vidgen_fleet_model_load_seconds", **where) == 30
    assert value(busy_gateway, "vidgen_fleet_workers", stage="edit", state="busy") == 1
    assert value(busy_gateway, "vidgen_fleet_workers", stage="i2v", state="ready") == 0


def test_a_dead_worker_vanishes_from_the_fleet(busy_gateway: metrics.GatewayMetrics) -> None:
    busy_gateway.fleet([worker("w2", state="ready")], DEPTHS, NOW)

    assert value(busy_gateway, "vidgen_fleet_gpu_utilization_ratio", worker="w1") is None
    assert value(busy_gateway, "vidgen_fleet_gpu_utilization_ratio", worker="w2") == 0.5
    assert value(busy_gateway, "vidgen_fleet_workers", stage="edit", state="busy") == 0


def test_a_lane_shows_what_waits_what_is_held_and_how_old(busy_gateway: metrics.GatewayMetrics) -> None:
    lane = {"stage": "edit", "lane": "interactive"}

    assert value(busy_gateway, "vidgen_queue_depth", **lane) == 3
    assert value(busy_gateway, "vidgen_queue_ack_pending", **lane) == 1
    assert value(busy_gateway, "vidgen_queue_oldest_age_seconds", **lane) == 9
    assert value(busy_gateway, "vidgen_queue_oldest_waiting_seconds", **lane) == 4
    assert value(busy_gateway, "vidgen_queue_oldest_waiting_seconds", stage="i2v", lane="batch") == 0
    assert value(busy_gateway, "vidgen_queue_oldest_age_seconds", stage="i2v", lane="batch") == 0


def test_consumers_and_streams_stay_when_only_the_fleet_is_told_anew(busy_gateway: metrics.GatewayMetrics) -> None:
    where = {"stream": topology.REQUESTS, "consumer": topology.GATEWAY}
    busy_gateway.fleet([], DEPTHS, NOW)

    assert value(busy_gateway, "vidgen_consumer_pending_messages", **where) == 5
    assert value(busy_gateway, "vidgen_consumer_ack_pending_messages", **where) == 2
    assert value(busy_gateway, "vidgen_consumer_redelivered_messages", **where) == 1
    assert value(busy_gateway, "vidgen_stream_bytes", stream=topology.TASKS) == 300
    assert value(busy_gateway, "vidgen_stream_limit_bytes", stream=topology.TASKS) == 1000

    busy_gateway.bus({}, {topology.TASKS: Held(0, 0, None)}, 0.1)

    assert value(busy_gateway, "vidgen_consumer_pending_messages", **where) is None
    assert value(busy_gateway, "vidgen_stream_limit_bytes", stream=topology.TASKS) is None
    assert value(busy_gateway, "vidgen_gateway_bus_seconds") == 0.1


def test_a_store_that_is_down_is_told_apart_from_one_that_is_slow(busy_gateway: metrics.GatewayMetrics) -> None:
    assert value(busy_gateway, "vidgen_gateway_store_up") == 1

    busy_gateway.store(False, 3.0)

    assert value(busy_gateway, "vidgen_gateway_store_up") == 0
    assert value(busy_gateway, "vidgen_gateway_store_seconds") == 3


def test_a_worker_tells_what_it_runs_now(on_gateway: metrics.GatewayMetrics) -> None:
    on_gateway.fleet([worker(running=("j1", "j2"), profile="bf16")], DEPTHS, NOW)
    now = {"engine": "qwen", "model": "m", "profile": "bf16", "host": "h", "state": "busy"}

    assert value(on_gateway, "vidgen_fleet_info", worker="w1", gpu_uuid="GPU-aaaa", **now) == 1
    assert value(on_gateway, "vidgen_fleet_tasks_running", worker="w1", stage="edit", **ON_GPU) == 2

    on_gateway.fleet([worker(state="ready")], DEPTHS, NOW)

    assert value(on_gateway, "vidgen_fleet_info", worker="w1", state="busy") is None
    assert value(on_gateway, "vidgen_fleet_tasks_running", worker="w1") == 0


def test_a_bus_that_is_down_leaves_the_last_figures(busy_gateway: metrics.GatewayMetrics) -> None:
    assert value(busy_gateway, "vidgen_gateway_bus_up") == 1

    busy_gateway.bus_down()

    assert value(busy_gateway, "vidgen_gateway_bus_up") == 0
    assert value(busy_gateway, "vidgen_queue_depth", stage="edit", lane="interactive") == 3


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_metric_has_a_row_in_the_table() -> None:
    rows = [line for line in metrics.reference_table().splitlines() if line.startswith("| `")]

    assert [row.split("`")[1] for row in rows] == [metric.name for metric in (*metrics.WORKER, *metrics.GATEWAY)]
    assert {row.count("|") for row in rows} == {6}


def test_the_reference_is_written_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    page.write_text(f"# Ours\n\n{metrics.BEGIN}\nold\n{metrics.END}\n\nmore\n")

    metrics.write_reference(page)

    assert page.read_text() == f"# Ours\n\n{metrics.BEGIN}\n{metrics.reference_table()}{metrics.END}\n\nmore\n"


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "reference.md"
    page.write_text("# Ours\n")

    with pytest.raises(ValueError, match="lacks the two markers"):
        metrics.write_reference(page)

    assert page.read_text() == "# Ours\n"


def test_the_docs_list_the_metrics_as_they_are() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    between = text.partition(metrics.BEGIN)[2].partition(metrics.END)[0]

    assert between.strip() == metrics.reference_table().strip(), "run: python -m vidgen.metrics docs/reference.md"


# ── two stages in one process ────────────────────────────────────────────────────────────────────────────────────


def test_the_metrics_of_two_stages_are_one_exposition_that_describes_each_metric_once(
    busy_worker: metrics.WorkerMetrics,
) -> None:
    other = metrics.WorkerMetrics("i2v", (GPU,), tells_figures=False)
    other.step(0.5)

    text = metrics.exposition((busy_worker, other))[0].decode()

    described = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described)) == len(metrics.WORKER)
    found = {
        (sample.name, sample.labels["stage"])
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert {("vidgen_worker_steps_total", stage) for stage in contracts.STAGES} <= found
    assert metrics.exposition((busy_worker,)) == busy_worker.render()


def test_the_figures_of_a_device_are_told_by_one_of_its_stages(on_worker: metrics.WorkerMetrics) -> None:
    other = metrics.WorkerMetrics("i2v", (GPU,), tells_figures=False)
    other.gpu_figures((GPU,))

    assert value(on_worker, "vidgen_worker_gpu_memory_used_bytes") == 10
    assert value(other, "vidgen_worker_gpu_memory_used_bytes") is None
    assert value(other, "vidgen_worker_gpu_busy_seconds_total") == 0


def test_the_fleet_tells_the_figures_of_a_process_for_both_stages_once(on_gateway: metrics.GatewayMetrics) -> None:
    on_gateway.fleet([worker(stage="i2v"), worker(stage="edit"), worker("w2", stage="i2v")], DEPTHS, NOW)

    figures = [
        (sample.labels["worker"], sample.labels["stage"])
        for family in families(on_gateway)
        for sample in family.samples
        if sample.name == "vidgen_fleet_gpu_memory_used_bytes"
    ]
    assert sorted(figures) == [("w1", "edit"), ("w2", "i2v")]
    assert value(on_gateway, "vidgen_fleet_gpu_busy_seconds_total", worker="w1", stage="i2v") == 77.0
