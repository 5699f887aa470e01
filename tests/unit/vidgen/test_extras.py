from __future__ import annotations

import shlex
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from vidgen import extras

ROOT = Path(__file__).parents[3]


def test_what_is_missing_is_installed_from_the_checkout_for_this_interpreter() -> None:
    """PyPI's `vidgen` is a stranger's: `pip install "vidgen[gpu]"` in a remedy installed it."""
    told = shlex.split(extras.install("gpu"))
    assert told == [sys.executable, "-m", "pip", "install", "-e", f"{ROOT}[gpu]", "-c", str(ROOT / "constraints.txt")]


def test_where_vidgen_is_no_checkout_the_command_says_where_to_give_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "vidgen" / "extras.py"))
    assert extras.install("plan").endswith('-m pip install -e ".[plan]" -c constraints.txt, in the folder of vidgen')


def test_every_extra_that_can_be_told_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(get_args(extras.Extra)) <= set(project["optional-dependencies"])
