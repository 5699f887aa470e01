"""Run some commands side by side: `python benchmarks/together.py FOLDER COMMANDS_AS_JSON`.

SIGTERM, or the end of one, ends all. They are in one session, whatever their number: on Linux each session has a share
of the processor of its own (`sched_autogroup_enabled`), so four processes in a session each would have four shares
where a pool that forks has one. Their process ids are in FOLDER/N.pid; each says in FOLDER/N.ready that it is ready.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def main(folder: Path, commands: list[list[str]]) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        for one in running:
            one.terminate()

    signal.signal(signal.SIGTERM, end)
    for number, command in enumerate(commands):
        env = {**os.environ, "VIDGEN_READY_FILE": str(folder / f"{number}.ready")}
        running.append(subprocess.Popen(command, env=env))
        (folder / f"{number}.pid").write_text(str(running[-1].pid))
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    end()  # where one has ended, the others are of no use
    for one in running:
        one.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
