"""Errors, named by what happens next.

VidgenError
├── RejectedError     the task or request can never succeed: fail it at once, dead-letter it, go on
│   └── DeadlineError     not in the time that was asked for; a retry has as much again
├── RetryableError    it may succeed later: hand it back with back-off, up to `max_attempts`
├── FatalError        the task is healthy, this worker is not: hand the task back, leave
│   └── HungError         the engine does not come back: whose fault it is nobody knows, so the task is charged a try
│       └── SwitchHungError               before any task had the device: none is charged
├── Cancelled         somebody asked for the job to stop: free the GPU, settle as cancelled
│   └── Suspended                     the task is to go on elsewhere: keep its state, hand it back
└── bus and store, raised by the seams' adapters
    ├── BusError (RetryableError)         the bus did not answer
    │   └── QueueFullError                a limit of a stream was reached: try again later
    ├── ConflictError                     compare-and-set lost: somebody wrote first
    ├── StoreError (RetryableError)       the object store did not answer
    └── NotFoundError (RejectedError)     no such object
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vidgen.engine import Rung


class VidgenError(Exception):
    """Something went wrong in vidgen.

    `code` is stable and machine-readable, `message` is for people and names the remedy. `rungs` is what an engine did
    without, for want of memory, before it raised this, and `state` what it can go on from, one safetensors file.
    """

    code = "error"
    rungs: tuple[Rung, ...] = ()
    state: bytes | None = None

    def __init__(self, message: str | None = None, *, code: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        if code is not None:
            self.code = code
        super().__init__(self.message)


class RejectedError(VidgenError):
    """The request or task can never succeed as it is."""

    code = "rejected"

    def __init__(self, message: str | None = None, *, code: str | None = None, field: str | None = None) -> None:
        super().__init__(message, code=code)
        self.field = field


class DeadlineError(RejectedError):
    """The job was not done in the time that it had."""

    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("the job's deadline_s passed before it was done: ask for more time or less work")


class RetryableError(VidgenError):
    """A passing fault: the same task may succeed later."""

    code = "retryable"


class FatalError(VidgenError):
    """This worker can no longer do any task."""

    code = "worker_unhealthy"


class HungError(FatalError):
    """The engine hangs, and its thread with it."""

    code = "engine_hung"


class SwitchHungError(HungError):
    """Two models that take turns on a device do not change places."""

    code = "switch_hung"


class Cancelled(VidgenError):  # noqa: N818  an outcome, not a fault
    """The job was cancelled."""

    code = "cancelled"


class Suspended(Cancelled):
    """The task is wanted back in the middle of its denoising.

    Raised by `on_step` after `step` of `steps`. An engine that can go on elsewhere puts its `state` there and lets it
    pass.
    """

    def __init__(self, step: int, steps: int) -> None:
        super().__init__()
        self.step, self.steps = step, steps


class ConflictError(VidgenError):
    """Somebody else wrote first."""

    code = "conflict"


class BusError(RetryableError):
    """The bus did not answer."""

    code = "bus_unavailable"


class QueueFullError(BusError):
    """A queue is full."""

    code = "queue_full"


class StoreError(RetryableError):
    """The object store did not answer."""

    code = "store_unavailable"


class StoreRefusedError(StoreError):
    """The object store does not take this key, lets it do too little, or lacks the bucket."""

    code = "store_refused"


class NotFoundError(RejectedError):
    """No such object."""

    code = "not_found"
