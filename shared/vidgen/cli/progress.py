"""A job's progress as it is seen: a live bar per stage on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from vidgen import contracts
from vidgen.cli.output import Output, harmless

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from vidgen.client import Update

LINE_EVERY_S = 1.0  # between two plain lines about the steps of one stage
WAITING = "queued"


class View(Protocol):
    """Shows a job; a context manager around the time that it is shown."""

    def status(self, text: str) -> None:
        """Say what goes on before there is a job."""

    def begin(self, stages: Sequence[contracts.Stage], *, review: bool = False) -> None:
        """Tell which stages the job has, and whether it waits for a review between them."""

    def show(self, update: Update) -> None:
        """Take in what happened."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def view_for(output: Output) -> View:
    if output.as_json:
        return JsonView(output)
    return LiveView(output) if output.live else PlainView(output)


def stages_of(request: contracts.VideoRequest | None) -> tuple[contracts.Stage, ...]:
    """The stages that a request asks for."""
    return tuple(stage for stage in contracts.STAGES if request is not None and getattr(request, stage) is not None)


def reviewed(request: contracts.VideoRequest | None) -> bool:
    """Whether a request's video waits for a review of its edit."""
    return request is not None and request.review and stages_of(request) == contracts.STAGES


def pace(progress: contracts.Progress) -> str:
    """`0.52 s/step, 12 s left`, as far as it is known."""
    parts = []
    if progress.seconds_per_step is not None:
        parts.append(f"{progress.seconds_per_step:.2f} s/step")
    if progress.eta_s is not None:
        parts.append(f"{seconds(progress.eta_s)} left")
    return ", ".join(parts)


def seconds(value: float) -> str:
    if value < 10:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def news_of(update: Update) -> tuple[contracts.Stage | None, str] | None:
    """A sentence about an event, with its stage; None for what the bars and the end tell anyway."""
    match update:
        case contracts.StageStarted():
            return update.stage, f"started on {update.worker} ({update.engine})"
        case contracts.StageCompleted():
            return update.stage, "done" + (" already" if update.reused else "")
        case contracts.StageFailed(final=False):
            again = "" if update.retry_in_s is None else f", again in {seconds(update.retry_in_s)}"
            return update.stage, f"attempt {update.attempt} failed{again}: {update.error.message}"
        case contracts.StageFailed():
            return update.stage, f"failed: {update.error.message}"
        case contracts.StageReleased():
            at = f" after step {update.checkpoint.step} of {update.checkpoint.steps}" if update.checkpoint else ""
            return update.stage, f"handed back by {update.worker}{at}: it waits for another worker"
        case contracts.StageCancelled():
            return update.stage, "cancelled"
        case contracts.CancelRequested():
            return None, "cancelling"
        case contracts.RetryRequested():
            return None, f"run {update.run} begins"
        case contracts.Approved():
            return None, f"candidate {update.candidate} is approved"
    return None


class Review:
    """Tells when a job waits for its review: no event says so, it follows from the request and the job's log."""

    def __init__(self, asked: bool = False) -> None:
        self._asked, self._edited = asked, False

    def news_of(self, update: Update) -> str | None:
        """What the job waits for from this event on."""
        match update:
            case contracts.StageCompleted(stage="edit"):
                self._edited = True
            case contracts.Approved():
                self._asked = False  # of a run that follows, too
            case contracts.RetryRequested():
                pass
            case _:
                return None
        return f"waits for: vidgen approve {update.job_id} [CANDIDATE]" if self._asked and self._edited else None


class JsonView:
    """Every update as a JSON line."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def status(self, text: str) -> None:
        self._output.emit("status", {"message": text})

    def begin(self, stages: Sequence[contracts.Stage], *, review: bool = False) -> None:
        return None

    def show(self, update: Update) -> None:
        match update:
            case contracts.Progress():
                self._output.emit_model("progress", update)
            case contracts.Job():
                self._output.emit_model("job", update)
            case _:
                self._output.emit_model(update.type, update)


class PlainView:
    """Lines: each event, and the steps at most once a second."""

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output, self._clock = output, clock
        self._said: dict[str, tuple[str, float]] = {}
        self._review = Review()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def status(self, text: str) -> None:
        self._output.say(text)

    def begin(self, stages: Sequence[contracts.Stage], *, review: bool = False) -> None:
        self._review = Review(review)
        for stage in stages:
            self._output.say(f"{stage}: {WAITING}")

    def show(self, update: Update) -> None:
        if isinstance(update, contracts.Progress):
            self._step(update)
        elif (news := news_of(update)) is not None:
            stage, text = news
            self._output.say(f"{stage}: {text}" if stage else text)
            if (wait := self._review.news_of(update)) is not None:
                self._output.say(wait)

    def _step(self, progress: contracts.Progress) -> None:
        phase, at = self._said.get(progress.stage, ("", 0.0))
        now, last = self._clock(), progress.step == progress.steps
        if phase == progress.phase and not (last or now - at >= LINE_EVERY_S):
            return
        self._said[progress.stage] = (progress.phase, now)
        if progress.phase != "denoising":
            self._output.say(f"{progress.stage}: {progress.phase}")
        elif progress.step:
            self._output.say(
                ", ".join(filter(None, (f"{progress.stage}: step {progress.step}/{progress.steps}", pace(progress))))
            )


class LiveView:
    """A bar per stage that moves with the steps."""

    def __init__(self, output: Output) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        console: Console = output.console()
        self._bars: Bars = Bars(
            TextColumn("{task.description:<5}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]:>9}"),
            TextColumn("{task.fields[text]}"),
            console=console,
        )
        self._waiting = console.status("")
        self._console = console
        self._tasks: dict[contracts.Stage, TaskID] = {}
        self._review = Review()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._waiting.stop()
        if self._tasks:
            self._bars.stop()

    def status(self, text: str) -> None:
        self._waiting.update(text)
        self._waiting.start()

    def begin(self, stages: Sequence[contracts.Stage], *, review: bool = False) -> None:
        self._waiting.stop()
        self._review = Review(review)
        for stage in stages:
            self._tasks[stage] = self._bars.add_task(stage, total=None, start=False, steps="", text=WAITING)
        if self._tasks:
            self._bars.start()

    def show(self, update: Update) -> None:
        if isinstance(update, contracts.Job):
            self._settle(update)
        elif isinstance(update, contracts.Progress):
            self._step(update)
        elif (news := news_of(update)) is not None:
            stage, text = news
            if stage in self._tasks and isinstance(update, contracts.StageStarted | contracts.StageCompleted):
                self._mark(self._tasks[stage], update)
            else:
                self._console.print(harmless(f"{stage}: {text}" if stage else text), markup=False)
            if stage in self._tasks and isinstance(update, contracts.StageReleased | contracts.StageFailed):
                # Nobody is at it any more, so what was left is no news.
                ended = isinstance(update, contracts.StageFailed) and update.final
                self._bars.update(self._tasks[stage], text="failed" if ended else WAITING)
            if (wait := self._review.news_of(update)) is not None:
                self._console.print(harmless(wait), markup=False)

    def _step(self, progress: contracts.Progress) -> None:
        task = self._tasks.get(progress.stage)
        if task is None:
            return
        text = pace(progress) if progress.phase == "denoising" else progress.phase
        known = progress.steps > 0
        self._bars.update(
            task, total=progress.steps if known else None, completed=progress.step,
            steps=f"{progress.step}/{progress.steps}" if known else "", text=text,
        )  # fmt: skip

    def _mark(self, task: TaskID, event: contracts.StageStarted | contracts.StageCompleted) -> None:
        if isinstance(event, contracts.StageStarted):
            self._bars.reset(task, total=None, completed=0, steps="", text="preparing")
            return
        spent = event.timings.load + event.timings.prepare + event.timings.denoise + event.timings.decode
        spent += event.timings.encode + event.timings.store
        steps = event.steps or 1
        self._bars.update(
            task, total=steps, completed=steps, steps=f"{event.steps}/{event.steps}" if event.steps else "",
            text="done already" if event.reused else f"done in {seconds(spent)}",
        )  # fmt: skip

    def _settle(self, job: contracts.Job) -> None:
        for stage, task in self._tasks.items():
            record = job.stage_record(stage)
            if record is None or record.state != contracts.StageState.COMPLETED:
                state = WAITING if record is None else str(record.state)
                self._bars.update(task, total=1, text=state if state == "failed" else str(job.status))
