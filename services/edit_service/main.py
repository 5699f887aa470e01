"""edit-service: edits the references of a job into a frame. The composition root: alone in naming engines."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

from vidgen import native

if TYPE_CHECKING:
    from vidgen.choice import Choice
    from vidgen.engine import Engine
    from vidgen.settings import WorkerSettings


def make_engine(settings: WorkerSettings, chosen: Choice) -> Engine:
    """The engine that was chosen, not set up yet."""
    if chosen.kind == "preview":
        from edit_service.engine.preview import PreviewEditEngine

        return PreviewEditEngine(seconds_per_step=settings.preview_seconds_per_step)
    from vidgen import profiles, weights
    from vidgen.accel import ahead

    begun = (
        ahead.beginning_for(
            settings.edit_model,
            settings.edit_revision,
            settings.layout(),
            weights.EDIT_PIPELINES,
            profiles.WORK["edit"],
        )
        if chosen.alone
        else None
    )
    from edit_service.engine.qwen import QwenEditEngine
    from vidgen.accel.engine import Layout

    engine = QwenEditEngine(
        model=settings.edit_model,
        revision=settings.edit_revision,
        lora=settings.edit_lora,
        reference_area=settings.edit_reference_area,
        condition_area=settings.edit_condition_area,
        layout=Layout(**settings.layout()),
    )
    engine.go_on_with(None if begun is None else begun())
    return engine


def main() -> None:
    gc.disable()  # as `service.run` does, and gives it back: it has nothing to find in what is imported
    native.load_ahead()
    from vidgen import service, settings  # what takes long to import comes behind that

    settings.refuse_arguments("edit-service")
    sys.exit(service.run("edit", make_engine))


if __name__ == "__main__":
    main()
