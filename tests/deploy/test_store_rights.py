"""Who may do what in the store: every identity tries everything, on a server with what `vidgen identities` made."""

from __future__ import annotations

import asyncio
import fnmatch
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.error import S3Error
from tests import identities as installed
from tests.servers import skipped_at_home
from tests.workbench import task_of

from vidgen import checkpoints, permissions, results
from vidgen.artifacts import S3Store, artifact_key
from vidgen.contracts import Stage
from vidgen.engine import EngineInfo, Finished
from vidgen.errors import Suspended
from vidgen.identities import Identities, store_identities
from vidgen.local import S3Server
from vidgen.permissions import Role
from vidgen.results import MAIN_FILE

BUCKET = "vidgen"
EDIT, I2V = {"edit-service", "worker"}, {"i2v-service", "worker"}
WORKERS, GATEWAY, NOBODY = EDIT | I2V, {"gateway"}, set[str]()
SWEEPS = GATEWAY  # deletes what has had its time, and SeaweedFS knows no right to delete but that to write
ALL = tuple(sorted(WORKERS | GATEWAY))

STORED = (
    "uploads/photo.png", "uploads/acme/photo.png", "jobs/j1/reference-0.png", "jobs/j1/edit-0.png", "jobs/j1/video.mp4",
    "checkpoints/j1/edit-1-1.safetensors", "checkpoints/j1/i2v-1-1.safetensors", "backups/all.tar", "jobs.txt",
)  # fmt: skip
READ = {
    "uploads/photo.png": WORKERS | GATEWAY,
    "uploads/acme/photo.png": WORKERS | GATEWAY,
    "jobs/j1/reference-0.png": WORKERS | GATEWAY,
    "jobs/j1/edit-0.png": WORKERS | GATEWAY,
    "jobs/j1/video.mp4": WORKERS | GATEWAY,
    "checkpoints/j1/edit-1-1.safetensors": EDIT,
    "checkpoints/j1/i2v-1-1.safetensors": I2V,
    "backups/all.tar": NOBODY,
    "jobs.txt": NOBODY,
}
WRITTEN = {
    "uploads/new.png": GATEWAY,
    "uploads/acme/new.png": GATEWAY,
    "jobs/j2/reference-0.png": GATEWAY,
    "jobs/j2/edit-0.png": EDIT | SWEEPS,
    "jobs/j2/edit-3.png": EDIT | SWEEPS,
    "jobs/j2/video.mp4": I2V | SWEEPS,
    "jobs/j2/poster.jpg": I2V | SWEEPS,
    "jobs/j2/page.html": SWEEPS,
    "checkpoints/j2/edit-1-2.safetensors": EDIT | SWEEPS,
    "checkpoints/j2/i2v-1-2.safetensors": I2V | SWEEPS,
    "backups/new.tar": NOBODY,
    "new.txt": NOBODY,
}
Call = Callable[[Minio], Any]
ELSE: dict[str, Call] = {
    "list the bucket": lambda s3: list(s3.list_objects(BUCKET, recursive=True)),
    "list uploads": lambda s3: list(s3.list_objects(BUCKET, "uploads/", recursive=True)),
    "list jobs": lambda s3: list(s3.list_objects(BUCKET, "jobs/j1/", recursive=True)),
    "list versions": lambda s3: list(s3.list_objects(BUCKET, include_version=True)),
    "ask for the bucket": lambda s3: s3.bucket_exists(BUCKET),
    "make a bucket": lambda s3: s3.make_bucket("another"),
    "delete the bucket": lambda s3: s3.remove_bucket(BUCKET),
    "read the policy": lambda s3: s3.get_bucket_policy(BUCKET),
    "write a policy": lambda s3: s3.set_bucket_policy(BUCKET, json.dumps(PUBLIC)),
    "read the lifecycle": lambda s3: s3.get_bucket_lifecycle(BUCKET),
    "delete the lifecycle": lambda s3: s3.delete_bucket_lifecycle(BUCKET),
    "tag what is a backup": lambda s3: s3.delete_object_tags(BUCKET, "backups/all.tar"),
    "copy a backup": lambda s3: s3.copy_object(BUCKET, "jobs/j3/edit-0.png", CopySource(BUCKET, "backups/all.tar")),
    "delete an upload as another": lambda s3: s3.remove_object(BUCKET, "backups/all.tar"),
}
LISTS = {"list the bucket", "list uploads", "list jobs", "list versions"}
PUBLIC = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    ],
}

KEEP = {
    "Version": "2012-10-17",
    "Statement": [
        {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{BUCKET}/*"}
    ],
}


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Identities:
    return installed.made(tmp_path_factory.mktemp("identities"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, identities: Identities) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"), others=store_identities(identities, BUCKET))
    with asyncio.Runner() as runner:
        with skipped_at_home():
            runner.run(server.start())
        try:
            owner = client(server, server.access_key, server.secret_key)
            for key in STORED:
                owner.put_object(BUCKET, key, io.BytesIO(b"stored"), 6)
            yield server
        finally:
            runner.run(server.kill())


def client(server: S3Server, access_key: str, secret_key: str) -> Minio:
    return Minio(
        endpoint=urlsplit(server.endpoint).netloc, access_key=access_key, secret_key=secret_key, secure=False,
        region="us-east-1", http_client=urllib3.PoolManager(retries=False),
    )  # fmt: skip


def as_identity(server: S3Server, identities: Identities, name: str) -> Minio:
    given = identities.environment(name)
    return client(server, given["VIDGEN_S3_ACCESS_KEY"], given["VIDGEN_S3_SECRET_KEY"])


def may(call: Callable[..., Any], *given: Any) -> bool:
    """Whether the server lets that be done: anything but a refusal is a yes."""
    try:
        answer = call(*given)
        if isinstance(answer, urllib3.BaseHTTPResponse):
            answer.close()
    except S3Error as exc:
        return exc.code != "AccessDenied"
    return True


@pytest.mark.parametrize("name", ALL)
def test_an_identity_may_do_what_it_must_and_nothing_else(server: S3Server, identities: Identities, name: str) -> None:
    s3 = as_identity(server, identities, name)

    read = {key for key in READ if may(s3.get_object, BUCKET, key)}
    looked_at = {key for key in READ if may(s3.stat_object, BUCKET, key)}
    written = {key for key in WRITTEN if may(s3.put_object, BUCKET, key, io.BytesIO(b"new"), 3)}
    done = {what for what, call in ELSE.items() if may(call, s3)}

    assert read == looked_at == {key for key, who in READ.items() if name in who}
    assert written == {key for key, who in WRITTEN.items() if name in who}
    assert done == (LISTS if name in SWEEPS else NOBODY)


@pytest.mark.parametrize("name", ALL)
async def test_an_identity_learns_that_a_file_is_missing_and_that_the_store_is_there(
    server: S3Server, identities: Identities, name: str
) -> None:
    given = identities.environment(name)
    store = S3Store(server.endpoint, given["VIDGEN_S3_ACCESS_KEY"], given["VIDGEN_S3_SECRET_KEY"], BUCKET)
    assert await store.stat("jobs/none/edit-0.png") is None
    assert await store.ready()
    await store.ensure_bucket()


async def test_the_gateway_finds_and_deletes_what_has_had_its_time(
    server: S3Server, identities: Identities, tmp_path: Path
) -> None:
    given = identities.environment("gateway")
    store = S3Store(server.endpoint, given["VIDGEN_S3_ACCESS_KEY"], given["VIDGEN_S3_SECRET_KEY"], BUCKET)
    owner = client(server, server.access_key, server.secret_key)
    old = [
        f"{prefix}swept/{name}"
        for prefix, name in (("uploads/", "a.png"), ("jobs/", "video.mp4"), ("checkpoints/", "i2v-1-1"))
    ]
    for key in old:
        owner.put_object(BUCKET, key, io.BytesIO(b"old"), 3)

    found = [one.key for key in old for one in await store.page(key)]
    await store.remove(found)

    assert found == old
    assert [await store.page(key) for key in old] == [[], [], []]


@pytest.mark.parametrize("name", sorted(WORKERS))
async def test_a_worker_keeps_its_results_and_its_states_and_the_next_one_finds_them(
    server: S3Server, identities: Identities, name: Role, tmp_path: Path
) -> None:
    given = identities.environment(name)
    store = S3Store(server.endpoint, given["VIDGEN_S3_ACCESS_KEY"], given["VIDGEN_S3_SECRET_KEY"], BUCKET)
    info = EngineInfo(name="engine", model="model")
    for stage in permissions.STAGES_OF[name]:
        task = task_of(f"{name}-{stage}", stage)
        main = tmp_path / MAIN_FILE[stage]
        main.write_bytes(b"made")

        kept = await results.keep(store, task, results.made(task, [Finished(main, "image/png", 64, 64)], info))
        state = Suspended(1, 4)
        state.state = (2).to_bytes(8, "little") + b"{}"
        checkpoint = await checkpoints.keep(store, task, 1, info, state, tmp_path)

        assert await results.find(store, task) == kept
        found = await checkpoints.fetch(store, task, checkpoint, info, tmp_path)
        assert found.step == 1


def test_the_operator_and_tenants_have_no_keys_of_the_store(identities: Identities) -> None:
    assert {one.name for one in identities if not one.store_keys} == {
        "operator", *(f"publisher.{tenant}" for tenant in installed.TENANTS),
    }  # fmt: skip


def test_strangers_and_the_keys_of_yesterday_are_refused(server: S3Server, tmp_path: Path) -> None:
    other = installed.made(tmp_path / "another installation")
    for s3 in (client(server, "guessed", "guessed"), as_identity(server, other, "gateway")):
        with pytest.raises(S3Error) as caught:
            s3.get_object(BUCKET, "uploads/photo.png")
        assert caught.value.code == "InvalidAccessKeyId"
    answer = urllib3.request("GET", f"{server.endpoint}/{BUCKET}/uploads/photo.png")
    assert answer.status == 403


@pytest.mark.parametrize(("stage", "role"), [("edit", "edit-service"), ("i2v", "i2v-service")])
def test_what_a_stage_stores_is_among_what_its_service_may_write(stage: Stage, role: Role) -> None:
    keys = permissions.keys_of(role)
    assert keys is not None
    main = artifact_key("a-job", MAIN_FILE[stage])
    assert [pattern for pattern in keys.write if fnmatch.fnmatchcase(main, pattern)]


def test_where_a_policy_says_so_what_may_be_written_may_not_be_deleted(
    server: S3Server, identities: Identities
) -> None:
    owner, gateway = client(server, server.access_key, server.secret_key), as_identity(server, identities, "gateway")

    def delete() -> None:
        gateway.put_object(BUCKET, "uploads/kept.png", io.BytesIO(b"kept"), 4)
        gateway.remove_object(BUCKET, "uploads/kept.png")

    assert may(delete)
    owner.set_bucket_policy(BUCKET, json.dumps(KEEP))
    try:
        assert not may(delete)
        assert may(gateway.stat_object, BUCKET, "uploads/kept.png")
    finally:
        owner.delete_bucket_policy(BUCKET)


# ── real S3 ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
def test_the_policy_for_other_servers_says_the_same(name: Role) -> None:
    path = Path(__file__).parents[2] / "deploy" / "s3" / "policies" / f"{name}.json"
    policy = json.loads(path.read_text())
    assert set(policy) == {"Version", "Statement"}
    assert policy["Version"] == "2012-10-17"
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        assert set(statement) == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        for action in statement["Action"]:
            allowed.setdefault(action, set()).update(
                one.removeprefix(f"arn:aws:s3:::{BUCKET}").removeprefix("/") for one in statement["Resource"]
            )
    keys = permissions.keys_of(name)
    assert keys is not None
    assert allowed == {
        "s3:GetObject": set(keys.read), "s3:PutObject": set(keys.write), "s3:AbortMultipartUpload": set(keys.write),
        "s3:ListBucket": {""}, **({"s3:DeleteObject": set(keys.delete)} if keys.delete else {}),
    }  # fmt: skip
