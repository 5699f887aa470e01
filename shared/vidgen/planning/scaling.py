"""From waiting tasks to replicas, as KEDA and the Horizontal Pod Autoscaler compute it. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

HPA_SYNC_S = 15.0
HPA_TOLERANCE = 0.1
HPA_MOST_PODS = 4  # started by one sync, or as many again as there are: Kubernetes' own default


def value(backlog: int, ahead: int = 0) -> int:
    """What a stage is scaled by: its backlog, and at least one while an earlier stage has work.

    `backlog` is pending plus ack-pending over both lanes; `ahead` is that of the stage before. One, not its number: the
    first pod loads its model while the frame is being made, the others follow what really comes.
    """
    return max(backlog, min(1, ahead))


def replicas(value: float, lag_threshold: int) -> int:
    """How many replicas this value asks for: one for each `lag_threshold`, the last one for what is over."""
    return math.ceil(value / lag_threshold)


@dataclass(frozen=True)
class Scaling:
    """How one stage is scaled. `floor` replicas are always there; `floor == most` is a fixed number.

    `cold_start_s` is from a pod's beginning to its first task. Without a floor all replicas end together, `cooldown_s`
    after the last task. With one they end one by one, every `down_every_s`, as far as none was asked for in the
    `down_window_s` before.
    """

    floor: int = 0
    most: int = 10
    lag_threshold: int = 1
    cold_start_s: float = 0.0
    polling_s: float = 5.0
    cooldown_s: float = 900.0
    down_window_s: float = 900.0
    down_every_s: float = 300.0

    @property
    def fixed(self) -> bool:
        return self.floor == self.most

    def polled(self, value: float, current: int, idle_s: float) -> int:
        """What KEDA makes of `current` replicas when it polls; `idle_s` is for how long it has found nothing.

        It starts the first replica, and ends all where there is no floor; what is in between it leaves to the HPA.
        """
        if value > 0:
            return current or min(self.most, max(1, self.floor))
        return 0 if self.floor == 0 and idle_s > self.cooldown_s else current

    def asked(self, value: float, current: int) -> int:
        """The replicas that the HPA would like, before its limits on how fast; nothing from 0."""
        if current == 0:
            return 0
        if abs(value / (self.lag_threshold * current) - 1) <= HPA_TOLERANCE:
            return current
        return min(self.most, max(1, self.floor, replicas(value, self.lag_threshold)))

    def synced(self, asked: int, current: int, *, lately: int, may_end: bool) -> int:
        """What the HPA makes of `current` replicas.

        `lately` is the most that was asked for in `down_window_s`; `may_end`: none ended in `down_every_s`.
        """
        if asked > current:
            return min(asked, max(2 * current, current + HPA_MOST_PODS))
        return current - 1 if self.floor > 0 and may_end and max(asked, lately) < current else current
