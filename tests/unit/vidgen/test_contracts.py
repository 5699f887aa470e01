"""The contracts refuse what is wrong by field and remedy, and survive the wire."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vidgen import contracts, schemas
from vidgen.contracts import EditParams, Event, I2VParams, VideoRequest

SECRET = "do-not-repeat-me"
GOOD: dict[str, Any] = {"references": ["uploads/a.png"], "edit": {"prompt": "at dusk"}}


def wrong(payload: bytes) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        VideoRequest.model_validate_json(payload)
    return {error.field: error.message for error in contracts.field_errors(caught.value)}


@pytest.mark.parametrize(
    ("change", "field", "remedy"),
    [
        ({"references": ["uploads/a"] * 4}, "references", "at most 3"),
        ({"references": []}, "references", "at least 1"),
        ({"references": ["/etc/passwd"]}, "references.0", "must match"),
        ({"references": [f"{SECRET}\n"]}, "references.0", "must match"),
        ({"references": None}, "references", "valid"),
        ({"edit": {"prompt": ""}}, "edit.prompt", "must not be empty"),
        ({"edit": {"prompt": " \n\t "}}, "edit.prompt", "must not be empty"),
        ({"edit": {"prompt": SECRET * 300}}, "edit.prompt", "at most 4000 characters"),
        ({"edit": {}}, "edit.prompt", "give it"),
        ({"i2v": {"prompt": SECRET * 300}}, "i2v.prompt", "at most 4000 characters"),
        ({"i2v": {"num_frames": 80}}, "i2v.num_frames", "use 77 or 81"),
        ({"i2v": {"num_frames": 258}}, "i2v.num_frames", "257"),
        ({"i2v": {"num_frames": 1}}, "i2v.num_frames", "5"),
        ({"i2v": {"num_frames": "many"}}, "i2v.num_frames", "valid integer"),
        ({"i2v": {"fps": 0}}, "i2v.fps", "1"),
        ({"i2v": {"width": 833}}, "i2v.width", "multiple of 16: use 832"),
        ({"i2v": {"height": 2047}}, "i2v.height", "multiple of 16: use 2048"),
        ({"i2v": {"height": 16}}, "i2v.height", "64"),
        ({"edit": {"prompt": "p", "width": 70, "height": 64}}, "edit.width", "use 64"),
        ({"edit": {"prompt": "p", "width": 64}}, "edit", "both or neither"),
        ({"edit": {"prompt": "p", "seed": -1}}, "edit.seed", "must be 0 or more"),
        ({"edit": {"prompt": "p", "seed": 2**32}}, "edit.seed", "must be 4294967295 or less"),
        ({"edit": {"prompt": "p", "steps": 1}}, "edit.steps", "2"),
        ({"edit": {"prompt": "p", "candidates": 5}}, "edit.candidates", "4"),
        ({"edit": {"prompt": "p", "style": SECRET}}, "edit.style", "watercolor"),
        ({"edit": {"prompt": "p", "mood": SECRET}}, "edit.mood", "remove it"),
        ({"webhook": SECRET}, "webhook", "remove it"),
        ({"schema_version": 2}, "schema_version", "speaks 1"),
        ({"schema_version": SECRET}, "schema_version", "speaks 1"),
        ({"lane": SECRET}, "lane", "'interactive' or 'batch'"),
        ({"job_id": "a.b"}, "job_id", "must match"),
        ({"job_id": ""}, "job_id", "must match"),
        ({"deadline_s": 0}, "deadline_s", "must be more than 0"),
        ({"labels": {"k": SECRET * 30}}, "labels.k", "at most 256 characters"),
        ({"labels": {str(n): "" for n in range(17)}}, "labels", "at most 16"),
        ({"edit": None}, "request", "at least one of edit and i2v"),
        ({"edit": None, "i2v": {}, "references": ["uploads/a", "uploads/b"]}, "request", "references"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy_and_never_repeated(
    change: dict[str, Any], field: str, remedy: str
) -> None:
    found = wrong(json.dumps(GOOD | change).encode())

    assert field in found
    assert remedy in found[field]
    assert SECRET not in json.dumps(found)


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[]", b"null", b"1", b'"text"', b"\xff\xfe", b'{"references": ["\xff"]}'],
)
def test_what_is_no_json_object_is_wrong_as_a_whole(payload: bytes) -> None:
    assert wrong(payload)["request"]


def test_numbers_that_are_not_finite_are_refused() -> None:
    payload = b'{"references": ["uploads/a"], "edit": {"prompt": "p", "true_cfg_scale": NaN}}'

    assert "finite" in wrong(payload)["edit.true_cfg_scale"]


def test_every_wrong_field_is_named_at_once() -> None:
    found = wrong(json.dumps({"references": [], "edit": {"seed": -1}, "i2v": {"fps": 99}, "x": 1}).encode())

    assert set(found) == {"references", "edit.prompt", "edit.seed", "i2v.fps", "x"}


def test_a_wrong_reference_is_not_said_to_be_missing_too() -> None:
    assert set(wrong(json.dumps(GOOD | {"references": ["../a"]}).encode())) == {"references.0"}


def test_the_answer_to_a_payload_that_is_wrong_everywhere_stays_small() -> None:
    payload = json.dumps(GOOD | {f"{'x' * 500}{n}": 1 for n in range(400)}).encode()
    with pytest.raises(ValidationError) as caught:
        VideoRequest.model_validate_json(payload)

    found = contracts.field_errors(caught.value)

    assert len(found) == contracts.MAX_FIELD_ERRORS + 1
    assert found[-1].message == f"and {400 - contracts.MAX_FIELD_ERRORS} more: correct these first"
    assert max(len(error.field) for error in found) <= contracts.MAX_FIELD_NAME


def test_messages_are_frozen() -> None:
    request = VideoRequest.model_validate(GOOD)
    with pytest.raises(ValidationError):
        request.lane = "batch"  # type: ignore[misc]


def test_the_prompt_is_stripped() -> None:
    assert EditParams(prompt="  at dusk \n").prompt == "at dusk"


# ── round trips ──────────────────────────────────────────────────────────────────────────────────────────────────────

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
prompts = text.filter(lambda value: len(value.strip()) > 0)
sides = st.integers(4, 128).map(lambda n: 16 * n)
seeds = st.none() | st.integers(0, contracts.MAX_SEED)
guidance = st.floats(0, 20, allow_nan=False)
quality = st.sampled_from(["draft", "standard", "high"])
keys = st.from_regex(r"uploads/[A-Za-z0-9_.-]{1,40}", fullmatch=True)


@st.composite
def edits(draw: st.DrawFn) -> EditParams:
    size = draw(st.none() | st.tuples(sides, sides)) or (None, None)
    return EditParams(
        prompt=draw(prompts), negative_prompt=draw(text), quality=draw(quality), seed=draw(seeds),
        steps=draw(st.none() | st.integers(2, 100)), true_cfg_scale=draw(st.none() | guidance),
        guidance_scale=draw(guidance), width=size[0], height=size[1], candidates=draw(st.integers(1, 4)),
        style=draw(st.none() | st.sampled_from(["cinematic", "vivid"])),
    )  # fmt: skip


@st.composite
def motions(draw: st.DrawFn) -> I2VParams:
    return I2VParams(
        prompt=draw(text), quality=draw(quality), seed=draw(seeds), width=draw(sides), height=draw(sides),
        num_frames=draw(st.integers(1, 64).map(lambda k: 4 * k + 1)), fps=draw(st.integers(1, 60)),
        guidance_scale=draw(st.none() | guidance), guidance_scale_2=draw(st.none() | guidance),
    )  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> VideoRequest:
    edit, i2v = draw(st.one_of(st.tuples(edits(), st.none() | motions()), st.tuples(st.none(), motions())))
    references = draw(st.lists(keys, min_size=1, max_size=contracts.MAX_REFERENCES if edit else 1))
    return VideoRequest(
        references=tuple(references), edit=edit, i2v=i2v, review=draw(st.booleans()),
        job_id=draw(st.none() | st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)),
        lane=draw(st.sampled_from(["interactive", "batch"])),
        deadline_s=draw(st.none() | st.floats(0.001, 7 * 86400)),
        labels=draw(st.dictionaries(text.filter(lambda key: 0 < len(key) < 64), text, max_size=4)),
    )  # fmt: skip


@given(requests())
def test_a_valid_request_survives_json(request: VideoRequest) -> None:
    assert VideoRequest.model_validate_json(request.to_bytes()) == request
    assert VideoRequest.model_validate(json.loads(request.model_dump_json())) == request


jobs = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
times = st.datetimes(timezones=st.just(UTC))
ERROR = {"code": "out_of_memory", "message": "no room", "stage": "edit", "retryable": True}
ARTIFACT = {
    "name": "edit-0.png", "key": "jobs/j/edit-0.png", "content_type": "image/png", "size": 9, "sha256": "00",
    "width": 64, "height": 64,
}  # fmt: skip
STAGE = {"stage": "edit", "attempt": 2, "tries": 1, "worker": "w"}
EVENTS: dict[str, dict[str, Any]] = {
    "accepted": {},
    "rejected": {"errors": [{"field": "edit.prompt", "message": "must not be empty"}]},
    "stage_started": STAGE | {"engine": "preview", "model": "none", "queued_s": 0.5, "deliveries": 3},
    "stage_completed": STAGE
    | {"engine": "preview", "model": "none", "seed": 7, "artifacts": [ARTIFACT], "timings": {"denoise": 1.5}},
    "stage_failed": STAGE | {"error": ERROR, "final": False, "retry_in_s": 2.0},
    "stage_released": STAGE | {"checkpoint": {"attempt": 2, "step": 3, "steps": 8}, "preempted": 1},
    "stage_cancelled": STAGE | {"cancel_latency_s": 0.1},
    "cancel_requested": {},
    "retry_requested": {},
    "approved": {"candidate": 2},
    "completed": {},
    "failed": {"error": ERROR},
    "cancelled": {},
}


def test_every_type_of_event_is_among_the_examples() -> None:
    tags = set(Event.json_schema()["discriminator"]["mapping"])

    assert tags == set(EVENTS)


@given(st.sampled_from(sorted(EVENTS)), jobs, st.integers(1, 9), times)
def test_an_event_survives_json(kind: str, job: str, run: int, at: datetime) -> None:
    event = Event.validate_python({"type": kind, "job_id": job, "run": run, "at": at, **EVENTS[kind]})

    again = Event.validate_json(event.to_bytes())

    assert again == event
    assert type(again) is type(event)


# ── schemas ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_published_schemas_are_those_of_the_code(pytestconfig: pytest.Config) -> None:
    folder = pytestconfig.rootpath / "docs" / "schemas"
    published = {path.name: path.read_text() for path in folder.glob("*.json")}

    assert published == schemas.files(), "run: python -m vidgen.schemas docs/schemas"


def test_writing_schemas_removes_those_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "gone.json").write_text("{}")

    schemas.write(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(schemas.files())


def test_the_request_schema_says_what_the_code_checks() -> None:
    schema = contracts.json_schemas()["video-request"]

    assert schema["additionalProperties"] is False
    assert schema["properties"]["references"]["maxItems"] == contracts.MAX_REFERENCES
    assert schema["$defs"]["I2VParams"]["properties"]["width"]["multipleOf"] == contracts.SIZE_MULTIPLE


@pytest.mark.parametrize(
    ("request_", "where", "words"),
    [
        ({"i2v": {"num_frames": 80}}, ("$defs", "I2VParams", "properties", "num_frames"), "4k+1"),
        ({"edit": {"prompt": "x", "width": 64}}, ("$defs", "EditParams", "properties", "width"), "both or neither"),
        ({"edit": {"prompt": "x", "height": 64}}, ("$defs", "EditParams", "properties", "height"), "both or neither"),
        ({}, ("properties", "edit"), "At least one of edit and i2v"),
        ({}, ("properties", "i2v"), "At least one of edit and i2v"),
        ({"references": ["uploads/a", "uploads/b"], "i2v": {}}, ("properties", "references"), "one where there is no"),
        ({"edit": {"prompt": " \n"}}, ("$defs", "EditParams", "properties", "prompt"), None),
    ],
)
def test_what_is_refused_is_in_the_request_schema_in_words_at_least(
    request_: dict[str, Any], where: tuple[str, ...], words: str | None
) -> None:
    """Who went by the schema alone asked for 80 frames, and was turned away."""
    request = {"references": ["uploads/a"]} | request_
    schema: Any = contracts.json_schemas()["video-request"]
    with pytest.raises(ValidationError):
        VideoRequest.model_validate_json(json.dumps(request))

    assert jsonschema.Draft202012Validator(schema).is_valid(request) == (words is not None)
    for step in where:
        schema = schema[step]
    assert words is None or words in schema["description"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_no_number_of_a_message_is_none(number: str) -> None:
    # Fuzzing found it: such a progress was taken, and written as null it is another one.
    told = (
        b'{"job_id": "j", "stage": "edit", "run": 1, "step": 1, "steps": 8, "at": "2026-01-01T00:00:00Z", "eta_s": %b}'
    )
    assert contracts.Progress.model_validate_json(told % b"1.5").eta_s == 1.5
    with pytest.raises(ValidationError, match="finite"):
        contracts.Progress.model_validate_json(told % number.encode())
