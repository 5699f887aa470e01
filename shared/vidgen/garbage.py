"""When Python's garbage collector looks, in a process that serves: rarely, and never at what stays."""

from __future__ import annotations

import gc

# By the usual 700 it takes 3 % of the time, and finds hardly anything. But each feed, and each call that is given up,
# leaves dozens of objects in a circle, half a megabyte in a thousand jobs: all is looked through every 40,000 objects.
COLLECT_EVERY = 5_000, 4, 2


def collect_rarely() -> None:
    """From now on; what is there by now stays, and is not looked at any more: with torch that takes 0.1 s each time."""
    gc.freeze()
    gc.set_threshold(*COLLECT_EVERY)
