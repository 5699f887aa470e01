"""Reads docker-compose.yml as `docker compose` would: variables, anchors, `extends`, profiles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"

# Only with a colon: an empty value is as good as none.
REFERENCE = re.compile(r"\$\{(\w+):([-?])([^${}]*)\}")

Service = dict[str, Any]


class MissingError(Exception):
    """A variable that must be set is not."""


def interpolated(text: str, env: Mapping[str, str]) -> str:
    """Put the variables' values in, the innermost first; raises MissingError with the file's own message."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if env.get(name):
            return env[name]
        if kind == "?":
            raise MissingError(f"{name}: {rest}")
        return rest

    while (done := REFERENCE.sub(value, text)) != text:
        text = done
    assert "$" not in text, f"a form of variable that this reader does not know: {text}"
    return text


def example() -> dict[str, str]:
    """What .env.example sets: secrets are empty there."""
    return assignments(EXAMPLE.read_text("utf-8"))


def assignments(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def filled() -> dict[str, str]:
    """The example with its secrets made up: what somebody has in .env."""
    return {name: value or f"secret-of-{name.lower()}" for name, value in example().items()}


def loaded(env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The whole file."""
    values = filled() if env is None else env
    found: dict[str, Any] = _values(FILE, values)
    for name, service in found["services"].items():
        found["services"][name] = _extended(service, values)
    return found


def services(env: Mapping[str, str] | None = None, profile: str | None = None) -> dict[str, Service]:
    """The services, all of them or those that a profile starts."""
    return {
        name: service for name, service in loaded(env)["services"].items()
        if profile is None or profile in service.get("profiles", [profile])
    }  # fmt: skip


def environment(service: Service, env: Mapping[str, str]) -> dict[str, str]:
    """The variables that the container gets: those without a value are handed through where they are set.

    Those of its `env_file` are not among them.
    """
    given = {name: env.get(name) if value is None else value for name, value in service.get("environment", {}).items()}
    return {name: value for name, value in given.items() if value is not None}


def in_order(active: Mapping[str, Service]) -> list[str]:
    """The services, each behind those that it waits for."""
    found: list[str] = []
    while len(found) < len(active):
        ready = [
            name for name, service in active.items()
            if name not in found and set(service.get("depends_on", ())) <= set(found)
        ]  # fmt: skip
        assert ready, f"nothing can start behind {found}"
        found += ready
    return found


def references(path: Path) -> Iterator[tuple[str, str]]:
    """The names of a file's variables, each with its kind: `?` must be set, `-` has a default."""
    text = path.read_text("utf-8")
    while found := REFERENCE.findall(text):
        yield from ((name, kind) for name, kind, _ in found)
        text = REFERENCE.sub("", text)


def _values(path: Path, env: Mapping[str, str]) -> Any:
    return _walked(yaml.safe_load(path.read_text("utf-8")), env)


def _walked(value: Any, env: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return interpolated(value, env)
    if isinstance(value, dict):
        return {key: _walked(item, env) for key, item in value.items()}
    if isinstance(value, list):
        return [_walked(item, env) for item in value]
    return value


def _extended(service: Service, env: Mapping[str, str]) -> Service:
    base = service.pop("extends", None)
    if base is None:
        return service
    found: Service = _values(ROOT / base["file"], env)["services"][base["service"]]
    # As compose does: what is said twice is the later one's, volumes are those of both.
    return {**found, **service, "volumes": [*found.get("volumes", ()), *service.get("volumes", ())]}
