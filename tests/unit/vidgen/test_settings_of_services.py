"""Settings: what a service does with a command line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vidgen import errors, settings


@pytest.mark.parametrize("module", ["gateway.main", "edit_service.main", "i2v_service.main"])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("--port", 2)])
def test_a_service_that_is_given_an_argument_says_what_it_takes_and_does_not_serve(
    module: str, argument: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, argument], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code
    told, empty = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
    assert "takes no arguments" in told
    assert empty == ""


def test_a_variable_that_is_empty_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    # So a name without a value in .env, which docker compose hands on as it is, changes nothing.
    for name in ("NATS_TLS_CA", "KEEP_UPLOADS", "LOG_LEVEL", "S3_PUBLIC_ENDPOINT", "TENANT_RATE", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"VIDGEN_{name}", "")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    assert settings.read(settings.GatewaySettings) == settings.GatewaySettings.model_construct()


@pytest.mark.parametrize("name", ["S3_ENDPOINT", "S3_PUBLIC_ENDPOINT"])
@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("localhost:9000", "write http:// or https://"), ("http://", "write http://"), ("ftp://store", "write http://"),
        ("http://store:9000/vidgen", "the bucket has its own setting"), ("https://key:secret@store", "leave the cred"),
    ],
)  # fmt: skip
def test_an_address_of_the_store_that_is_none_is_named_at_the_start(
    name: str, url: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"VIDGEN_{name}", url)
    with pytest.raises(errors.FatalError) as caught:
        settings.read(settings.WorkerSettings)
    assert f"VIDGEN_{name}: " in caught.value.message
    assert remedy in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8333", "https://s3.eu-central-1.amazonaws.com/", "http://[::1]:9000"]
)
def test_an_address_of_the_store_is_taken_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDGEN_S3_ENDPOINT", url)
    assert settings.read(settings.WorkerSettings).s3_endpoint == url


def test_a_worker_has_a_name_on_a_machine_whose_name_has_letters_beyond_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings.socket, "gethostname", lambda: "jürgens-rechner.local")
    assert settings.read(settings.WorkerSettings).worker_id.startswith("j-rgens-rechner-local-")
