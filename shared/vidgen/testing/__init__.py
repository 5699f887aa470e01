"""Doubles of the seams, for tests: the bus and the object store in memory, a clock that is moved by hand.

`tests/contract` runs one suite against each double and the real thing, so what passes here passes there.
"""

from vidgen.testing.bus import MemoryBus
from vidgen.testing.clock import Clock, FakeClock, RealClock
from vidgen.testing.faults import Faults
from vidgen.testing.store import MemoryStore

__all__ = ["Clock", "FakeClock", "Faults", "MemoryBus", "MemoryStore", "RealClock"]
