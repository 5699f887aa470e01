"""Runs a static program whose wall clock a test steps: `python -m tests.fault.stepped FILE PROGRAM ARGUMENT…`.

The process becomes PROGRAM. Linux hands each of its questions for the time of day (seccomp, user notification) to a
child beside it, which answers with the true time plus the seconds that FILE says. So that there are such questions the
program is started without the vDSO, by which Go asks no kernel at all. Its monotonic clock goes on, as it does where a
real one is stepped; the times that the kernel gives to files stay true, as they would not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vidgen.local.process import Process

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_PTRACER = 1, 38, 0x59616D61
PTRACE_DETACH, PTRACE_SEIZE, PTRACE_O_TRACEEXEC, WALL = 17, 0x4206, 1 << 4, 0x40000000
SECCOMP_SET_MODE_FILTER, NEW_LISTENER, WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5
SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x7FC00000, 0x7FFF0000
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # requests of ioctl
NOTIF_BYTES, NOTIF_SECOND = 80, 40  # how large a question is, and where the second argument of the call stands in it
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of the filter's language
CALL, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # what it may load of a call, by place
AT_NULL, AT_IGNORE, AT_SYSINFO_EHDR = 0, 1, 33
# By machine: what the filter knows it by, and the numbers of its calls clock_gettime and seccomp.
NUMBERS = {"x86_64": (0xC000003E, 228, 317), "aarch64": (0xC00000B7, 113, 277)}
CLOCK_REALTIME_COARSE = 5


class SteppedProcess(Process):
    """A server's process whose wall clock is ahead of the true one by the seconds that the file `clock` says."""

    def __init__(self, process: Process, clock: Path) -> None:
        super().__init__(process.name, process.log)
        self._clock = clock
        clock.write_text("0")

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        own = {**(os.environ if env is None else env), "PYTHONPATH": os.pathsep.join(sys.path)}
        super().start([sys.executable, "-P", "-m", "tests.fault.stepped", str(self._clock), *command], own)


def refusal(folder: Path) -> str:
    """Why clocks cannot be stepped here, as where a sandbox forbids it; empty where they can."""
    clock = folder / "clock-tried"
    clock.write_text("3600")
    command = [sys.executable, "-I", "-c", "import time; print(time.time())"]
    tried = subprocess.run(
        [sys.executable, "-P", "-m", "tests.fault.stepped", str(clock), *command], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    if tried.returncode:
        return (tried.stderr.strip().splitlines() or [f"it ended with {tried.returncode}"])[-1]
    return "" if 3500 < float(tried.stdout) - time.time() < 3700 else "the program asked somebody else for the time"


def main(clock: str, command: list[str]) -> None:
    here, there = socket.socketpair()
    watcher = os.fork()
    if watcher == 0:
        here.close()
        try:
            _watch(os.getppid(), there, clock)
        finally:
            os._exit(1)
    there.close()
    with contextlib.suppress(OSError):  # only where Yama has a say
        _call("prctl", PR_SET_PTRACER, watcher, 0, 0, 0)
    here.send(b"seize me")
    assert here.recv(1), "nobody may watch over this process"
    socket.send_fds(here, [b"listen"], [_filter()])
    assert here.recv(1)
    os.execv(command[0], command)


def _filter() -> int:
    """From here on whoever reads from the file that this returns is asked for the time of day."""
    machine, clock_gettime, seccomp = NUMBERS[os.uname().machine]
    program = [
        (LOAD, 0, 0, MACHINE), (EQUAL, 0, 6, machine),
        (LOAD, 0, 0, CALL), (EQUAL, 0, 4, clock_gettime),
        (LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 1, 0, time.CLOCK_REALTIME), (EQUAL, 0, 1, CLOCK_REALTIME_COARSE),
        (RETURN, 0, 0, SECCOMP_RET_USER_NOTIF), (RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]  # fmt: skip
    lines = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    told = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(lines)))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Killable: a question that was read is answered before the program's own signals, of which Go sends many.
    return _call("syscall", seccomp, SECCOMP_SET_MODE_FILTER, NEW_LISTENER | WAIT_KILLABLE_RECV, ctypes.addressof(told))


def _watch(pid: int, there: socket.socket, clock: str) -> None:
    """In the child: take the vDSO from the program as it begins, and answer what it asks until it ends."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    there.recv(8)
    _call("ptrace", PTRACE_SEIZE, pid, 0, PTRACE_O_TRACEEXEC)
    there.send(b"!")
    _, [listener], _, _ = socket.recv_fds(there, 8, 1)
    there.send(b"!")
    os.waitpid(pid, WALL)  # in the new program, before its first instruction
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    _hide_vdso(pid, memory)
    _call("ptrace", PTRACE_DETACH, pid, 0, 0)
    _answer(listener, memory, os.open(clock, os.O_RDONLY))


def _hide_vdso(pid: int, memory: int) -> None:
    """A new program's stack begins with its arguments, its environment, and what the kernel has to tell it."""
    place = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[25])  # startstack

    def word() -> int:
        return int.from_bytes(os.pread(memory, 8, place), sys.byteorder)

    place += 8 * (word() + 2)
    while word():
        place += 8
    place += 8
    while (kind := word()) != AT_NULL:
        if kind == AT_SYSINFO_EHDR:
            os.pwrite(memory, AT_IGNORE.to_bytes(8, sys.byteorder), place)
        place += 16


def _answer(listener: int, memory: int, clock: int) -> None:
    ahead = 0
    while True:
        asked = bytearray(NOTIF_BYTES)
        try:
            fcntl.ioctl(listener, NOTIF_RECV, asked)
            if told := os.pread(clock, 32, 0):  # nothing, while it is being written
                ahead = round(float(told) * 1e9)
            now = time.time_ns() + ahead
            [number], [place] = struct.unpack_from("=Q", asked), struct.unpack_from("=Q", asked, NOTIF_SECOND)
            os.pwrite(memory, struct.pack("=qq", now // 10**9, now % 10**9), place)
            fcntl.ioctl(listener, NOTIF_SEND, struct.pack("=QqiI", number, 0, 0, 0))
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.EINTR):  # who asked is gone
                raise


def _call(name: str, *arguments: int) -> int:
    done: int = getattr(LIBC, name)(*map(ctypes.c_long, arguments))
    if done == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return done


LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
