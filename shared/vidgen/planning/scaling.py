"""From waiting tasks to replicas, as KEDA and the Horizontal Pod Autoscaler compute it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

HPA_SYNC_S = 15.0
HPA_TOLERANCE = 0.1
HPA_MOST_PODS = 4  # started by one sync, or as many again as there are: Kubernetes' own default


def value(backlog: int, ahead: int = 0) -> int:
    """What a stage is scaled by: its backlog, and one more while an earlier stage has work.

    `backlog` is pending plus ack-pending over both lanes; `ahead` is that of the stage before. One, not its number: its
    first pod loads its model while the frame is being made, the others follow what really comes.
    """
    return backlog + min(1, ahead)


def replicas(value: float, lag_threshold: int) -> int:
    """How many replicas this value asks for: one for each `lag_threshold`, the last one for what is over."""
    return math.ceil(value / lag_threshold)


@dataclass(frozen=True)
class Scaling:
    """How one stage is scaled. `floor` replicas are always there; `floor == most` is a fixed number.

    `cold_start_s` is from a pod's beginning to its first task.
    """

    floor: int = 0
    most: int = 10
    lag_threshold: int = 1
    cold_start_s: float = 0.0
    polling_s: float = 30.0
    cooldown_s: float = 300.0

    @property
    def fixed(self) -> bool:
        return self.floor == self.most

    def polled(self, value: float, current: int, idle_s: float) -> int:
        """What KEDA makes of `current` replicas when it polls; `idle_s` is for how long the value has been 0.

        It starts the first replica and ends them all; what is in between it leaves to the HPA.
        """
        if value > 0:
            return current or min(self.most, max(1, self.floor))
        return self.floor if idle_s > self.cooldown_s else current

    def synced(self, value: float, current: int) -> int:
        """What the HPA makes of `current` replicas: never fewer, since scaling down is disabled; nothing at 0."""
        if current == 0:
            return 0
        if abs(value / (self.lag_threshold * current) - 1) <= HPA_TOLERANCE:
            return current
        asked = min(replicas(value, self.lag_threshold), max(2 * current, current + HPA_MOST_PODS), self.most)
        return max(current, asked)
