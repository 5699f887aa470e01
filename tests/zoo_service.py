"""A GPU service whose engines come from the zoo: `python -m tests.zoo_service STAGE ENGINE`, or two stages: `edit,i2v`.

`Paced` holds the device until the file named by ZOO_RELEASED is there. ZOO_LAST_CALL are the seconds that a pull which
was given up still listens.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import cast

from tests import engines

from vidgen import choice, jetstream, service
from vidgen.engine import Engine
from vidgen.settings import WorkerSettings


class _Released:
    """What a `threading.Event` is inside one process."""

    def __init__(self, path: Path) -> None:
        self._path, self._never = path, threading.Event()

    def wait(self, timeout: float) -> bool:
        return self._path.exists() or self._never.wait(timeout)


def make_engine(settings: WorkerSettings, _chosen: choice.Choice) -> Engine:
    kind = getattr(engines, sys.argv[2])
    if kind is engines.Paced:
        return engines.Paced(released=cast("threading.Event", _Released(Path(os.environ["ZOO_RELEASED"]))))
    if kind is engines.Picky:
        return engines.Picky(settings.preview_seconds_per_step)
    return cast("Engine", kind())


if __name__ == "__main__":
    jetstream.LAST_CALL = float(os.environ.get("ZOO_LAST_CALL", jetstream.LAST_CALL))
    stages = cast("list[service.Stage]", sys.argv[1].split(","))
    sys.exit(service.run_stages(dict.fromkeys(stages, make_engine), f"{sys.argv[1]}-service"))
