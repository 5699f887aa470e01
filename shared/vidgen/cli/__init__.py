"""The command line: `vidgen run`, `up`, `submit`, `status`, `watch`, `dead`, `doctor` and the rest.

Exit codes: 0 done, 1 the job failed or something does not answer, 2 wrong usage, 130 interrupted. What is heavy is
imported inside the commands: `vidgen --help` answers at once.
"""

from vidgen.cli.app import app, main

__all__ = ["app", "main"]
