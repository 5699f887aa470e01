"""A process that decodes images in a gateway's place: what a file does to its decoder, it does to nobody else.

It has nothing that is worth having: no settings, no keys, no connection, and only so much memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import AvifImagePlugin

from vidgen import errors, images

# Pillow takes its memory in blocks. Those above 32 MB glibc gives back at once; of smaller ones it keeps some hundred
# MB behind a large image.
BLOCK = "64m"
MEMORY_BYTES = 1536 << 20  # of data: the largest image that is taken has less than 0.9 GB
LIMIT_S = 120.0  # for one image: the largest take seconds, on a busy machine some more
INHERITED = ("LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TMPDIR")
READY = b"ready"

Said = dict[str, Any]


class Decoder:
    """`pixels`, `inspect` and `normalise` of `vidgen.images`, done by another process; for one thread at a time.

    They raise what those raise; RejectedError `unreadable_image` for a file that ends the process, and
    `image_too_complex` for one that takes too long or too much memory. The process is started when it is first asked,
    unless it was before, and anew where it has ended; RetryableError `no_decoder` where it cannot be.
    """

    def __init__(self, module: str = __name__) -> None:
        """`module` is what is run, as `python -m`."""
        self._module = module
        self._child: _Child | None = None

    def start(self) -> None:
        """Let the process begin, and do not wait for it."""
        self._child = self._child or _Child(self._module)

    def pixels(self, path: Path) -> int:
        """How many pixels an image says that it has, none of which is decoded."""
        return int(self._ask("pixels", path)["pixels"])

    def inspect(self, path: Path) -> images.ImageFacts:
        """Decode an image completely and say what it is."""
        return images.ImageFacts(**self._ask("inspect", path))

    def normalise(self, source: Path, target: Path) -> images.ImageFacts:
        """Write an image as a plain PNG."""
        return images.ImageFacts(**self._ask("normalise", source, target))

    def _ask(self, what: str, *paths: Path) -> Said:
        question = json.dumps([what, *map(str, paths)]).encode()
        # Its end may have been somebody else's doing, once: the kernel's, where another had taken all memory.
        said = self._answer(question) or self._answer(question)
        if said is None:
            raise errors.RejectedError(
                "the image ends the program that decodes it: save it anew with another one", code="unreadable_image"
            )
        if "refused" in said:
            raise errors.RejectedError(said["message"], code=said["refused"])
        if "errno" in said:
            raise OSError(said["errno"], said["message"])
        return said

    def _answer(self, question: bytes) -> Said | None:
        """What the process says; None where the question has ended it."""
        self._child = child = self._child or _Child(self._module)
        said = None
        try:
            child.until_ready()
            said = child.ask(question)
        except TimeoutError:
            return _too_complex(f"takes more than {LIMIT_S:.0f} s to decode")
        except (EOFError, OSError):
            pass
        finally:
            if said is None:
                child.end()
                self._child = None
        return said


class _Child:
    """The process, from its start to its end."""

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PILLOW_BLOCK_SIZE": BLOCK,
            "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip
        with theirs:
            try:
                # In a session of its own: a Ctrl-C is for the gateway. It ends when this end of the socket is closed,
                # whatever ends this process.
                process = subprocess.Popen(  # noqa: S603  our own command line, no shell
                    [sys.executable, "-P", "-m", module, str(theirs.fileno())], env=environment,
                    stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                )  # fmt: skip
            except OSError as exc:
                ours.close()
                raise _none(str(exc)) from exc
        self._connection = Connection(ours.detach())
        self._ready = False
        self.end = weakref.finalize(self, _end, process, self._connection)

    def until_ready(self) -> None:
        """Wait for its first word; raises RetryableError `no_decoder` where it has ended before."""
        try:
            self._ready = self._ready or self._receive() == READY
        except (EOFError, OSError) as exc:
            raise _none("the gateway's log may say why") from exc

    def ask(self, question: bytes) -> Said:
        """What it answers; raises TimeoutError, and EOFError or OSError where it has ended."""
        self._connection.send_bytes(question)
        said: Said = json.loads(self._receive())
        return said

    def _receive(self) -> bytes:
        if not self._connection.poll(LIMIT_S):
            raise TimeoutError
        return self._connection.recv_bytes()


def _none(why: str) -> errors.RetryableError:
    return errors.RetryableError(f"the process that decodes images does not start: {why}", code="no_decoder")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve(connection: Connection) -> None:
    """Answer until the other end is closed."""
    connection.send_bytes(READY)
    while True:
        what, *paths = json.loads(connection.recv_bytes())
        signal.alarm(round(2 * LIMIT_S))  # where it hangs, and nobody is there any more who would end it
        said = _worked(what, *map(Path, paths))
        signal.alarm(0)
        connection.send_bytes(json.dumps(said).encode())


def _worked(what: str, path: Path, *targets: Path) -> Said:
    try:
        match what:
            case "pixels":
                return {"pixels": images.pixels(path)}
            case "inspect":
                return asdict(images.inspect(path))
            case _:
                return asdict(images.normalise(path, *targets))
    except errors.RejectedError as exc:
        return {"refused": exc.code, "message": exc.message}
    except MemoryError:
        return _too_complex("takes too much memory to decode")
    except OSError as exc:  # the disk
        return {"errno": exc.errno, "message": exc.strerror}


def _too_complex(why: str) -> Said:
    return {"refused": "image_too_complex", "message": f"the image {why}: save it anew, smaller or as a plain PNG"}


def main() -> None:
    """Be the process: leave with the gateway, and not before it."""
    # A manager of services tells all of its processes to end; the gateway still finishes what it has begun.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants strangers' pictures there
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # on a machine of many processors their stacks would be all of that memory
    with contextlib.suppress(OSError):  # where memory runs out, the kernel takes this process and not the gateway
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
