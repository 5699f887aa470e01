from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from vidgen import telemetry
from vidgen.settings import Settings


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    quiet = {name: logging.getLogger(name).level for name in telemetry.QUIET}
    yield
    logging.captureWarnings(False)
    root.handlers[:], root.level = handlers, level
    for name, before in quiet.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


Capture = pytest.CaptureFixture[str]


def configure(**settings: Any) -> None:
    telemetry.configure(Settings(**{"log_format": "json", **settings}), "edit-service")


def lines(capsys: Capture) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_json_with_level_service_and_time_in_utc(capsys: Capture) -> None:
    configure()

    structlog.get_logger("vidgen.worker").info("task completed", _event="task", outcome="completed", seconds=1.5)

    (line,) = lines(capsys)
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert at.utcoffset() == timedelta(0)
    assert line == {
        "message": "task completed", "event": "task", "level": "info", "logger": "vidgen.worker",
        "service": "edit-service", "outcome": "completed", "seconds": 1.5,
    }  # fmt: skip


def test_bound_fields_are_on_every_line_of_the_block_and_on_no_other(capsys: Capture) -> None:
    configure()

    with structlog.contextvars.bound_contextvars(job="j1", stage="edit", attempt=2, gpu=0):
        structlog.get_logger().info("inside")
        logging.getLogger("vidgen.bus").warning("the bus of %s", "nats")
    structlog.get_logger().info("outside")

    ours, foreign, outside = lines(capsys)
    bound = {"job": "j1", "stage": "edit", "attempt": 2, "gpu": 0}
    assert bound.items() <= ours.items()
    assert bound.items() <= foreign.items()
    assert foreign["message"] == "the bus of nats"
    assert "job" not in outside


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access", "nats.aio.client", "some.library"])
def test_other_libraries_log_in_the_same_form(name: str, capsys: Capture) -> None:
    logging.getLogger("uvicorn.access").propagate = False
    configure()

    logging.getLogger(name).info("hello %d", 7, extra={"color_message": "\x1b[36mhello", "port": 1})

    (line,) = lines(capsys)
    assert (line["message"], line["logger"], line["port"]) == ("hello 7", name, 1)
    assert "color_message" not in line


def test_python_warnings_are_logged(capsys: Capture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure()
        warnings.warn("deprecated thing", UserWarning, stacklevel=1)

    (line,) = lines(capsys)
    assert line["logger"] == "py.warnings"
    assert "deprecated thing" in line["message"]


def test_the_level_holds_for_all_and_request_loggers_stay_quiet(capsys: Capture) -> None:
    configure(log_level="info")

    structlog.get_logger().debug("no")
    logging.getLogger("library").debug("no")
    logging.getLogger("httpx").info("no")
    logging.getLogger("httpx").warning("yes")

    assert [line["message"] for line in lines(capsys)] == ["yes"]


@pytest.mark.parametrize("log_format", ["auto", "json"])
def test_without_a_terminal_logs_are_json(log_format: str, capsys: Capture) -> None:
    configure(log_format=log_format)

    structlog.get_logger().info("hello")

    assert lines(capsys)[0]["message"] == "hello"


def test_the_console_form_is_for_people_and_masks_as_well(capsys: Capture) -> None:
    configure(log_format="console")

    try:
        raise RuntimeError("no answer from nats://me:hunter2@bus:4222")
    except RuntimeError:
        structlog.get_logger().exception("it broke", s3_secret_key="hunter2")

    text = capsys.readouterr().err
    assert "it broke" in text
    assert "Traceback" in text
    assert "hunter2" not in text


def test_configured_twice_a_line_comes_once(capsys: Capture) -> None:
    configure()
    configure()

    structlog.get_logger().info("once")

    assert len(lines(capsys)) == 1


@pytest.mark.parametrize(
    "key",
    ["nats_password", "S3_SECRET_KEY", "access_key", "accessKey", "token", "api_key", "Authorization", "Cookie"],
)
@pytest.mark.parametrize("value", ["hunter2", 22222, ["hunter2"], {"a": "hunter2"}, b"hunter2"])
def test_values_of_secret_keys_are_hidden_at_any_depth(key: str, value: object) -> None:
    event = {"event": "x", key: value, "deep": [{"er": {key: value}}]}

    masked = telemetry.mask_secrets(None, "info", event)

    assert masked == {"event": "x", key: "***", "deep": [{"er": {key: "***"}}]}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nats://me:hunter2@bus:4222", "nats://***@bus:4222"),
        ("nats://a:hunter2@h1:1,nats://b:hunter2@h2:2 down", "nats://***@h1:1,nats://***@h2:2 down"),
        ("https://me:hun@ter2@host/path", "https://***@host/path"),
        ("https://host/path?to=a@b", "https://host/path?to=a@b"),
        (
            "GET http://s3/b/k?X-Amz-Date=1&X-Amz-Credential=hunter2%2F1&X-Amz-Signature=hunter2 200",
            "GET http://s3/b/k?X-Amz-Date=1&X-Amz-Credential=***&X-Amz-Signature=*** 200",
        ),
        ("http://s3/k?x-amz-security-token=hunter2", "http://s3/k?x-amz-security-token=***"),
        ("http://s3/k?AWSAccessKeyId=hunter2&Signature=hunter2", "http://s3/k?AWSAccessKeyId=***&Signature=***"),
    ],
)
def test_credentials_inside_urls_are_hidden(text: str, shown: str) -> None:
    masked = telemetry.mask_secrets(None, "info", {"event": text, "inner": {"urls": [text]}})

    assert masked == {"event": shown, "inner": {"urls": [shown]}}


def test_what_is_rendered_as_text_later_is_hidden_too() -> None:
    error = ConnectionError("nats://me:hunter2@bus")

    masked = telemetry.mask_secrets(None, "info", {"event": "x", "error": error, "given": SecretStr("hunter2")})

    assert masked == {"event": "x", "error": "nats://***@bus", "given": "***"}


def test_ordinary_fields_are_left_alone() -> None:
    event = {
        "event": "user@example.org wrote", "job": "j1", "tokens": 512, "tokenizer": "qwen", "key": "uploads/a.png",
        "seconds": 0.5, "none": None, "password": None, "ok": True,
    }  # fmt: skip

    assert telemetry.mask_secrets(None, "info", dict(event)) == event
