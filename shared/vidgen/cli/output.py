"""What a command says: lines for people, or one JSON object per line; and how its errors end it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from vidgen.client import GatewayError
    from vidgen.contracts import FieldError

T = TypeVar("T")

FAILED, WRONG_USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
UNBROKEN = 10_000  # columns: a line of a table that nobody watches is not cut
NO_KEY = "the gateway asks for an API key: set VIDGEN_API_KEY to one (who runs it makes it by `vidgen keys create`)"
# What a terminal obeys, or what puts text in another order than it was written. Prompts and file names are others'.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Text for a terminal: what it would obey is shown as an escape."""
    return OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


class WrongUsageError(Exception):
    """What was asked cannot be: every wrong field, with the option that sets it."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{error.field}: {error.message}" for error in errors))
        self.errors = tuple(errors)


class Output:
    """Where a command speaks. With `as_json` standard output carries JSON lines and nothing else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    @property
    def live(self) -> bool:
        """Whether a person watches."""
        return not self.as_json and sys.stdout.isatty()

    def console(self) -> Console:
        from rich.console import Console

        # Where nobody watches, lines are not broken to a width that nobody has.
        watched = sys.stdout.isatty()
        return Console(highlight=False, soft_wrap=not watched, width=None if watched else UNBROKEN)

    def emit(self, kind: str, values: dict[str, Any]) -> None:
        """A JSON line, where they are asked for."""
        if self.as_json:
            self._line(json.dumps({"type": kind, **values}, ensure_ascii=False))

    def emit_model(self, kind: str, model: BaseModel) -> None:
        if self.as_json:
            self.emit(kind, model.model_dump(mode="json", exclude_none=True))

    def say(self, text: str = "") -> None:
        """A line for people."""
        if not self.as_json:
            self._line(harmless(text))

    def note(self, text: str) -> None:
        """A line for people on standard error: for what is not the result."""
        if not self.as_json:
            sys.stderr.write(f"{harmless(text)}\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for people; where it is wide for the terminal, its first column is left whole: it names the rows."""
        if self.as_json:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=number == 0, overflow="fold")
        for row in rows:
            table.add_row(*(Text(harmless(cell)) for cell in row))
        console = self.console()
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():
            self._line(line.rstrip())

    def fail(self, code: str, message: str, *, exit_code: int = FAILED, errors: Sequence[FieldError] = ()) -> NoReturn:
        """Say why and end with `exit_code`."""
        if self.as_json:
            wrong = [error.model_dump() for error in errors]
            self.emit("error", {"code": code, "message": message} | ({"errors": wrong} if wrong else {}))
        else:
            self.note(f"vidgen: {message}")
            for error in errors:
                if error.message not in message:
                    self.note(f"  {error.field}: {error.message}")
        raise typer.Exit(exit_code)

    @staticmethod
    def _line(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


@contextmanager
def speaking(as_json: bool) -> Iterator[Output]:
    """An Output for a command; the errors that a command may meet become its exit code."""
    from vidgen import errors
    from vidgen.client import GatewayError

    # What libraries log is said better by the errors that follow from it.
    logging.getLogger("vidgen").addHandler(logging.NullHandler())
    output = Output(as_json)
    try:
        yield output
    except WrongUsageError as exc:
        output.fail("usage", str(exc), exit_code=WRONG_USAGE, errors=exc.errors)
    except UnicodeEncodeError as exc:  # what comes of files has been read, so this came from the command line
        what = exc.object[exc.start : exc.end]
        output.fail("usage", f"an argument has {what!r}, which is not UTF-8: write it anew", exit_code=WRONG_USAGE)
    except GatewayError as exc:
        wrong = exc.status in (400, 413, 415, 422)
        message, fields = _by_option(exc)
        output.fail(exc.code, message, exit_code=WRONG_USAGE if wrong else FAILED, errors=fields)
    except errors.VidgenError as exc:
        output.fail(exc.code, exc.message)
    except KeyboardInterrupt:
        output.fail("interrupted", "interrupted", exit_code=INTERRUPTED)
    except asyncio.CancelledError:
        output.fail("terminated", "terminated", exit_code=TERMINATED)
    except BrokenPipeError:
        # Whoever read our output has left (`vidgen list | head`): nothing more is to be said.
        sys.stdout = None
        raise typer.Exit(FAILED) from None
    except OSError as exc:
        # Of this machine's files; what the network does is told by our own errors.
        place = f"{exc.filename}: " if exc.filename is not None else ""
        output.fail("local_file", f"{place}{exc.strerror or exc}")


def _by_option(exc: GatewayError) -> tuple[str, Sequence[FieldError]]:
    """What the gateway says, for who types options and not fields, and for who writes no headers."""
    from vidgen.cli import options

    fields = [options.by_option(error) for error in exc.errors]
    if fields and all(error.message in exc.message for error in fields):  # it says nothing else
        return str(WrongUsageError(fields)), fields
    return NO_KEY if exc.code == "no_key" else exc.message, fields


def run_async(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine; Ctrl-C, SIGTERM and a closed terminal cancel it; what it does about that it is let finish."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        if task is not None and sys.platform != "win32":
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` leaves it
                # Once: a shell that hears of it, too, hands it on.
                loop.add_signal_handler(signal.SIGHUP, lambda: task.cancelling() or task.cancel())
        return await main()

    return asyncio.run(cancellable())
