"""Writes the dashboards: `python deploy/monitoring/grafana/build.py`. A test keeps the JSON in step with this file.

Queues and fleet are told alike by every gateway, so their maximum is taken; what gateways count is summed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueGraphMode, DataSourceRef
from grafana_foundation_sdk.models.dashboard import Dashboard, DataTransformerConfig, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "[$__rate_interval]"
RANGE = "[$__range]"  # with TODAY: since midnight
TODAY = "now/d"
SECONDS, DOLLARS, PERCENT, BYTES = "s", "currencyUSD", "percentunit", "bytes"

Query = tuple[str, str]  # expression, legend
Panel = stat.Panel | timeseries.Panel | table.Panel


def target(query: Query, ref_id: str, *, instant: bool) -> prometheus.Dataquery:
    expr, legend = query
    made = prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(ref_id)
    return made.instant() if instant else made.range()


def graph(title: str, unit: str, *queries: Query, about: str = "", span: int = 8) -> timeseries.Panel:
    """Lines over time."""
    panel = timeseries.Panel().title(title).unit(unit).description(about).datasource(SOURCE).span(span).height(8).min(0)
    for ref_id, query in zip("ABCDEF", queries, strict=False):
        panel.with_target(target(query, ref_id, instant=False))
    return panel


def figure(title: str, unit: str, expr: str, *, about: str = "", today: bool = False, span: int = 3) -> stat.Panel:
    """One number, now; with `today` over the day so far."""
    panel = (
        stat.Panel().title(title).unit(unit).description(about).datasource(SOURCE).span(span).height(4).no_value("–")
    )
    panel.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if today:
        panel.time_from(TODAY)
    return panel.with_target(target((expr, ""), "A", instant=True))


def listing(title: str, expr: str, *, about: str, span: int) -> table.Panel:
    """The labels of some series, now."""
    panel = table.Panel().title(title).description(about).datasource(SOURCE).span(span).height(8)
    panel.with_target(target((expr, ""), "A", instant=True).format(PromQueryFormat.TABLE))
    hidden = DataTransformerConfig(id_val="organize", options={"excludeByName": {"Time": True, "Value": True}})
    return panel.with_transformation(hidden)


def quantiles(histogram: str, by: str, legend: str, where: str = "") -> tuple[Query, Query]:
    """p50 and p95 of a histogram."""
    labels = f"le, {by}" if by else "le"
    rate = f"sum by ({labels}) (rate({histogram}_bucket{where}{RATE}))"
    p50, p95 = (f"histogram_quantile({q}, {rate})" for q in (0.5, 0.95))
    return (p50, f"{legend} p50".strip()), (p95, f"{legend} p95".strip())


def grown(counter: str, over: str) -> str:
    """What a counter whose labels are not known beforehand grew by: a new series began at 0, unseen.

    It is looked for over as long before, for one that a scrape missed is not new.
    """
    before = f"last_over_time({counter}{over} offset {over[1:-1]})"
    return f"({counter} unless {before}) or increase({counter}{over})"


def board(uid: str, title: str, about: str) -> dashboard.Dashboard:
    made = dashboard.Dashboard(title).uid(uid).description(about).tags(["vidgen"]).readonly()
    made.time("now-3h", "now").refresh("30s").timezone("browser")
    return made.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))


def per_result(stage: str) -> str:
    """Dollars for each image or clip that a stage made."""
    cost, made = (f'sum(increase(vidgen_{of}_total{{stage="{stage}"}}{RANGE}))' for of in ("cost_dollars", "results"))
    return f"{cost} / {made}"


def mean(histogram: str, by: str, where: str = "") -> str:
    total, count = (f"sum by ({by}) (rate({histogram}_{part}{where}{RATE}))" for part in ("sum", "count"))
    return f"{total} / {count}"


def pipeline() -> Dashboard:
    """Requests in, videos out: how many, how fast, at what cost, and what goes wrong."""
    jobs = f'sum by (le) (rate(vidgen_job_seconds_bucket{{status="completed"}}{RANGE}))'
    by_lane = "{{stage}} {{lane}}"
    panels: list[Panel] = [
        figure("Requests a minute", "none", f"60 * sum(rate(vidgen_requests_total{RATE}))"),
        figure("Tasks waiting", "none", "sum(max by (stage, lane) (vidgen_queue_depth))"),
        figure("Oldest waiting", SECONDS, "max(vidgen_queue_oldest_waiting_seconds)",
               about="The task that waits for a worker longest."),
        figure("End to end, p95", SECONDS, f"histogram_quantile(0.95, {jobs})",
               about="Of the jobs that were completed in the time that is shown, from acceptance."),
        figure("Dead letters today", "none", f"sum(increase(vidgen_dead_letters_total{RANGE}))", today=True),
        figure("GPU cost today", DOLLARS, f"sum(increase(vidgen_cost_dollars_total{RANGE}))", today=True,
               about="GPU seconds charged to jobs at VIDGEN_GPU_USD_PER_HOUR: wasted attempts too, idle time not."),
        figure("1,000 images today", DOLLARS, f"1000 * {per_result('edit')}", today=True,
               about="What edits cost, by the images that they made; each candidate is one."),
        figure("One clip today", DOLLARS, per_result("i2v"), today=True,
               about="What i2v tasks cost, by the clips that they made. The edit before is not in it."),
        graph("Requests", "reqpm", (f"60 * sum by (outcome) (rate(vidgen_requests_total{RATE}))", "{{outcome}}")),
        graph("Jobs ended", "opm", (f"60 * sum by (status) (rate(vidgen_jobs_total{RATE}))", "{{status}}")),
        graph("End to end", SECONDS, *quantiles("vidgen_job_seconds", "", "", '{status="completed"}'),
              about="Completed jobs, from their acceptance: both stages, waiting and any review included."),
        graph("Waiting", "none", ("max by (stage, lane) (vidgen_queue_depth)", by_lane),
              about="Tasks that no worker has been given. KEDA scales by these and those held by workers."),
        graph("Held by workers", "none", ("max by (stage, lane) (vidgen_queue_ack_pending)", by_lane)),
        graph("Age of the oldest", SECONDS,
              ("max by (stage, lane) (vidgen_queue_oldest_waiting_seconds)", f"{by_lane} waiting"),
              ("max by (stage, lane) (vidgen_queue_oldest_age_seconds)", f"{by_lane} unfinished")),
        graph("Stages", SECONDS, *quantiles("vidgen_stage_seconds", "stage", "{{stage}}"),
              about="Work of completed stages, without their time in the queue."),
        graph("Phases, mean", SECONDS, (mean("vidgen_phase_seconds", "stage, phase"), "{{stage}} {{phase}}")),
        graph("Attempts by their end", "opm",
              (f"60 * sum by (stage, outcome) (rate(vidgen_tasks_total{RATE}))", "{{stage}} {{outcome}}")),
        graph("Errors by code", "none",
              (f"sum by (stage, code) ({grown('vidgen_errors_total', RATE)})", "{{stage}} {{code}}"),
              about="Failed attempts, tried again or not, and requests that did not validate."),
        graph("Dead letters", "none", (f"sum by (stage) (increase(vidgen_dead_letters_total{RATE}))", "{{stage}}")),
        graph("Cost", DOLLARS, (f"3600 * sum by (stage) (rate(vidgen_cost_dollars_total{RATE}))", "{{stage}} an hour")),
    ]  # fmt: skip
    return laid_out(board("vidgen-pipeline", "Pipeline", pipeline.__doc__ or ""), panels)


def gpus() -> Dashboard:
    """Every GPU of the fleet, as its worker's heartbeats tell it: what it runs and how well."""
    who = "stage, worker, gpu, gpu_uuid, gpu_name"
    here = '{gpu_uuid=~"$gpu"}'
    worker = "{{stage}} {{worker}}"

    def told(metric: str, legend: str = worker) -> Query:
        return f"max by ({who}) (vidgen_fleet_{metric}{here})", legend

    made = board("vidgen-gpus", "GPUs", gpus.__doc__ or "")
    made.with_variable(
        dashboard.QueryVariable("gpu").label("GPU").datasource(SOURCE).multi(True).include_all(True)
        .query("label_values(vidgen_fleet_gpu_busy_seconds_total, gpu_uuid)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )  # fmt: skip
    about = "A CPU worker is one device called cpu. No job is named here: that is in the API, GET /v1/workers."
    for panel in (
        graph("Workers", "none", ("max by (stage, state) (vidgen_fleet_workers)", "{{stage}} {{state}}"), span=12),
        graph("Busy", PERCENT, (
            f"avg by (stage, gpu_name) (max by ({who}) (rate(vidgen_fleet_gpu_busy_seconds_total{RATE})))",
            "{{stage}} {{gpu_name}}",
        ), about="The share of time in which engines generated, by the kind of GPU.", span=12),
    ):  # fmt: skip
        made.with_panel(panel)
    made.with_row(dashboard.Row("GPU $gpu").repeat("gpu"))
    now = f"max by ({who}, engine, model, profile, state, host) (vidgen_fleet_info{here})"
    busy = f"max by ({who}) (rate(vidgen_fleet_gpu_busy_seconds_total{here}{RATE}))"
    rows: list[Panel] = [
        listing("Runs now", now, about=about, span=12),
        graph("Seconds per step", SECONDS, told("seconds_per_step"), span=6),
        figure("Load time", SECONDS, told("model_load_seconds")[0], span=3,
               about="Until the model was ready.").height(8),
        figure("Tasks held", "none", told("tasks_running")[0], span=3,
               about="One generates, one may be prepared, one be stored.").height(8),
        graph("Busy and utilisation", PERCENT, (busy, f"{worker} busy"),
              told("gpu_utilization_ratio", f"{worker} utilisation"), span=6,
              about="Busy: the share of time in which the engine generated. Utilisation: NVML's, of its last sample."),
        graph("VRAM", BYTES, told("gpu_memory_used_bytes", f"{worker} used"),
              told("gpu_memory_total_bytes", f"{worker} total"), span=6),
        graph("Power", "watt", told("gpu_power_watts"), span=6),
        graph("Temperature", "celsius", told("gpu_temperature_celsius"), span=6),
    ]  # fmt: skip
    return laid_out(made, rows)


def bus_and_store() -> Dashboard:
    """NATS and S3, as gateways and workers see them: up, quick, and with room left."""
    of_consumer, of_stream = "{{stream}} {{consumer}}", "{{stream}}"

    def consumers(metric: str) -> Query:
        return f"max by (stream, consumer) (vidgen_consumer_{metric}_messages)", of_consumer

    transfers = quantiles("vidgen_worker_artifact_seconds", "direction", "worker {{direction}}")
    panels: list[Panel] = [
        figure("Bus", "bool_on_off", "min(vidgen_gateway_bus_up)", about="Whether it answers every gateway."),
        figure("Object store", "bool_on_off", "min(vidgen_gateway_store_up)", about="It answers, with the bucket."),
        figure("Bus answers in", SECONDS, "max(vidgen_gateway_bus_seconds)"),
        figure("Store answers in", SECONDS, "max(vidgen_gateway_store_seconds)"),
        figure("Waiting for gateways", "none",
               'sum(max by (stream, consumer) (vidgen_consumer_pending_messages{consumer="gateway"}))',
               about="Requests, events and advisories that no gateway has taken."),
        figure("Bytes on the bus", BYTES, "sum(max by (stream) (vidgen_stream_bytes))"),
        figure("Dead letters kept", "none", 'max(vidgen_stream_messages{stream="VIDGEN_DEAD"})'),
        figure("Fullest stream", PERCENT, "max(vidgen_stream_bytes / vidgen_stream_limit_bytes)",
               about="Of the streams that have a limit of their own."),
        graph("Streams, messages", "none", ("max by (stream) (vidgen_stream_messages)", of_stream)),
        graph("Streams, bytes", BYTES, ("max by (stream) (vidgen_stream_bytes)", of_stream)),
        graph("Streams, share of their limit", PERCENT,
              ("max by (stream) (vidgen_stream_bytes / vidgen_stream_limit_bytes)", of_stream)),
        graph("Consumers, pending", "none", consumers("pending"), about="Not given to anybody yet."),
        graph("Consumers, ack pending", "none", consumers("ack_pending"), about="In work, or to be given again."),
        graph("Consumers, redelivered", "none", consumers("redelivered"),
              about="Of those in work or to be given again, what was given more than once."),
        graph("Redeliveries", "none", (f"sum by (stage) (increase(vidgen_redeliveries_total{RATE}))", "{{stage}}")),
        graph("Bus, time to answer", SECONDS, ("max by (instance) (vidgen_gateway_bus_seconds)", "{{instance}}"),
              about="All that a gateway asks for one scrape."),
        graph("Heartbeats that failed", "none",
              (f"sum by (stage) (increase(vidgen_worker_heartbeats_failed_total{RATE}))", "{{stage}}"),
              about="Scraped from workers: those outside of the network that is scraped are not in it."),
        graph("S3 latency", SECONDS, *transfers, ("max(vidgen_gateway_store_seconds)", "gateway, a look at the bucket"),
              about="One transfer of a worker; those outside of the network that is scraped are not in it."),
        graph("S3, bytes moved", "Bps", (
            f"sum by (stage, direction) (rate(vidgen_worker_artifact_bytes_total{RATE}))", "{{stage}} {{direction}}",
        )),
        graph("Storing results, mean", SECONDS, (
            mean("vidgen_phase_seconds", "stage", '{phase="store"}'), "{{stage}}",
        ), about="From the event log: all workers, wherever they are."),
    ]  # fmt: skip
    return laid_out(board("vidgen-bus-and-store", "Bus and store", bus_and_store.__doc__ or ""), panels)


def laid_out(made: dashboard.Dashboard, panels: list[Panel]) -> Dashboard:
    for panel in panels:
        made.with_panel(panel)
    built = made.build()
    for number, one in enumerate(built.panels or [], start=1):
        one.id_val = number
    return built


def files() -> Iterator[tuple[Path, str]]:
    """Each dashboard's file and text."""
    for build in (pipeline, gpus, bus_and_store):
        name = build.__name__.replace("_", "-")
        yield FOLDER / f"{name}.json", json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for path, text in files():
        path.write_text(text, encoding="utf-8")
