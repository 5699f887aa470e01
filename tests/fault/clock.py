"""A wall clock that a test steps while a process runs: it is ahead of the true one by what a file says."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
import time
from pathlib import Path
from typing import Any

OWN = ("vidgen", "gateway")


def install() -> None:
    """Make this process tell the time by the file that FAULT_CLOCK names."""
    path, real_time = Path(os.environ["FAULT_CLOCK"]), time.time

    def ahead() -> float:
        with contextlib.suppress(OSError, ValueError):
            return float(path.read_text())
        return 0.0

    class Stepped(dt.datetime):
        @classmethod
        def now(cls, tz: dt.tzinfo | None = None) -> Any:
            return dt.datetime.now(tz) + dt.timedelta(seconds=ahead())

    time.time = lambda: real_time() + ahead()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OWN and getattr(module, "datetime", None) is dt.datetime:
            module.datetime = Stepped  # type: ignore[attr-defined]
