"""The real engine on the tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edit_service.engine.qwen import QwenEditEngine

AREAS = {"reference_area": 64 * 64, "condition_area": 56 * 56}


@pytest.fixture(scope="module")
def make(tiny_models: dict[str, Path]) -> Callable[..., QwenEditEngine]:
    """An engine that is set up; takes the fields of the engine and of its layout."""
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel.engine import Layout

    def made(**changes: Any) -> QwenEditEngine:
        layout = Layout(**{name: changes.pop(name) for name in list(changes) if name in Layout.__match_args__})
        engine = QwenEditEngine(**{"model": str(tiny_models["qwen-edit"]), "layout": layout} | AREAS | changes)
        engine.setup()
        return engine

    return made
