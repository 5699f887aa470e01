"""The seam to the object store, and S3 (the `minio` client) behind it. Keys are immutable: a key names one content."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error

from vidgen import contracts, errors, presign
from vidgen.settings import Settings

UPLOADS, JOBS, CHECKPOINTS = "uploads/", "jobs/", "checkpoints/"
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_./-]{0,499}")
CHUNK = 1 << 20
LINK_LIFE = timedelta(minutes=15)
READY_TIMEOUT = 3.0
BORNE = timedelta(minutes=15)  # between a signature's time and the store's, by the rules of S3
DATE_S = 2.0  # by which the date of an answer may differ from what the store compared
NO_KEY = f"{UPLOADS}-"  # no upload is called so
MISSING = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchUpload"})
NO_BUCKET = "NoSuchBucket"
UNKNOWN_KEY = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


@dataclass(frozen=True)
class Stat:
    """What the store knows of an object; `tag` is another one for other content, "" where the store gives none."""

    key: str
    size: int
    content_type: str
    modified: datetime | None = None
    metadata: dict[str, str] | None = None
    tag: str = ""


@dataclass(frozen=True)
class Shown:
    """How a file is sent to a browser: the headers of the answer."""

    content_type: str
    disposition: str


class ArtifactStore(Protocol):
    """Files by key. Raises NotFoundError for a key that is not there, StoreError when the store does not answer."""

    async def put(self, key: str, path: Path, content_type: str, metadata: dict[str, str] | None = None) -> None:
        """Store a file whole or not at all."""

    async def fetch(self, key: str, path: Path, limit: int | None = None) -> int:
        """Copy an object to `path`, and say its size; RejectedError `too_large` when it is over `limit` bytes.

        A folder that is not there is made, for this user alone.
        """

    async def stat(self, key: str) -> Stat | None:
        """What is known of `key`, None if there is no such object."""

    def read(self, key: str, start: int = 0, length: int = 0) -> AsyncIterator[bytes]:
        """The bytes from `start` on, `length` of them (0: all), in chunks."""

    async def url(self, key: str, *, expires: timedelta = LINK_LIFE, shown: Shown | None = None) -> str:
        """A presigned URL to get a file, which comes as `shown` says, whatever the object was stored as."""

    async def upload_url(self, key: str, content_type: str, size: int, *, expires: timedelta = LINK_LIFE) -> str:
        """A presigned URL to put one file of this size, once, with `upload_headers`; it is good for nothing else."""

    async def page(self, prefix: str, after: str = "", limit: int = 1000) -> list[Stat]:
        """Up to `limit` objects under `prefix` with keys behind `after`, by key; size and time are what is known."""

    async def remove(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there any more is no error."""

    async def ready(self) -> bool:
        """Whether the store answers now, takes this key, and has the bucket."""

    async def require(self) -> None:
        """Raise StoreError where the store is not ready: it says why."""


def job_prefix(job_id: str) -> str:
    return f"{JOBS}{job_id}/"


def artifact_key(job_id: str, name: str) -> str:
    """The deterministic key of a job's artifact."""
    return f"{job_prefix(job_id)}{name}"


def uploads_prefix(tenant: str) -> str:
    """Where a tenant's references lie."""
    return f"{UPLOADS}{tenant}/"


def is_under(key: str, *prefixes: str) -> bool:
    """Whether a key begins with one of the prefixes and stays there."""
    # Some servers keep keys as paths: no part may be empty or point elsewhere.
    return key.startswith(prefixes) and KEY.fullmatch(key) is not None and not {"", ".", ".."} & set(key.split("/"))


def check_key(key: str, job_id: str | None, tenant: str = contracts.DEFAULT_TENANT) -> None:
    """RejectedError unless `key` is under the tenant's uploads or the job's own prefix, with no way out of it.

    All of `uploads/` is the operator's own.
    """
    uploads = UPLOADS if tenant == contracts.DEFAULT_TENANT else uploads_prefix(tenant)
    allowed = (uploads,) if job_id is None else (uploads, job_prefix(job_id))
    if not is_under(key, *allowed):
        raise errors.RejectedError(
            f"only keys under {uploads} and the job's own prefix may be used: upload the image first "
            "(POST /v1/uploads)",
            code="key_not_allowed",
        )


def upload_headers(content_type: str, size: int) -> dict[str, str]:
    """The headers that an upload must come with; the last one lets it happen once: what was checked stays as it is."""
    return {"Content-Type": content_type, "Content-Length": str(size), "If-None-Match": "*"}


def sha256_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(key: str) -> errors.NotFoundError:
    return errors.NotFoundError(f"no object at key {key}: upload it first")


def no_bucket() -> errors.StoreRefusedError:
    return errors.StoreRefusedError("the object store has no such bucket: correct VIDGEN_S3_BUCKET")


def too_large(size: int, limit: int, field: str | None = None) -> errors.RejectedError:
    return errors.RejectedError(
        f"the object has {size:,} bytes, more than the {limit:,} allowed: send a smaller file",
        code="too_large", field=field,
    )  # fmt: skip


def local_file(exc: OSError) -> errors.StoreError:
    return errors.StoreError(
        f"a local file could not be read or written: {exc.strerror or type(exc).__name__}", code="local_file"
    )


def _write(file: io.FileIO, chunk: bytes) -> int:
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) :]
    return len(chunk)


def _ahead(refusal: urllib3.BaseHTTPResponse) -> float:
    """By how many seconds the store's clock is ahead of ours, where that is why it refused; else 0.

    By its answer's date: what it refuses to a HEAD it gives no reason for.
    """
    try:
        ahead = (parsedate_to_datetime(refusal.headers.get("date", "")) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return 0.0
    return ahead if abs(ahead) > BORNE.total_seconds() - DATE_S else 0.0


@contextlib.contextmanager
def _translated(key: str = "") -> Iterator[None]:
    try:
        yield
    except S3Error as exc:
        if exc.code in MISSING:
            raise missing(key) from exc
        if exc.response.status == HTTPStatus.FORBIDDEN and (ahead := _ahead(exc.response)):
            apart = f"{abs(ahead) / 60:.0f} minutes {'ahead of' if ahead > 0 else 'behind'} this machine's"
            raise errors.StoreError(
                f"the object store's clock is {apart}: it refuses {BORNE.seconds // 60} and more, so set both by NTP",
                code="store_clock",
            ) from exc
        if exc.code == NO_BUCKET:
            raise no_bucket() from exc
        if exc.response.status < 500:
            keys = ": correct VIDGEN_S3_ACCESS_KEY and VIDGEN_S3_SECRET_KEY, or what that key may do"
            remedy = keys if exc.response.status in UNKNOWN_KEY else ""
            raise errors.StoreRefusedError(f"the object store refused: {exc.code}{remedy}") from exc
        raise errors.StoreError(f"the object store could not: {exc.code}") from exc
    except (MinioException, urllib3.exceptions.HTTPError) as exc:
        raise errors.StoreError(f"the object store did not answer: {type(exc).__name__}") from exc
    except OSError as exc:  # urllib3 wraps those of the network
        raise local_file(exc) from exc


class S3Store:
    """A bucket of an S3 server. Calls run in threads: as fast as any async client (FACTS §2)."""

    def __init__(
        self, endpoint: str, access_key: str, secret_key: str, bucket: str, *, region: str = "us-east-1",
        public_endpoint: str | None = None,
    ) -> None:  # fmt: skip
        pool = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=2, read=30), retries=False, maxsize=32, cert_reqs="CERT_REQUIRED"
        )

        def client(url: str) -> Minio:
            parts = urlsplit(url)
            return Minio(
                endpoint=parts.netloc, access_key=access_key, secret_key=secret_key, region=region,
                secure=parts.scheme == "https", http_client=pool,
            )  # fmt: skip

        self.bucket, self._keys, self._region = bucket, (access_key, secret_key), region
        self._client = client(endpoint)
        # Signatures cover the host, so links for people are signed for the name that they can reach.
        self._signer = client(public_endpoint or endpoint)

    @classmethod
    def from_settings(cls, settings: Settings) -> S3Store:
        """The store that the settings name."""
        return cls(
            settings.s3_endpoint,
            settings.s3_access_key.get_secret_value(),
            settings.s3_secret_key.get_secret_value(),
            settings.s3_bucket,
            region=settings.s3_region,
            public_endpoint=settings.s3_public_endpoint,
        )

    async def put(self, key: str, path: Path, content_type: str, metadata: dict[str, str] | None = None) -> None:
        def call() -> None:
            with _translated(key), path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                self._client.put_object(
                    self.bucket, key, file, size, content_type=content_type, metadata=dict(metadata or {})
                )

        await asyncio.to_thread(call)

    async def fetch(self, key: str, path: Path, limit: int | None = None) -> int:
        def call() -> int:
            with _translated(key):
                # First: whoever is gone when an answer comes late finds nothing made for it.
                path.parent.mkdir(0o700, exist_ok=True)
                response = self._client.get_object(self.bucket, key)
                try:
                    size = int(response.headers["content-length"])  # S3 always says; a short answer raises below
                    if limit is not None and size > limit:
                        raise too_large(size, limit)
                    written = 0
                    with path.open("wb", buffering=0) as file:
                        for chunk in response.stream(CHUNK):
                            written += _write(file, chunk)
                finally:
                    response.close()
                    response.release_conn()
                if written != size:
                    raise errors.StoreError("the object store cut a download short")
                return size

        return await asyncio.to_thread(call)

    async def stat(self, key: str) -> Stat | None:
        def call() -> Stat | None:
            try:
                with _translated(key):
                    found = self._client.stat_object(self.bucket, key)
            except errors.NotFoundError:
                return None
            metadata = {
                name.lower().removeprefix("x-amz-meta-"): value
                for name, value in (found.metadata or {}).items()
                if name.lower().startswith("x-amz-meta-")
            }
            tag = found.etag or ""
            return Stat(key, found.size or 0, found.content_type or "", found.last_modified, metadata, tag)

        return await asyncio.to_thread(call)

    async def read(self, key: str, start: int = 0, length: int = 0) -> AsyncIterator[bytes]:
        def opened() -> urllib3.BaseHTTPResponse | None:
            with _translated(key):
                try:
                    return self._client.get_object(self.bucket, key, offset=start, length=length)
                except S3Error as exc:
                    if exc.code == "InvalidRange":  # nothing is there past the end
                        return None
                    raise

        response = await asyncio.to_thread(opened)
        if response is None:
            return
        try:
            while True:
                with _translated(key):
                    chunk = await asyncio.to_thread(response.read, CHUNK)
                if not chunk:
                    return
                yield chunk
        finally:
            response.close()
            response.release_conn()

    async def url(self, key: str, *, expires: timedelta = LINK_LIFE, shown: Shown | None = None) -> str:
        overrides: dict[str, str | list[str] | tuple[str]] = {}
        if shown is not None:
            overrides["response-content-type"] = shown.content_type
            overrides["response-content-disposition"] = shown.disposition
        with _translated(key):
            return self._signer.get_presigned_url("GET", self.bucket, key, expires=expires, response_headers=overrides)

    async def upload_url(self, key: str, content_type: str, size: int, *, expires: timedelta = LINK_LIFE) -> str:
        with _translated(key):
            address = self._signer.get_presigned_url("PUT", self.bucket, key, expires=expires).partition("?")[0]
        headers = upload_headers(content_type, size)
        return presign.url_with_headers("PUT", address, headers, self._keys, self._region, expires)

    async def page(self, prefix: str, after: str = "", limit: int = 1000) -> list[Stat]:
        def call() -> list[Stat]:
            with _translated(prefix):
                found = self._client.list_objects(self.bucket, prefix, recursive=True, start_after=after or None)
                return [
                    Stat(one.object_name or "", one.size or 0, "", one.last_modified)
                    for one in itertools.islice((one for one in found if not one.is_dir), limit)
                ]

        return await asyncio.to_thread(call)

    async def remove(self, keys: Sequence[str]) -> None:
        def call() -> None:
            with _translated():
                failed = list(self._client.remove_objects(self.bucket, [DeleteObject(key) for key in keys]))
            if failed:
                raise errors.StoreError(f"the object store kept {len(failed)} objects: {failed[0].code}")

        await asyncio.to_thread(call)

    async def ready(self) -> bool:
        try:
            await self.require()
        except errors.StoreError:
            return False
        return True

    async def require(self) -> None:
        try:
            async with asyncio.timeout(READY_TIMEOUT):  # a store that hangs is not ready; the thread ends by itself
                there = await asyncio.to_thread(self._is_there)
        except TimeoutError:
            raise errors.StoreError("the object store did not answer in time") from None
        if not there:
            raise no_bucket()

    def _is_there(self) -> bool:
        """Whether the bucket is there: asked for a file, for which nobody needs a right to the whole bucket."""
        with _translated():
            try:
                self._client.get_object(self.bucket, NO_KEY).close()
            except S3Error as exc:
                if exc.code not in ("NoSuchKey", NO_BUCKET):
                    raise
                return exc.code == "NoSuchKey"
        return True

    async def ensure_bucket(self) -> None:
        """Create the bucket if it is not there; whoever may not create one waits for it."""

        def call() -> None:
            with _translated():
                if not self._is_there():
                    try:
                        self._client.make_bucket(self.bucket)
                    except S3Error as exc:
                        if exc.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                            raise

        await asyncio.to_thread(call)
