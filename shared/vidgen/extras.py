"""How what vidgen can do without is installed: from its checkout, for its name on PyPI is another project's."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Literal

CONSTRAINTS = "constraints.txt"

Extra = Literal["local", "gpu", "plan", "tracing"]


def install(extra: Extra) -> str:
    """The command for this interpreter; where vidgen does not run from its checkout, with the folder to give it in."""
    checkout = Path(__file__).parents[2]
    known = (checkout / "pyproject.toml").is_file() and (checkout / CONSTRAINTS).is_file()
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    if known:
        return f"{pip} -e {shlex.quote(f'{checkout}[{extra}]')} -c {shlex.quote(str(checkout / CONSTRAINTS))}"
    return f'{pip} -e ".[{extra}]" -c {CONSTRAINTS}, in the folder of vidgen'
