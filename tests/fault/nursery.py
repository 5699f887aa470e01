"""Forks services from one process that has imported them all: a start costs milliseconds, so kills can be many.

`python -m tests.fault.nursery` reads orders as JSON lines and tells what it started and what ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fault import clock

from vidgen.local.process import POLL, http_status

ROLES = {"gateway": "gateway.main", "worker": "tests.fault.worker"}
BOUND_S = 180.0


class Child:
    """One process of the nursery; `folder` has its log and the file with its URL."""

    def __init__(self, name: str, role: str, folder: Path, pid: int, nursery: Nursery) -> None:
        self.name, self.role, self.pid, self._nursery = name, role, pid, nursery
        self.log, self._url = folder / f"{name}.log", folder / f"{name}.url"

    @property
    def ended(self) -> int | None:
        """How it ended: its exit code, a signal as a negative number; None while it runs."""
        return self._nursery.ended.get(self.pid)

    @property
    def url(self) -> str:
        """Where it listens, empty until it does."""
        with contextlib.suppress(OSError):
            return self._url.read_text().strip().rstrip("/")
        return ""

    def signal(self, number: int) -> None:
        if self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def until_ended(self, bound: float = BOUND_S) -> int:
        async with asyncio.timeout(bound):
            while (code := self.ended) is None:
                await asyncio.sleep(POLL)
        return code

    async def until_ready(self, bound: float = BOUND_S) -> None:
        async with asyncio.timeout(bound):
            while not self.url or await http_status(f"{self.url}/readyz") != 200:
                assert self.ended is None, f"{self.name} ended with {self.ended}:\n{self.log.read_text()[-4000:]}"
                await asyncio.sleep(POLL)

    def records(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


class Nursery:
    """The process that forks. What it started dies with it, and it dies with this process."""

    def __init__(self) -> None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.fault.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
            start_new_session=True,
        )  # fmt: skip
        self.ended: dict[int, int] = {}
        self._born: list[int] = []
        self._told = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()

    def start(self, name: str, role: str, folder: Path, env: Mapping[str, str]) -> Child:
        """Fork a service; returns before it is ready."""
        url = folder / f"{name}.url"
        url.unlink(missing_ok=True)
        log = folder / f"{name}.log"
        log.touch()  # it may be killed before it opens it
        order = {"role": role, "env": {**env, "VIDGEN_READY_FILE": str(url)}, "log": str(log)}
        assert self._process.stdin is not None
        with self._told:
            before = len(self._born)
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            assert self._told.wait_for(lambda: len(self._born) > before, BOUND_S), "the nursery is silent"
            return Child(name, role, folder, self._born[-1], self)

    def close(self) -> None:
        """End it, and all that it started."""
        self._process.kill()
        self._process.wait()
        self._reader.join(BOUND_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            with self._told:
                if "ended" in told:
                    self.ended[told["ended"]] = told["code"]
                else:
                    self._born.append(told["born"])
                self._told.notify_all()


# ── in the nursery's own process ─────────────────────────────────────────────────────────────────────────────────


def _tell(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            _tell(ended=found[0], code=os.waitstatus_to_exitcode(found[1]))


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(order: dict[str, Any], parent: int) -> int:
    """A service's life, in the child."""
    _die_with_parent(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, number)
    os.environ.clear()
    os.environ.update(order["env"])
    if "FAULT_CLOCK" in os.environ:
        clock.install()
    try:
        importlib.import_module(ROLES[order["role"]]).main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    parent = os.getppid()
    _die_with_parent(parent)
    for module in ROLES.values():
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, _reap)
    for line in sys.stdin:
        own = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = _serve(json.loads(line), own)
            sys.stdout.flush()
            os._exit(code)
        _tell(born=pid)


if __name__ == "__main__":
    main()
