"""The gateway from code: submit a request, watch the job as an async iterator, download what it made."""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
import os
import random
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from vidgen import errors
from vidgen.contracts import (
    MAX_REFERENCES,
    AnyEvent,
    DeadLetter,
    EditParams,
    Event,
    FieldError,
    I2VParams,
    Job,
    JobStatus,
    Lane,
    Progress,
    VideoRequest,
    WorkerInfo,
)

T = TypeVar("T", bound=BaseModel)

Image = Path | str | bytes
"""A file, by its path, or an image's bytes."""

Update = AnyEvent | Progress | Job
"""What `watch` yields: events and progress as they come, and the final Job last."""

TRIES = 3
SILENCE_S = 45.0  # the gateway sends a comment every 10 s: after four missed ones the connection is taken for dead
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0
COMMENT = ":"  # no event is called so: a field ends there
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Never through a proxy of the environment: `vidgen up` is here.
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


class Problem(BaseModel):
    """An RFC 9457 problem document; `status` 0 where there was no answer at all."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    type: str = "about:blank"
    title: str = ""
    status: int = 0
    detail: str = ""
    code: str = "error"
    errors: tuple[FieldError, ...] = ()


class GatewayError(errors.VidgenError):
    """The gateway refused, or did not answer.

    `status` is the HTTP status (0: no answer), `errors` names every wrong field.
    """

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None) -> None:
        super().__init__(problem.detail or problem.title or f"the gateway answered {problem.status}", code=problem.code)
        self.problem, self.retry_after_s = problem, retry_after_s
        self.status, self.title, self.detail = problem.status, problem.title, problem.detail
        self.errors = problem.errors

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed later."""
        return self.status == 0 or self.status == 429 or self.status >= 500


class RequestOptions(TypedDict, total=False):
    """The fields of a VideoRequest without its references."""

    edit: EditParams | None
    i2v: I2VParams | None
    job_id: str | None
    review: bool
    lane: Lane
    deadline_s: float | None
    webhook_url: str | None
    labels: dict[str, str]


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    next_cursor: str | None = None


class JobPage(_Page):
    """Jobs, newest first; `next_cursor` leads to the next page."""

    jobs: tuple[Job, ...]


class DeadEntry(DeadLetter):
    """A dead letter with its number, by which it is shown, replayed and dropped."""

    seq: int


class DeadPage(_Page):
    """Dead letters, newest first."""

    dead: tuple[DeadEntry, ...]


class _Slot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    key: str
    method: str
    url: str
    headers: dict[str, str]


class _Workers(BaseModel):
    workers: tuple[WorkerInfo, ...]


class _Bearer(httpx.Auth):
    """Sends the key along; httpx takes it off where a redirect leads to another host."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request


NO_ADDRESS = "it is no address: write http://HOST:PORT or https://HOST"


NOT_A_KEY = "the API key has characters that no key has: copy it anew"


def is_key(text: str) -> bool:
    """Whether a gateway can have made this key; a header takes nothing else."""
    return text.isascii() and text.isprintable()


def is_address(url: str) -> bool:
    """Whether a gateway can have this URL."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        return right and bool(httpx.URL(url).host)  # which has rules of its own for names and numbers
    except (ValueError, httpx.InvalidURL):  # a port that is too high, brackets around no address
        return False


class AsyncClient:
    """A client of one gateway; use it as an async context manager, or `aclose` it.

    Every method raises GatewayError. What is safe to repeat is repeated when a connection breaks.
    `api_key`, or else the variable VIDGEN_API_KEY, is for gateways that ask for a key; it goes to the gateway alone.
    What cannot be a key, or an address, raises GatewayError at once.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:  # fmt: skip
        if not is_address(base_url):
            raise GatewayError(_unreachable(f"the URL of the gateway: {NO_ADDRESS}"))
        self.base_url = base_url.rstrip("/")
        key = _sendable(api_key or os.environ.get("VIDGEN_API_KEY") or "")
        options: dict[str, Any] = {
            "base_url": self.base_url, "timeout": httpx.Timeout(timeout, connect=5.0), "transport": transport,
            "auth": _Bearer(key) if key else None,
        }  # fmt: skip
        try:
            self._http = httpx.AsyncClient(**options, mounts=_without_proxy())
        except ImportError as exc:  # the environment names a SOCKS proxy
            if httpx.URL(base_url).host not in THIS_MACHINE:
                detail = "a SOCKS proxy is set (ALL_PROXY): unset it, or pip install 'httpx[socks]'"
                raise GatewayError(_unreachable(detail)) from exc
            self._http = httpx.AsyncClient(**options, trust_env=False)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def submit(
        self,
        request: VideoRequest | None = None,
        *,
        images: Sequence[Image] = (),
        idempotency_key: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Job:
        """Submit a request, given whole or by its fields, and get its job.

        With `images` (1 to 3, files or their bytes) they are the references, and those of `request` are left out.
        Without, `request.references` name objects that are in the store already (`upload`). The same
        `idempotency_key` or `job_id` twice is one job; without either, a key is made so that a broken connection
        cannot make two. Raises pydantic's ValidationError for a request that no gateway would take.
        """
        if len(images) > MAX_REFERENCES:
            raise ValueError(f"images: at most {MAX_REFERENCES}, not {len(images)}")
        if request is None:
            # Placeholders: everything else is checked before a byte is sent.
            references = tuple(f"uploads/image-{number}" for number in range(len(images)))
            request = VideoRequest.model_validate({"references": references, **options})
        elif options:
            raise TypeError("give the request whole or by its fields, not both")
        key = idempotency_key or (secrets.token_urlsafe(16) if request.job_id is None else None)
        if key is not None and not (key.isascii() and key.isprintable()):
            key = quote(key)  # a header takes nothing else
        headers = {"Idempotency-Key": key} if key else {}
        if not images:
            sent = {"Content-Type": "application/json", **headers}
            return await self._model(Job, "POST", "/v1/jobs", content=request.to_bytes(), headers=sent)
        form = {"request": request.model_dump_json(exclude={"references"}, exclude_none=True)}
        files = [("image", await asyncio.to_thread(_as_part, image, n)) for n, image in enumerate(images)]
        return await self._model(Job, "POST", "/v1/jobs", data=form, files=files, headers=headers)

    async def upload(self, image: Image, content_type: str | None = None) -> str:
        """Put an image into the store, and get the key that a request's references take."""
        _, body, guessed = await asyncio.to_thread(_as_part, image, 0)
        asked = {"content_type": content_type or guessed, "size": len(body)}
        slot = await self._model(_Slot, "POST", "/v1/uploads", json=asked)
        # The link says who may: the key is none of the store's business.
        await self._call(slot.method, slot.url, headers=slot.headers, content=body, auth=None)
        return slot.key

    async def get(self, job_id: str) -> Job:
        return await self._model(Job, "GET", _job(job_id))

    async def list(
        self, *, status: JobStatus | str | None = None, cursor: str | None = None, limit: int | None = None,
        tenant: str | None = None,
    ) -> JobPage:  # fmt: skip
        """One page of jobs, newest first; an operator's key shows those of all tenants, or of one."""
        query = {"status": status, "cursor": cursor, "limit": limit, "tenant": tenant}
        return await self._model(JobPage, "GET", "/v1/jobs", params=_given(query))

    async def cancel(self, job_id: str) -> Job:
        return await self._model(Job, "POST", _job(job_id, "cancel"))

    async def retry(self, job_id: str) -> Job:
        """Run it again from the stage that failed; what succeeded is not done again."""
        return await self._model(Job, "POST", _job(job_id, "retry"), tries=1)

    async def approve(self, job_id: str, candidate: int = 0) -> Job:
        """Let a reviewed job go on with this candidate of the edit."""
        return await self._model(Job, "POST", _job(job_id, "approve"), json={"candidate": candidate}, tries=1)

    async def watch(self, job_id: str, *, after: int = 0, patience: float = 120.0) -> AsyncGenerator[Update, None]:
        """Follow a job: its events (past sequence `after`), progress between them, and last the final Job.

        A broken connection is taken up again where it broke, without gaps or repeats; GatewayError when nothing was
        heard of the gateway for `patience` seconds. A job that waits in silence needs none.
        """
        loop = asyncio.get_running_loop()
        seen, pause, give_up = after, FIRST_PAUSE_S, loop.time() + patience
        while True:
            try:
                async with contextlib.aclosing(self._stream(job_id, seen)) as stream:
                    async for number, update in stream:
                        pause, give_up = FIRST_PAUSE_S, loop.time() + patience
                        if number is not None:
                            if number <= seen:
                                continue
                            seen = number
                        if update is not None:
                            yield update
                        if isinstance(update, Job):
                            return
            except GatewayError as exc:
                if not exc.passing or loop.time() + pause > give_up:
                    raise
            else:
                if loop.time() + pause > give_up:
                    raise GatewayError(_unreachable(f"{self.base_url} keeps ending the events of job {job_id}"))
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  spreads reconnects, no secret
            pause = min(LONGEST_PAUSE_S, pause * 2)

    async def _stream(self, job_id: str, after: int) -> AsyncGenerator[tuple[int | None, Update | None], None]:
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        if after:
            headers["Last-Event-ID"] = str(after)
        timeout = httpx.Timeout(SILENCE_S, connect=5.0)
        with _reported():
            async with self._http.stream("GET", _job(job_id, "events"), headers=headers, timeout=timeout) as answer:
                if answer.is_error:
                    await answer.aread()
                    _raise_for(answer)
                async for kind, number, data in _server_sent(_lines(answer.aiter_bytes())):
                    yield number, None if kind == COMMENT else _update_of(kind, data)

    async def wait(self, job_id: str) -> Job:
        """Watch a job to its end, and get it."""
        async with contextlib.aclosing(self.watch(job_id)) as updates:
            async for update in updates:
                if isinstance(update, Job):
                    return update
        raise AssertionError("watch ends with a job")

    async def download(self, job_id: str, name: str, path: Path) -> Path:
        """Write an artifact to `path`, whole or not at all; raises an OSError that names it where that cannot be.

        It comes from the store by a presigned link, or through the gateway where the store cannot be reached.
        """
        pause = FIRST_PAUSE_S
        for left in reversed(range(TRIES)):
            for query in ({}, {"proxy": "1"}):
                try:
                    await self._download(job_id, name, path, query)
                    return path
                except GatewayError as exc:
                    if exc.status != 0 or (query and not left):
                        raise
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    async def _download(self, job_id: str, name: str, path: Path, query: dict[str, str]) -> None:
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        url = _job(job_id, f"artifacts/{quote(name, safe='')}")
        try:
            await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
            with _reported():
                async with self._http.stream("GET", url, params=query, follow_redirects=True) as answer:
                    if answer.is_error:
                        await answer.aread()
                        _raise_for(answer)
                    with part.open("wb") as file:
                        async for chunk in answer.aiter_bytes(1 << 20):
                            await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(os.replace, part, path)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror or str(exc), str(path)) from exc
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    # ── the fleet, the dead letters, the gateway itself ──────────────────────────────────────────────────────────

    async def workers(self) -> tuple[WorkerInfo, ...]:
        return (await self._model(_Workers, "GET", "/v1/workers")).workers

    async def dead_list(self, *, cursor: str | None = None, limit: int | None = None) -> DeadPage:
        """One page of dead letters."""
        return await self._model(DeadPage, "GET", "/v1/dead", params=_given({"cursor": cursor, "limit": limit}))

    async def dead_show(self, seq: int) -> DeadEntry:
        return await self._model(DeadEntry, "GET", f"/v1/dead/{seq}")

    async def dead_replay(self, seq: int) -> Job:
        """Send the original payload again."""
        return await self._model(Job, "POST", f"/v1/dead/{seq}/replay", tries=1)

    async def dead_drop(self, seq: int) -> None:
        await self._call("DELETE", f"/v1/dead/{seq}", tries=1)

    async def ready(self) -> None:
        """Return if the gateway is ready to take jobs; raises GatewayError that says what is missing."""
        await self._call("GET", "/readyz", tries=1)

    # ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _model(self, model: type[T], method: str, url: str, *, tries: int = TRIES, **options: Any) -> T:
        answer = await self._call(method, url, tries=tries, **options)
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as exc:
            detail = (
                f"{self.base_url} answered {method} {url} with something else: is it a vidgen gateway of this version?"
            )
            raise GatewayError(Problem(status=answer.status_code, detail=detail, code="not_a_gateway")) from exc

    async def _call(self, method: str, url: str, *, tries: int = TRIES, **options: Any) -> httpx.Response:
        pause = FIRST_PAUSE_S
        for left in reversed(range(tries)):
            try:
                with _reported():
                    answer = await self._http.request(method, url, **options)
                _raise_for(answer)
                return answer
            except GatewayError as exc:
                if exc.status != 0 or not left:
                    raise
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")


def _job(job_id: str, what: str = "") -> str:
    if JOB_ID.fullmatch(job_id) is None:  # in a path it would be another address, or none
        detail = f"there is no job {job_id!r}: an id has letters, digits, - and _, at most 64"
        raise GatewayError(Problem(title="Not Found", status=404, detail=detail, code="job_not_found"))
    return f"/v1/jobs/{job_id}" + (f"/{what}" if what else "")


def _given(query: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in query.items() if value is not None}


def _as_part(image: Image, number: int) -> tuple[str, bytes, str]:
    """An image as a part of a form: name, bytes, content type; the type from the bytes, they know better."""
    if isinstance(image, bytes):
        name, body = f"image-{number}", image
    else:
        name, body = Path(image).name, Path(image).read_bytes()
        name = name.encode(errors="replace").decode()  # a file's name may be no text, and a form holds nothing else
    if body.startswith(b"\x89PNG"):
        kind = "image/png"
    elif body.startswith(b"\xff\xd8"):
        kind = "image/jpeg"
    elif body[:4] == b"RIFF" and body[8:12] == b"WEBP":
        kind = "image/webp"
    elif body[4:12] in (b"ftypavif", b"ftypavis"):
        kind = "image/avif"
    else:
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return name, body, kind


def _without_proxy() -> dict[str, httpx.AsyncBaseTransport | None]:
    return {f"all://[{host}]" if ":" in host else f"all://{host}": None for host in THIS_MACHINE}


def _sendable(key: str) -> str:
    """A key without the line end that a file or a shell may have left on it; what is no header is not repeated."""
    key = key.strip()
    if not is_key(key):
        raise GatewayError(Problem(title="Unauthorized", status=401, detail=NOT_A_KEY, code="unknown_key"))
    return key


def _unreachable(detail: str) -> Problem:
    return Problem(title="Gateway unreachable", status=0, detail=detail, code="gateway_unreachable")


class _reported(contextlib.AbstractContextManager[None]):  # noqa: N801  reads as a clause
    """No httpx exception passes it."""

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if not isinstance(exc, (httpx.HTTPError, httpx.InvalidURL)):
            return
        place = ""
        if isinstance(exc, httpx.RequestError):
            with contextlib.suppress(RuntimeError):
                place = f"{exc.request.url.scheme}://{exc.request.url.netloc.decode()} "
        what = str(exc) or type(exc).__name__
        raise GatewayError(_unreachable(f"{place}does not answer ({what}): is it running there?")) from exc


def _raise_for(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        problem = Problem.model_validate({**answer.json(), "status": answer.status_code})
    except (ValueError, TypeError):
        place = answer.request.url.copy_with(query=None, userinfo=b"")  # a link to the store is a credential
        detail = f"{answer.request.method} {place} was answered with {answer.status_code}"
        if place.path.startswith("/v1/"):
            detail += ", and not in a gateway's words: is that its address?"
        problem = Problem(title=answer.reason_phrase, status=answer.status_code, detail=detail, code="http_error")
    after = answer.headers.get("Retry-After", "")
    raise GatewayError(problem, retry_after_s=float(after) if after.isdecimal() else None)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The lines that have come to their end.

    httpx's own `aiter_lines` ends a line wherever `str.splitlines` does, and JSON may hold U+2028 and its like.
    """
    rest = b""
    async for chunk in chunks:
        *ended, rest = (rest + chunk).split(b"\n")
        for line in ended:
            yield line.removesuffix(b"\r").decode(errors="replace")


async def _server_sent(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, int | None, str]]:
    """Server-sent events as (type, id, data); one that is cut short is dropped, as the standard wants.

    A comment, which says that the gateway is there, is one of the type COMMENT.
    """
    kind, number, data = "message", None, list[str]()
    async for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "" if not line:
                if data:
                    yield kind, number, "\n".join(data)
                kind, number, data = "message", None, []
            case "":
                yield COMMENT, None, ""
            case "event":
                kind = value
            case "id" if value.isdecimal():
                number = int(value)
            case "data":
                data.append(value)


def _update_of(kind: str, data: str) -> Update | None:
    """What an event of the stream says; None for what a newer gateway may send and this client does not know."""
    try:
        if kind == "progress":
            return Progress.model_validate_json(data)
        if kind == "job":
            return Job.model_validate_json(data)
        return Event.validate_json(data)
    except ValidationError:
        if kind == "job":
            detail = "the gateway's final job cannot be read: it is of another version than this client"
            raise GatewayError(Problem(status=200, detail=detail, code="not_a_gateway")) from None
        return None
