"""Settings: what a service does with a command line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["gateway.main", "edit_service.main", "i2v_service.main"])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("-h", 0), ("--port", 2)])
def test_a_service_that_is_given_an_argument_says_what_it_takes_and_does_not_serve(
    module: str, argument: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, argument], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == code
    told, empty = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
    assert "takes no arguments" in told
    assert empty == ""
