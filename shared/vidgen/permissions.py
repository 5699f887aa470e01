"""Who may do what on the bus and in the store: the least with which each identity does its work, from `topology` alone.

`python -m vidgen.permissions deploy` writes what servers read: a role's rights for nats-server, IAM policies for S3.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from vidgen import topology
from vidgen.contracts import LANES, STAGES, Stage

Role = Literal["gateway", "edit-service", "i2v-service", "worker", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
STAGES_OF: dict[Role, tuple[Stage, ...]] = {
    "edit-service": ("edit",), "i2v-service": ("i2v",), "worker": STAGES,
}  # fmt: skip
INBOX = "_INBOX_"
OPERATORS_BUCKETS = frozenset({topology.KEYS_BUCKET, topology.TENANTS_BUCKET})
WRITTEN_BY_WORKERS = frozenset({topology.PROGRESS})
LOOKED_AT = frozenset({topology.EVENTS, topology.PROGRESS})  # for the newest message on a subject
COUNTED = frozenset({topology.TASKS, topology.HELD, topology.WEBHOOKS})  # by tenant
DELETED_FROM = frozenset({topology.TASKS, topology.HELD, topology.DEAD})  # a message at a time; elsewhere it acks
API = "$JS.API"


@dataclass(frozen=True)
class Rights:
    """What a user of the bus may publish, and what it may hear beside its own inbox."""

    publish: tuple[str, ...]
    hear: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    answers: bool = False  # whether it may answer, once, who asked it


def rights_of(role: Role) -> Rights:
    """What a role may do on the bus."""
    match role:
        case "gateway":
            return _gateway()
        case "operator":
            return Rights(tuple(_operator()))
        case _:
            stages = STAGES_OF[role]
            own = tuple(topology.subject_of_worker(stage, "*") for stage in stages)
            return Rights(tuple(_worker(stages)), hear=(topology.SUBJECT_CONTROL_ALL, *own), answers=True)


def inbox_of(public_key: str) -> str:
    """The prefix of a user's inboxes: nobody else may hear there."""
    return f"{INBOX}{public_key}"


# ── the gateway makes what the topology names, takes what is its own, and moves jobs on ───────────────────────────


def _gateway() -> Rights:
    # What `Bus.follow` reads a job's log through has a name that the server chose; of the durable ones, nothing.
    durable = [c.name for c in topology.CONSUMERS if c.stream == topology.EVENTS]
    never = tuple(f"{API}.CONSUMER.DELETE.{topology.EVENTS}.{name}" for name in durable)
    hear = topology.subject_of_progress("*"), topology.SUBJECT_USAGE
    return Rights(tuple(_gateways_subjects()), hear=hear, never=never)


def _gateways_subjects() -> Iterator[str]:
    for stream in topology.STREAMS:
        yield from _made(stream.name)
        if stream.name not in WRITTEN_BY_WORKERS:
            yield from (subject for subject in stream.subjects if not subject.startswith("$"))
        if stream.name in DELETED_FROM:
            yield f"{API}.STREAM.MSG.DELETE.{stream.name}"
        if stream.name in COUNTED:
            yield f"{API}.DIRECT.GET.{stream.name}"
        if stream.name in LOOKED_AT:
            yield f"{API}.DIRECT.GET.{stream.name}.>"
    for bucket in topology.BUCKETS:
        yield from _made(f"KV_{bucket.name}")
        yield f"{API}.DIRECT.GET.KV_{bucket.name}.>"
        if bucket.name != topology.WORKERS_BUCKET:
            yield f"$KV.{bucket.name}.>"
    stages = {topology.consumer_of(stage, lane).name for stage in STAGES for lane in LANES}
    for consumer in topology.CONSUMERS:
        yield from _bound(consumer)
        yield f"{API}.CONSUMER.INFO.{consumer.stream}.{consumer.name}"
        if consumer.name not in stages:
            yield from _taken(consumer)
        else:
            yield f"$JS.ACK.{consumer.stream}.{consumer.name}.>"  # hands back what a dead worker held
    yield f"{API}.CONSUMER.CREATE.{topology.EVENTS}"
    yield f"{API}.CONSUMER.MSG.NEXT.{topology.EVENTS}.*"
    yield f"{API}.CONSUMER.DELETE.{topology.EVENTS}.*"
    yield topology.SUBJECT_CONTROL_ALL
    yield topology.SUBJECT_USAGE
    yield from (topology.subject_of_worker(stage, "*") for stage in STAGES)  # is anybody there, and still at it


def _made(stream: str) -> Iterator[str]:
    for verb in ("INFO", "CREATE", "UPDATE", "MSG.GET"):
        yield f"{API}.STREAM.{verb}.{stream}"


def _bound(consumer: topology.Consumer) -> Iterator[str]:
    """How nats-py makes a consumer: by its durable name at first, by name and filter when it is changed."""
    yield f"{API}.CONSUMER.DURABLE.CREATE.{consumer.stream}.{consumer.name}"
    filtered = f".{consumer.filter_subject}" if consumer.filter_subject else ""
    yield f"{API}.CONSUMER.CREATE.{consumer.stream}.{consumer.name}{filtered}"


def _taken(consumer: topology.Consumer) -> Iterator[str]:
    yield f"{API}.CONSUMER.MSG.NEXT.{consumer.stream}.{consumer.name}"
    yield f"$JS.ACK.{consumer.stream}.{consumer.name}.>"
    yield f"$JS.ACK.*.*.{consumer.stream}.{consumer.name}.>"  # as servers with `js_ack_fc_v2` write it


# ── a worker takes its stage's tasks, and says what becomes of them ──────────────────────────────────────────────


def _worker(stages: Sequence[Stage]) -> Iterator[str]:
    for stage in stages:
        for lane in LANES:
            consumer = topology.consumer_of(stage, lane)
            yield f"{API}.CONSUMER.INFO.{consumer.stream}.{consumer.name}"
            yield from _taken(consumer)
        yield topology.subject_of_dead(stage, ">")
        yield f"$KV.{topology.WORKERS_BUCKET}.{stage}.*"
        yield topology.subject_of_worker(stage, "*")  # are you still at it
    yield f"{API}.STREAM.MSG.GET.{topology.EVENTS}"
    yield topology.subject_of_events("*")
    yield topology.subject_of_progress("*")


def _operator() -> Iterator[str]:
    yield f"{API}.STREAM.INFO.{topology.REQUESTS}"  # is the bus there, are the streams
    for verb in ("INFO", "MSG.GET", "MSG.DELETE"):
        yield f"{API}.STREAM.{verb}.{topology.DEAD}"
    for bucket in topology.BUCKETS:
        if bucket.name in OPERATORS_BUCKETS:
            yield f"{API}.STREAM.INFO.KV_{bucket.name}"
            yield f"{API}.STREAM.MSG.GET.KV_{bucket.name}"
            yield f"{API}.DIRECT.GET.KV_{bucket.name}.>"
            yield f"$KV.{bucket.name}.>"


# ── the store: keys that may be read, and written, by pattern ────────────────────────────────────────────────────


@dataclass(frozen=True)
class Keys:
    """The keys that an identity may read, those that it may write and overwrite, and those that it may delete.

    `*` is any text. Who may delete lists the bucket, to find what has had its time.
    """

    read: tuple[str, ...]
    write: tuple[str, ...]
    delete: tuple[str, ...] = ()


RESULTS: dict[Stage, tuple[str, ...]] = {
    "edit": ("jobs/*/edit-*",),
    "i2v": ("jobs/*/video.mp4", "jobs/*/poster.jpg"),
}


def keys_of(role: Role) -> Keys | None:
    """What a role may do in the bucket; None for one that has no business there."""
    if role == "operator":
        return None
    if role == "gateway":
        swept = ("uploads/*", "jobs/*", "checkpoints/*")
        return Keys(read=("uploads/*", "jobs/*"), write=("uploads/*", "jobs/*/reference-*"), delete=swept)
    own = STAGES_OF[role]
    states = tuple(f"checkpoints/*/{stage}-*" for stage in own)
    return Keys(
        read=("uploads/*", "jobs/*", *states),
        write=tuple(key for stage in own for key in RESULTS[stage]) + states,
    )


def seaweedfs_actions(keys: Keys, bucket: str) -> list[str]:
    """The rights as SeaweedFS' s3.json has them. It knows no right to delete: who may write may, and only they."""
    written = dict.fromkeys((*keys.write, *keys.delete))
    listed = [f"List:{bucket}"] if keys.delete else []
    return [*(f"Read:{bucket}/{key}" for key in keys.read), *(f"Write:{bucket}/{key}" for key in written), *listed]


def iam_policy(keys: Keys, bucket: str) -> dict[str, object]:
    """The rights as an IAM policy of AWS, which other S3 servers read as well.

    Listing is in it because S3 says that a key is missing only to those who may list; without it, it says that access
    is denied, and a stage that was not done yet would look like wrong credentials.
    """

    def resources(patterns: Sequence[str]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{pattern}" for pattern in patterns]

    delete = {"Sid": "Delete", "Effect": "Allow", "Action": ["s3:DeleteObject"], "Resource": resources(keys.delete)}
    deletion = [delete] if keys.delete else []
    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "Read", "Effect": "Allow", "Action": ["s3:GetObject"], "Resource": resources(keys.read)},
            {
                "Sid": "Write", "Effect": "Allow", "Action": ["s3:PutObject", "s3:AbortMultipartUpload"],
                "Resource": resources(keys.write),
            },
            *deletion,
            {"Sid": "Missing", "Effect": "Allow", "Action": ["s3:ListBucket"], "Resource": [f"arn:aws:s3:::{bucket}"]},
        ],
    }  # fmt: skip


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────


def nats_rights(rights: Rights) -> str:
    """Rights as nats-server's configuration has them; what is heard stands with the user, beside its inbox."""
    lines = ["# Written by `python -m vidgen.permissions deploy`.", "publish: {", "  allow: ["]
    lines += [f'    "{subject}"' for subject in rights.publish] + ["  ]"]
    if rights.never:
        lines += ["  deny: [", *(f'    "{subject}"' for subject in rights.never), "  ]"]
    lines.append("}")
    if rights.answers:
        lines.append('allow_responses: { max: 1, expires: "5s" }')
    return "\n".join([*lines, ""])


def nats_files() -> dict[str, str]:
    """What stands beside nats-server's configuration, by its path there."""
    return {f"roles/{role}.conf": nats_rights(rights_of(role)) for role in ROLES}


def files() -> dict[str, str]:
    """What stands under `deploy`, by its path there."""
    found = {f"nats/{name}": text for name, text in nats_files().items()}
    for role in ROLES:
        keys = keys_of(role)
        if keys is not None:
            found[f"s3/policies/{role}.json"] = json.dumps(iam_policy(keys, "vidgen"), indent=2) + "\n"
    return found


if __name__ == "__main__":
    for name, text in files().items():
        path = Path(sys.argv[1], name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
