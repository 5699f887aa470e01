"""Child processes that do not outlive their parent, and the few questions one asks of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from vidgen import errors

POLL = 0.02
TAIL_LINES = 20

# Runs in the child before the real program: asks the kernel for a SIGKILL when the parent dies (PR_SET_PDEATHSIG, which
# survives the exec), and leaves at once if the parent died before that. A preexec_fn would fork the parent's threads.
# What is nice gives way as `vidgen.service.give_way` has it.
_LEASH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.getppid() == int(sys.argv[1]) or os._exit(1)
if int(sys.argv[2]):
    os.nice(int(sys.argv[2]))
    try:
        os.sched_getscheduler(0) == os.SCHED_OTHER and os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        pass
os.execv(sys.argv[3], sys.argv[3:])
"""


class LocalError(errors.VidgenError):
    """The embedded stack could not be started or has lost a process."""

    code = "local_stack"


def find_program(name: str) -> str | None:
    """The path of an installed program: beside this interpreter first, then on the PATH."""
    places = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(name, path=os.pathsep.join(places))


class Process:
    """One child process with a log file, in a process group of its own, so that Ctrl-C reaches only its parent.

    In its parent's session, though: Linux shares the processor among sessions first (`sched_autogroup_enabled`), and a
    stack of ten processes is to have one share beside what else its user runs, and no part of it a share of its own.

    It is killed with its parent, whatever ends that (Linux; elsewhere only an orderly end stops it). The kernel binds
    it to the *thread* that called `start`: start it from one that lives as long as it is needed. There, it is `nice` by
    so much more than its parent, and then interrupts nobody when it is woken. Errors name its log where `log_stays`.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name, self.log, self.log_stays, self.nice = name, log, True, 0
        self._popen: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._popen is None:
            raise LocalError(f"{self.name} was not started")
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Run `command` with `env` (default: this process's) and its output in the log."""
        if self.running:
            raise LocalError(f"{self.name} is running already")
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), str(self.nice), *command]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(  # noqa: S603  our own command lines, no shell
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0
            )

    async def wait(self, limit: float) -> int | None:
        """The exit code, or None if it still runs after `limit` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self.running:  # noqa: ASYNC110  a process sets no event that works in every loop
                    await asyncio.sleep(POLL)
        return None if self._popen is None else self._popen.returncode

    def signal(self, number: int) -> None:
        if self._popen is not None:
            self._popen.send_signal(number)

    async def stop(self, grace: float) -> None:
        """SIGTERM, up to `grace` seconds of patience, then SIGKILL."""
        try:
            if self.running:
                self.signal(signal.SIGTERM)
                await self.wait(grace)
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL the process and whatever it started, and reap it."""
        if self._popen is not None and self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()

    def tail(self) -> str:
        """The last lines of the log."""
        with contextlib.suppress(OSError):
            with self.log.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 16384))
                lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(lines[-TAIL_LINES:])
        return ""

    def failure(self, what: str) -> LocalError:
        """An error that says what happened and shows the end of the log."""
        ended = "" if self.running or self._popen is None else f" (exit code {self._popen.returncode})"
        log = f"its log, {self.log}" if self.log_stays else "its log"
        return LocalError(f"{self.name} {what}{ended}; the end of {log}:\n{self.tail() or '(empty)'}")

    def check(self) -> None:
        """Raise if it has ended: for loops that wait for it to get ready."""
        if not self.running:
            raise self.failure("ended before it was ready")


async def http_status(url: str) -> int | None:
    """The status that a GET answers, None if nobody answers."""
    parts = urlsplit(url)
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                status = (await reader.readline()).split()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        return int(status[1])
    except (OSError, TimeoutError, IndexError, ValueError):
        return None
