"""The names on the bus: no message has two homes, no consumer reads another's stream, and the prose agrees."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen import topology
from vidgen.contracts import LANES, STAGES
from vidgen.testing.streams import matches

# What DESIGN §3 names, so that neither side changes alone.
DESIGN = {
    "VIDGEN_REQUESTS": ("vidgen.requests", "vidgen.requests.*"),
    "VIDGEN_TASKS": ("vidgen.tasks.*.*.>",),
    "VIDGEN_HELD": ("vidgen.held.*.*.*.*",),
    "VIDGEN_EVENTS": ("vidgen.events.*",),
    "VIDGEN_PROGRESS": ("vidgen.progress.*",),
    "VIDGEN_ADVISORIES": (
        "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.VIDGEN_TASKS.>",
        "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.VIDGEN_TASKS.>",
    ),
    "VIDGEN_DEAD": ("vidgen.dead.>",),
}


def overlap(one: str, other: str) -> bool:
    """Whether some subject falls under both patterns."""
    left, right = one.split("."), other.split(".")
    for a, b in itertools.zip_longest(left, right):
        if a is None or b is None:
            return False
        if ">" in (a, b):
            return True
        if a != b and "*" not in (a, b):
            return False
    return True


def within(inner: str, outer: str) -> bool:
    """Whether every subject of `inner` falls under `outer`."""
    given_parts, wanted = inner.split("."), outer.split(".")
    for place, part in enumerate(wanted):
        if part == ">":
            return len(given_parts) > place
        if place >= len(given_parts):
            return False
        if part != given_parts[place] and (part != "*" or given_parts[place] == ">"):
            return False
    return len(given_parts) == len(wanted)


parts = st.lists(st.sampled_from(["a", "b", "*"]), min_size=1, max_size=4)
patterns = st.builds(lambda some, tail: ".".join([*some, *tail]), parts, st.sampled_from([[], [">"]]))
subjects = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5).map(".".join)


@given(patterns, patterns, subjects)
def test_the_overlap_check_agrees_with_matching(one: str, other: str, subject: str) -> None:
    if matches(one, subject) and matches(other, subject):
        assert overlap(one, other)
    if within(one, other) and matches(one, subject):
        assert matches(other, subject)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a.*", "a.b", True), ("a.*", "*.b", True), ("a.>", "a.b.c", True), ("a", "a.>", False),
        ("a.*", "a.b.c", False),
        ("a.b", "a.c", False), (">", "a", True), ("*.x", "a.>", True),
    ],
)  # fmt: skip
def test_the_overlap_check_knows_wildcards(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) is overlap(other, one) is expected


def test_no_two_streams_share_a_subject() -> None:
    kv = [topology.Stream(f"KV_{bucket.name}", (f"$KV.{bucket.name}.>",)) for bucket in topology.BUCKETS]
    for one, other in itertools.combinations([*topology.STREAMS, *kv], 2):
        for pair in itertools.product(one.subjects, other.subjects):
            assert not overlap(*pair), f"{one.name} and {other.name} both take {pair}"


def test_no_stream_keeps_control_messages() -> None:
    for stream in topology.STREAMS:
        assert not any(overlap(subject, topology.SUBJECT_CONTROL_ALL) for subject in stream.subjects)


def test_every_consumer_reads_its_own_stream_and_no_work_queue_is_read_twice() -> None:
    streams = {stream.name: stream for stream in topology.STREAMS}
    for consumer in topology.CONSUMERS:
        assert consumer.stream in streams
        if consumer.filter_subject is not None:
            assert any(within(consumer.filter_subject, subject) for subject in _open(streams[consumer.stream]))
    for one, other in itertools.combinations(topology.CONSUMERS, 2):
        if one.stream == other.stream and streams[one.stream].retention == "workqueue":
            assert not overlap(one.filter_subject or ">", other.filter_subject or ">")


def _open(stream: topology.Stream) -> list[str]:
    # A filter that ends in `>` lies in a stream that ends in `*` or `*.*` where all else is the same.
    return [*stream.subjects, *(re.sub(r"\*(\.\*)?$", ">", subject) for subject in stream.subjects)]


def test_every_task_has_a_consumer() -> None:
    for stage, lane in itertools.product(STAGES, LANES):
        older = topology.subject_of_older_task(stage, lane, "j1")
        for subject in (topology.subject_of_task(stage, lane, "j1", "acme"), older):
            readers = [c for c in topology.CONSUMERS if c.filter_subject and matches(c.filter_subject, subject)]
            assert readers == [topology.consumer_of(stage, lane)]
        assert matches(
            topology.consumer_of_held(stage, lane).filter_subject or "", topology.subject_of_held(stage, lane, "j")
        )


def test_a_tenant_is_what_its_subject_says() -> None:
    for tenant in ("default", "acme", "a-1"):
        assert topology.tenant_of_requests(topology.subject_of_requests(tenant)) == tenant
    assert topology.subject_of_requests("default") == topology.SUBJECT_REQUESTS


@pytest.mark.parametrize(
    ("subject", "stream"),
    [
        (topology.SUBJECT_REQUESTS, topology.REQUESTS),
        ("vidgen.requests.tenant", topology.REQUESTS),
        (topology.subject_of_task("edit", "batch", "j-1_A"), topology.TASKS),
        (topology.subject_of_older_task("edit", "batch", "j1"), topology.TASKS),
        (topology.subject_of_held("i2v", "batch", "j1", "acme"), topology.HELD),
        (topology.subject_of_history("j1", "acme"), topology.HISTORY),
        (topology.subject_of_events("j1"), topology.EVENTS),
        (topology.subject_of_progress("j1"), topology.PROGRESS),
        (topology.subject_of_dead("i2v", "j1"), topology.DEAD),
        (topology.subject_of_dead(None, None), topology.DEAD),
        (topology.subject_of_history("j1"), topology.HISTORY),
        (topology.subject_of_control("j1"), None),
    ],
)
def test_every_subject_has_its_stream(subject: str, stream: str | None) -> None:
    homes = [s.name for s in topology.STREAMS if any(matches(pattern, subject) for pattern in s.subjects)]

    assert homes == ([stream] if stream else [])


def test_the_names_of_the_design_are_all_there() -> None:
    found = {stream.name: stream.subjects for stream in topology.STREAMS}

    assert found.items() >= DESIGN.items()
    assert {bucket.name for bucket in topology.BUCKETS} == {
        "vidgen_jobs", "vidgen_workers", "vidgen_keys", "vidgen_tenants"
    }  # fmt: skip
    names = {consumer.name for consumer in topology.CONSUMERS if consumer.stream == topology.TASKS}
    assert names == {"edit-interactive", "edit-batch", "i2v-interactive", "i2v-batch"}


def test_the_streams_keep_what_the_design_says() -> None:
    streams = {stream.name: stream for stream in topology.STREAMS}
    queues = {name for name, stream in streams.items() if stream.retention == "workqueue"}
    assert queues == {topology.REQUESTS, topology.TASKS, topology.ADVISORIES, topology.WEBHOOKS}
    tasks, progress = streams[topology.TASKS], streams[topology.PROGRESS]
    assert (tasks.max_msgs_per_subject, tasks.discard, tasks.discard_new_per_subject) == (1, "new", True)
    assert (progress.storage, progress.max_msgs_per_subject, progress.max_age) == ("memory", 1, 3600)
    assert streams[topology.EVENTS].max_age == 7 * topology.DAY
    assert streams[topology.DEAD].max_age == 30 * topology.DAY
    short = {name for name, stream in streams.items() if stream.duplicate_window < 3600}
    assert short == {topology.REQUESTS}  # those of one tenant would be compared with those of another


def test_subjects_are_named_in_one_file_only(pytestconfig: pytest.Config) -> None:
    literal = re.compile(
        r"""["']vidgen\.(requests\b(?!\.<)|tasks|held|events|progress|dead|history|control|webhooks)\b|\$JS\.EVENT"""
    )
    home = Path("shared/vidgen/topology.py")
    for folder in ("shared/vidgen", "services"):
        for path in (pytestconfig.rootpath / folder).rglob("*.py"):
            named = path.relative_to(pytestconfig.rootpath)
            if named == home or "testing" in named.parts:
                continue
            assert not literal.search(path.read_text()), f"{named}: take subjects from vidgen.topology"
