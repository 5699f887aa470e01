"""The fence: who may work on a task, told from the newest event of its job. Pure.

JetStream has none: it takes a stale worker's ack, nak and heartbeat as if nothing had happened. So each worker event is
appended with "only if the newest event of this job is still the one I know" (`Bus.publish(expect_last=…)`), and where
that fails, the newest event tells why. Attempt numbers grow within a run and stage; a retry of
the job is a new run, and newer than all of the run before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vidgen import contracts


@dataclass(frozen=True)
class Run:
    """Go: this is attempt `attempt`, the `tries`-th that counts against the task.

    It may go on from `checkpoint`; the task has made way for others `preempted` times. Where an attempt before ended
    without a word, this one must be `alone` in its process.
    """

    attempt: int
    tries: int
    checkpoint: contracts.Checkpoint | None = None
    preempted: int = 0
    alone: bool = False


@dataclass(frozen=True)
class Exhausted(Run):
    """Too many tries: give the task up without running it."""


@dataclass(frozen=True)
class Drop:
    """Nothing to do: ack and forget."""

    reason: Literal["settled", "cancelled", "superseded"]


@dataclass(frozen=True)
class Leave:
    """Another worker has it: neither run it nor settle it."""


Verdict = Run | Exhausted | Drop

SETTLED = (contracts.JobCompleted, contracts.JobFailed, contracts.Rejected)
CANCELLED = (contracts.CancelRequested, contracts.JobCancelled)


def judge(task: contracts.Task, newest: contracts.AnyEvent | None, max_attempts: int) -> Verdict:
    """What to do with a task just taken from the queue, given the newest event of its job.

    An attempt that ended without a word, its process with it, counts if it was alone there. Beside others it may have
    been any of them: then it does not count, and the task is alone from now on.
    """
    first = Run(1, 1)
    if newest is None or newest.run < task.run:
        return first
    if newest.run > task.run:
        return Drop("superseded")
    if isinstance(newest, CANCELLED):
        return Drop("cancelled")
    if isinstance(newest, SETTLED):
        return Drop("settled")
    if isinstance(newest, contracts.Approved):  # there was something to choose from
        return Drop("settled") if task.stage == "edit" else first
    if not isinstance(newest, contracts.StageEvent):
        return first
    if newest.stage != task.stage:
        return first if task.stage == "i2v" else Drop("settled")
    if isinstance(newest, contracts.StageCancelled):
        return Drop("cancelled")
    if isinstance(newest, contracts.StageCompleted) or (isinstance(newest, contracts.StageFailed) and newest.final):
        return Drop("settled")
    wordless = isinstance(newest, contracts.StageStarted)
    attempt, tries = newest.attempt + 1, newest.tries + (newest.alone or not wordless)
    if tries > max_attempts:
        return Exhausted(attempt, tries)
    alone = newest.alone or wordless
    if isinstance(newest, contracts.StageFailed):  # of whatever it went on from, too: it starts over
        return Run(attempt, tries, alone=alone)
    return Run(attempt, tries, newest.checkpoint, newest.preempted, alone)


def standing(
    task: contracts.Task, attempt: int, newest: contracts.AnyEvent | None
) -> Literal["mine", "cancelled", "fenced"]:
    """Whether `attempt`, which was running, may still go on, given the newest event of the job."""
    if newest is None or newest.run < task.run:
        return "mine"
    if newest.run > task.run and isinstance(newest, contracts.RetryRequested):
        return "cancelled"  # a retry follows a cancel, and nobody has begun it: this attempt may still say what it cost
    if newest.run > task.run or isinstance(newest, SETTLED):
        return "fenced"
    if isinstance(newest, CANCELLED):
        return "cancelled"
    if isinstance(newest, contracts.Approved) and task.stage == "edit":
        return "fenced"
    if not isinstance(newest, contracts.StageEvent) or (newest.stage == "edit" and task.stage == "i2v"):
        return "mine"
    if newest.stage != task.stage or newest.attempt > attempt:
        return "fenced"
    if newest.attempt == attempt and isinstance(newest, contracts.StageCancelled):
        return "cancelled"
    return "mine"


def back_off(tries: int, base: float, limit: float) -> float:
    """Seconds before the next try: `base` doubled with each, at most `limit`."""
    return min(limit, base * 2.0 ** min(64, max(0, tries - 1)))
