"""How long a step takes, when a stage will be done, and how often to say so. Pure: time comes from the caller."""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 5
PROGRESS_PER_SECOND = 5.0


class Recent:
    """The median of the last few durations: one slow outlier does not move it."""

    def __init__(self, window: int = WINDOW) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._seconds.append(max(0.0, seconds))

    @property
    def value(self) -> float | None:
        return median(self._seconds) if self._seconds else None


class StepClock:
    """Seconds per step and time left of one task, from (step, monotonic time).

    `started` is when generation began; without it the first step only starts the clock. The first step carries the
    warm-up and counts only while no other is known. `finishing_s` is what follows the last step: decode, encode,
    store; a worker keeps it in a `Recent` over its earlier tasks. `done` steps were done elsewhere.
    """

    def __init__(
        self, started: float | None = None, *, finishing_s: float = 0.0, window: int = WINDOW, done: int = 0
    ) -> None:
        self._at = started
        self._done = self._step = self._steps = done
        self._finishing_s = max(0.0, finishing_s)
        self._first: float | None = None
        self._recent = Recent(window)

    def step(self, step: int, steps: int, at: float) -> float | None:
        """Note that step `step` of `steps` ended; returns its seconds, None where they cannot be known.

        A step that was noted already is ignored; several at once share the time.
        """
        new, before = step - self._step, self._at
        if new <= 0:
            return None
        first = self._step == self._done
        self._step, self._steps, self._at = step, steps, at
        if before is None:
            return None
        seconds = max(0.0, at - before) / new
        if first:
            self._first = seconds
        else:
            self._recent.add(seconds)
        return seconds

    @property
    def seconds_per_step(self) -> float | None:
        return self._first if self._recent.value is None else self._recent.value

    def eta_s(self, now: float | None = None) -> float | None:
        """Seconds until the stage is done, None until a step was measured; never negative."""
        per_step = self.seconds_per_step
        if per_step is None or self._at is None:
            return None
        denoising = max(0, self._steps - self._step) * per_step
        since = 0.0 if now is None else max(0.0, now - self._at)
        # The step under way may take longer than its like, the ones after it are still to come.
        left = denoising - min(since, per_step) if denoising else -since
        return max(0.0, left + self._finishing_s)


class Pace:
    """Lets through at most `per_second` a second, and always the first and the last."""

    def __init__(self, per_second: float = PROGRESS_PER_SECOND) -> None:
        self._gap = 1.0 / per_second
        self._at: float | None = None

    def allows(self, now: float, *, last: bool = False) -> bool:
        """Whether to speak now; a yes counts as spoken."""
        if not last and self._at is not None and now - self._at < self._gap:
            return False
        self._at = now
        return True
