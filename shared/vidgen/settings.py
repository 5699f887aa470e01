"""Settings, read once from the environment (`VIDGEN_*`) by each `main`, and given away from there."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from vidgen import credentials, errors, reference
from vidgen.contracts import Stage

QWEN_MODEL = "Qwen/Qwen-Image-Edit-2511"
WAN_MODEL = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
BUCKET = re.compile(r"(?!.*(\.\.|\.-|-\.)|(\d+\.){3}\d+\Z)[A-Za-z0-9][\w.:-]{1,61}[A-Za-z0-9]", re.ASCII)
NO_BUCKET = "a bucket's name has 3 to 63 lower case letters, digits, - and ., and is no IP address"
INBOX_PREFIX = re.compile(r"_INBOX[A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
OTLP_URL = r"^(https?://.+)?$"

T = TypeVar("T", bound="Settings")


class Settings(BaseSettings):
    """What every process needs: the bus, the store, the logs."""

    # An empty variable is one that is not set: a compose file or a ConfigMap cannot leave one out.
    model_config = SettingsConfigDict(
        env_prefix="VIDGEN_", extra="ignore", frozen=True, env_ignore_empty=True, allow_inf_nan=False
    )

    nats_url: str = Field("nats://127.0.0.1:4222", description="The bus.")
    nats_user: str | None = Field(None, description="A NATS user, where the bus wants one.")
    nats_password: SecretStr | None = Field(None, description="That user's password.")
    nats_creds: Path | None = Field(None, description="A NATS credentials file, instead of user and password.")
    nats_nkey_seed: SecretStr | None = Field(
        None,
        description="The seed of this process's user of the bus (`vidgen identities` makes it), or a file that holds "
        "it; instead of user and password.",
    )
    nats_inbox_prefix: str | None = Field(
        None,
        description="Where the bus answers this process: `_INBOX` and whatever follows. By default a name of its own, "
        "with a seed the one that its user may hear.",
    )
    nats_tls_ca: Path | None = Field(
        None,
        description="The authority that signed the bus's certificate. Where it is set, a bus without TLS is refused.",
    )
    nats_tls_cert: Path | None = Field(None, description="This process's own certificate, where the bus wants one.")
    nats_tls_key: Path | None = Field(None, description="That certificate's key.")
    stream_replicas: int = Field(
        1, ge=1, le=5, description="Replicas of every stream and bucket; the gateway only ever raises them."
    )
    ack_wait: float = Field(60.0, gt=0, description="Seconds a task stays with a worker that is no longer heard.")

    s3_endpoint: str = Field("http://127.0.0.1:8333", description="The object store.")
    s3_public_endpoint: str | None = Field(None, description="The same store as clients reach it, for presigned URLs.")
    s3_access_key: SecretStr = Field(SecretStr(""), description="The store's access key.")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="The store's secret key.")
    s3_bucket: str = Field("vidgen", description="The bucket; the gateway makes it where it is missing.")
    s3_region: str = Field("us-east-1", description="The region that requests are signed for.")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least level logged.")
    log_format: Literal["auto", "json", "console"] = Field("auto", description="auto: JSON unless on a terminal.")
    ready_file: Path | None = Field(None, description="Where the process writes its HTTP URL once it listens.")

    otlp_endpoint: str | None = Field(
        None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT", pattern=OTLP_URL,
        description="An OTLP/HTTP collector, such as `http://127.0.0.1:4318`: spans are sent to its `/v1/traces`. "
        "Where neither this nor the next one is set, nothing is traced.",
    )  # fmt: skip
    otlp_traces_endpoint: str | None = Field(
        None, validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", pattern=OTLP_URL,
        description="The whole URL for spans, instead.",
    )  # fmt: skip

    @field_validator("nats_inbox_prefix")
    @classmethod
    def _heard_by_workers(cls, prefix: str | None) -> str | None:
        # Elsewhere workers do not answer (decision 0016), and whoever asks would take each of them for silent.
        if prefix is not None and INBOX_PREFIX.fullmatch(prefix) is None:
            raise ValueError(
                "it begins with _INBOX, where workers answer, as _INBOX_me; letters, digits, -, _ and . may follow"
            )
        return prefix

    @field_validator("s3_bucket")
    @classmethod
    def _bucket(cls, name: str) -> str:
        # What minio takes, old names with _ and capitals among it: it says so in the middle of the start.
        if BUCKET.fullmatch(name) is None:
            raise ValueError(NO_BUCKET)
        return name

    @field_validator("s3_endpoint", "s3_public_endpoint")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        if url is None:
            return url
        if "@" in url:
            raise ValueError("leave the credentials out: they have settings of their own")
        if re.fullmatch(r"https?://[^/?#\s]+/?", url) is None:
            raise ValueError(
                "write http:// or https://, host and port, and nothing else; the bucket has its own setting"
            )
        return url

    @property
    def traces_url(self) -> str | None:
        """Where spans are sent; None: there are none."""
        if self.otlp_traces_endpoint:
            return self.otlp_traces_endpoint
        return f"{self.otlp_endpoint.rstrip('/')}/v1/traces" if self.otlp_endpoint else None

    def nats_options(self) -> dict[str, Any]:
        """Credentials, inbox and TLS for `jetstream.connect`; raises FatalError `settings` where a file is no good."""
        return credentials.inbox(self.nats_inbox_prefix) | self._nats_identity() | self._nats_tls()

    def _nats_identity(self) -> dict[str, Any]:
        if self.nats_nkey_seed is not None:
            return credentials.nkey(self.nats_nkey_seed.get_secret_value(), self.nats_inbox_prefix)
        if self.nats_creds is not None:
            return {"user_credentials": str(self.nats_creds)}
        if self.nats_user is not None:
            password = self.nats_password.get_secret_value() if self.nats_password else ""
            return {"user": self.nats_user, "password": password}
        return {}

    def _nats_tls(self) -> dict[str, Any]:
        return credentials.tls(self.nats_tls_ca, self.nats_tls_cert, self.nats_tls_key)


def _days_or_off(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:  # it has an error of each of the two
        raise ValueError("write a number of days, 1 or more, or off") from None


Days = Annotated[float, Field(ge=1)]  # less than a day is within reach of a clock that is wrong
KeptDays = Annotated[Days | Literal["off"], WrapValidator(_days_or_off)]


class GatewaySettings(Settings):
    """The gateway's own."""

    gateway_roles: Literal["api,pipeline", "api", "pipeline"] = Field(
        "api,pipeline",
        description="What this gateway does. api: answers HTTP, and lets in what is published on the bus; pipeline: "
        "moves jobs on, and of HTTP has probes and metrics only. At least one of each must run.",
    )  # fmt: skip
    http_host: str = Field("127.0.0.1", description="The address to listen on.")
    http_port: int = Field(8080, ge=0, le=65535, description="0: a port that the OS chooses.")
    max_upload_bytes: int = Field(32 << 20, gt=0, description="The largest reference image, in bytes.")
    intake_concurrency: int = Field(8, ge=1, le=64, description="Requests, and events, handled at once.")
    worker_silence_s: float = Field(
        6.0, gt=0,
        description="A worker that is silent for so many seconds, and not connected to the bus, is dead: its tasks are "
        "handed out again.",
    )  # fmt: skip
    auth: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether callers need an API key; auto: unless it listens on a loopback address only."
    )
    tenant_rate: float = Field(
        20.0, ge=0,
        description="HTTP requests a second that a tenant may send, to all gateways together; 0: any number. This and "
        "the next three are for tenants of which `vidgen tenants set` says nothing else, and not for `default`.",
    )  # fmt: skip
    tenant_burst: int = Field(60, ge=0, description="How many of them may come at once.")
    tenant_open: int = Field(
        1000, ge=0,
        description="HTTP requests, feeds of events among them, that a tenant may have open at each gateway; 0: any.",
    )  # fmt: skip
    tenant_jobs: int = Field(500, ge=0, description="Jobs of a tenant that may have a task waiting or running; 0: any.")
    tenant_waiting: int = Field(
        8, ge=0, le=1000,
        description="Tasks of a tenant that may wait in one lane's queue, where there are several tenants; the others "
        "are held back, so that nobody waits behind all of them. 0: any number.",
    )  # fmt: skip
    presign_minutes: int = Field(15, ge=1, le=1440, description="How long a presigned URL is good for.")
    keep_events: Days = Field(7.0, description="Days for which the logs of jobs are kept.")
    keep_jobs: Days = Field(30.0, description="Days for which a job's record is kept, from its last change on.")
    keep_dead: Days = Field(30.0, description="Days for which dead letters are kept.")
    keep_uploads: KeptDays = Field(
        30.0,
        description="Days for which uploaded images are kept in the bucket, from their last upload on, and in any case "
        "while anything on the bus waits for them; off: for ever.",
    )
    keep_checkpoints: KeptDays = Field(
        1.0, description="The same for checkpoints, and in any case until their job has ended; off: for ever."
    )
    keep_artifacts: KeptDays = Field(
        30.0, description="The same for what jobs made, from the end of the job on; off: for ever."
    )

    webhook_secret: SecretStr | None = Field(
        None,
        description="`whsec_` and 24 to 64 random bytes in base64: each tenant's secret is made of it "
        "(`vidgen webhooks secret`). Without it `webhook_url` is refused.",
    )
    webhook_allow: str = Field(
        "",
        description="Receivers of webhooks beside those on the public internet: networks (`10.0.0.0/8`) and host "
        "names, separated by commas.",
    )
    webhook_ca_file: Path | None = Field(
        None, description="The certificate authorities of receivers (PEM), in place of the public ones."
    )
    webhook_timeout_s: float = Field(15.0, gt=0, le=60, description="How long a receiver may take to answer.")
    webhook_give_up_s: float = Field(
        86400.0, gt=0, le=5 * 86400, description="The age at which a webhook that nobody takes becomes a dead letter."
    )
    webhook_concurrency: int = Field(
        64,
        ge=1,
        le=512,
        description="Webhooks delivered at once, at most an eighth of them to one receiver and a quarter for one "
        "tenant but `default`.",
    )

    @property
    def serves_api(self) -> bool:
        """Whether clients may ask this gateway."""
        return "api" in self.gateway_roles

    @property
    def moves_jobs(self) -> bool:
        """Whether this gateway takes events from the bus, and sees to what goes on in the background."""
        return "pipeline" in self.gateway_roles

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers need an API key; raises FatalError where that is off and others can reach the address."""
        alone = is_loopback(self.http_host)
        if self.auth == "off" and not alone:
            raise errors.FatalError(
                f"VIDGEN_AUTH=off lets anybody in who reaches {self.http_host}: leave it out and make a key with "
                "`vidgen keys create --admin`, or set VIDGEN_HTTP_HOST=127.0.0.1",
                code="settings",
            )
        return self.auth == "on" or (self.auth == "auto" and not alone)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _worker_id() -> str:
    host = "".join(c if (c.isascii() and c.isalnum()) or c == "-" else "-" for c in socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


class WorkerSettings(Settings):
    """What both GPU services read; the model of each stage has its own variables."""

    worker_id: str = Field(
        default_factory=_worker_id, pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="Names this worker; made of host, process and chance where it is not set.",
    )  # fmt: skip
    metrics_host: str = Field("127.0.0.1", description="The address for `/metrics`, `/healthz` and `/readyz`.")
    metrics_port: int = Field(0, ge=0, le=65535, description="Its port; 0: one that the OS chooses.")
    nice: int = Field(
        0, ge=0, le=19,
        description="How far this worker lets others go first on its processors, as `nice` counts it: a gateway on the "
        "same machine answers sooner while it computes. With more than 0 it interrupts nobody when it is woken, either "
        "(`SCHED_BATCH` of Linux). `vidgen up` sets 10, for its servers too, but 0 for `vidgen worker`.",
    )  # fmt: skip
    work_dir: Path | None = Field(None, description="Scratch space; a temporary folder by default.")
    max_attempts: int = Field(3, ge=1, le=9, description="Tries of a task before it is given up.")
    backoff_base: float = Field(1.0, ge=0, description="Seconds before the second attempt; doubles with each.")
    backoff_limit: float = Field(60.0, ge=0, description="The longest wait between two attempts, in seconds.")
    grace_s: float = Field(600.0, gt=0, description="How long a draining worker may finish what runs.")
    checkpoint: Literal["auto", "off"] = Field(
        "auto",
        description="auto: a task with much left to do is handed back in the middle when the worker drains, or an "
        "interactive task waits for a batch one, and goes on from that step elsewhere. off: it runs to its end.",
    )
    checkpoint_over_s: float = Field(
        20.0, ge=0, description="Seconds that must be left of a task to hand it back; what is shorter is finished."
    )
    heartbeat_s: float = Field(3.0, gt=0, description="How often the worker registry is refreshed.")
    store_patience_s: float = Field(
        300.0, ge=0, description="How long a task waits for an object store that does not answer, before it fails."
    )
    hang_factor: float = Field(
        10.0, ge=0,
        description="An engine that says nothing for this many times the longest silence that tasks of that size took "
        "here hangs: its task is handed on, and the worker leaves. 0: it is waited for, for ever.",
    )  # fmt: skip
    hang_least_s: float = Field(
        60.0, gt=0,
        description="Silence of an engine that is always borne, in seconds. A worker that leaves waits as long for "
        "what an engine is still at.",
    )  # fmt: skip
    hang_first_s: float = Field(
        900.0, gt=0,
        description="The same for the first task of a size, which may compile, for one for which memory ran out, for "
        "models that change places, and for a start that reads nothing and is not ready.",
    )  # fmt: skip
    gpu_usd_per_hour: float = Field(
        0.0, ge=0, description="What this worker's GPU costs, or both where it has two; gives cost_usd."
    )

    engine: Literal["auto", "preview", "real"] = Field(
        "auto", description="auto: the real model where its weights and a GPU are found, else the CPU preview."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 on a GPU, float32 on the CPU."
    )
    profile: Literal["auto", "resident-bf16", "resident-fp8", "offload-fp8"] = Field(
        "auto", description="How a model is laid into the GPU's memory; auto: the fastest that fits what is found."
    )
    attention: Literal["auto", "torch", "cudnn", "flash3", "flash3-8bit", "sage"] = Field(
        "auto",
        description="auto: FlashAttention 3 where it is installed on a Hopper GPU, else torch's, and of a video model "
        "those layers in 8 bits that a trial on its weights proves; flash3: all in 16 bits; flash3-8bit and sage: "
        "faster and lossy, without a trial.",
    )
    compile: Literal["auto", "off", "blocks", "full"] = Field(
        "auto",
        description="auto: blocks, on a GPU, but the edit's in FP8 where FlashAttention 3 and graphs leave nothing to "
        "gain; full: the VAE too, which compiles anew at each size that comes, for half a minute or more.",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="auto: the kernels of an edit's text encoder, and with FlashAttention 3 of its transformer, are "
        "recorded and launched as one where the GPU holds the weights; off: one by one.",
    )
    vae: Literal["auto", "stock"] = Field(
        "auto",
        description="auto: the VAE in fused kernels where the GPU is a Hopper, and frames that stand still encoded "
        "once; stock: as diffusers has it.",
    )
    compile_cache: Path | None = Field(
        None,
        description="Where what was compiled, what a trial of attention found, and what importing works out (70 MB a "
        "service) is kept for the next start: a folder beside the weights, say, from which programs may be run. By "
        "default torch's temporary folder, and nothing of imports.",
    )
    step_cache: int = Field(
        1, ge=1, le=5,
        description="N over 1: in the middle of a run one step in N is computed, the others are foretold from those "
        "before. Faster in long runs, and lossy.",
    )  # fmt: skip
    sleep_in: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="Where a model's weights are while another one has the GPU (`vidgen worker`): in pinned host "
        "memory, or in VIDGEN_WORK_DIR on disk; auto: in memory where enough of it is available.",
    )
    verify_weights: Literal["size", "full"] = Field(
        "size",
        description="What is compared with a model's manifest before it serves: the files' sizes, or (full) checksums.",
    )
    preview_seconds_per_step: float = Field(0.0, ge=0, description="A pace for the preview engines, for load tests.")

    edit_model: str = Field(QWEN_MODEL, description="A model id or a local folder.")
    edit_revision: str | None = Field(None, description="The commit of the model id; needed to download it.")
    edit_lora: str | None = Field(None, description="A LoRA: local .safetensors file or folder.")
    edit_reference_area: int | None = Field(
        None, ge=4096, description="Pixels to which references are resized for the VAE; by default the model's 1024²."
    )
    edit_condition_area: int | None = Field(
        None, ge=784, description="Pixels to which references are resized for the text encoder; by default 384²."
    )
    i2v_model: str = Field(WAN_MODEL, description="A model id or a local folder.")
    i2v_revision: str | None = Field(None, description="The commit of the model id; needed to download it.")
    i2v_lora: str | None = Field(None, description="A LoRA; with Wan 2.2 that of the high-noise expert.")
    i2v_lora_2: str | None = Field(None, description="The LoRA of Wan 2.2's low-noise expert.")
    i2v_guidance_device: str | None = Field(
        None, pattern=r"^(cpu|cuda(:\d+)?)$",
        description="A second GPU, such as `cuda:1`, for one clip: half of each step with guidance is computed there, "
        "by a process of its own.",
    )  # fmt: skip

    @field_validator("attention")
    @classmethod
    def _of_numbers_that_it_takes(cls, attention: str, given: ValidationInfo) -> str:
        if given.data.get("dtype") == "float32" and attention in ("flash3", "flash3-8bit", "sage"):
            raise ValueError(f"{attention} takes no float32: leave it or VIDGEN_DTYPE out")
        return attention

    @field_validator("i2v_guidance_device")
    @classmethod
    def _another_gpu(cls, second: str | None, given: ValidationInfo) -> str | None:
        first = {"auto": "cuda:0", "cuda": "cuda:0"}.get(device := given.data.get("device", "cpu"), device)
        if second is not None and second != "cpu" and {"cuda": "cuda:0"}.get(second, second) == first:
            raise ValueError(f"{second} is the first GPU (VIDGEN_DEVICE={device}): name another one")
        return second

    def layout(self) -> dict[str, Any]:
        """How an engine is laid into the device: the fields of `vidgen.accel.engine.Layout`."""
        names = (
            "device", "dtype", "profile", "attention", "compile", "cuda_graphs", "vae", "compile_cache", "step_cache",
            "sleep_in", "work_dir",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def devices(self, stages: Collection[Stage]) -> tuple[str, ...]:
        """What a worker of these stages computes on."""
        second = self.i2v_guidance_device if "i2v" in stages else None
        return (self.device,) if second is None else (self.device, second)

    def model_of(self, stage: Stage) -> tuple[str, str | None]:
        """Model id or folder, and pinned revision, of a stage."""
        return (self.edit_model, self.edit_revision) if stage == "edit" else (self.i2v_model, self.i2v_revision)


def read(kind: type[T]) -> T:
    """The settings from the environment; raises FatalError naming each wrong variable."""
    try:
        return kind()
    except ValidationError as exc:
        named = {str(field.validation_alias) for field in kind.model_fields.values()}
        wrong = "; ".join(
            f"{path if path in named else f'VIDGEN_{path.upper()}'}: {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors()
            for path in [str(error["loc"][0])]
        )
        raise errors.FatalError(f"the settings are wrong: {wrong}", code="settings") from exc


def refuse_arguments(command: str) -> None:
    """End a service that was given arguments: it has none, and who asks for help is not to be served a gateway."""
    given = sys.argv[1:]
    if given:
        asked = given in (["--help"], ["-h"])
        where = "It takes no arguments. Its settings are VIDGEN_* variables: docs/reference.md, Settings."
        (sys.stdout if asked else sys.stderr).write(f"usage: {command}\n\n{where}\n")
        raise SystemExit(0 if asked else 2)


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────

BEGIN, END = "<!-- settings: begin (python -m vidgen.settings FILE writes this) -->", "<!-- settings: end -->"
GROUPS: tuple[tuple[str, type[Settings]], ...] = (
    ("Every process", Settings), ("The gateway", GatewaySettings),
    ("edit-service, i2v-service and vidgen worker", WorkerSettings),
)  # fmt: skip


def reference_table() -> str:
    """Every variable as markdown tables, for `docs/reference.md`."""
    parts = []
    for title, kind in GROUPS:
        parts += [f"**{title}**", "", "| variable | default | meaning |", "|---|---|---|", *_rows(kind), ""]
    return "\n".join(parts)


def _rows(kind: type[Settings]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        if kind is Settings or name not in Settings.model_fields:
            variable = field.validation_alias or f"VIDGEN_{name.upper()}"
            yield f"| `{variable}` | {_default(field)} | {_meaning(field)} |"


def _default(field: FieldInfo) -> str:
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    unset = field.default_factory is not None or value is None or value == ""
    return "none" if unset else f"`{value}`"


def _meaning(field: FieldInfo) -> str:
    allowed = [f"`{value}`" for value in get_args(field.annotation) if isinstance(value, str)]
    return " ".join(filter(None, (field.description, f"One of {', '.join(allowed)}." if allowed else "")))


if __name__ == "__main__":
    reference.put_between(Path(sys.argv[1]), BEGIN, END, reference_table())
