"""The short form of what `python -m tests.fuzz` does for longer; docs/reliability.md has the counts of the long one."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from schemathesis.core.failures import FailureGroup, ServerError
from tests.fuzz import messages, openapi

ROOT = Path(__file__).parents[2]
CALLS, INPUTS, MUTATIONS = 6, 2000, 500
SUCCESS = range(200, 400)


def test_every_address_answers_whatever_is_sent_with_a_status_that_is_documented() -> None:
    counts = openapi.fuzz(CALLS, seed=None)

    answered = {name.rsplit(" ", 1)[0] for name in counts}
    assert {"POST /v1/jobs", "GET /v1/jobs/{job_id}/events", "POST /v1/dead/{seq}/replay"} <= answered
    assert max(openapi.statuses(counts)) < 500
    assert any(status in SUCCESS for status in openapi.statuses(counts))  # it does not only hit the wall


def test_an_address_that_answers_wrongly_is_shown_and_the_others_are_tried_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first_is_wrong(*_given: object) -> None:
        tried.append(None)
        if len(tried) == 1:
            raise FailureGroup([ServerError(operation="GET /healthz", status_code=500)])

    tried: list[None] = []
    monkeypatch.setattr(openapi, "_try", first_is_wrong)

    with pytest.raises(BaseExceptionGroup, match="1 kinds of calls") as raised:
        openapi.fuzz(1, seed=None)

    assert raised.group_contains(ServerError)
    assert len(tried) > 2


def test_every_message_is_taken_or_refused_by_name() -> None:
    found = Counter(map(messages.take, messages.inputs(random.Random(0), INPUTS)))

    assert found.total() == INPUTS
    assert {"request", "task", "event", "job", "letter", "progress", "refused"} == set(found)


def test_broken_images_are_refused_or_made_plain_within_little_memory() -> None:
    # In a process of its own: the limit on its memory cannot be lifted again, and a decoder may take it down.
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "pictures", "--count", str(MUTATIONS)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    assert "'truncated_image'" in done.stdout
    assert "'normalised'" in done.stdout
