"""edit-service: edits the references of a job into a frame. The composition root: alone in naming engines."""

from __future__ import annotations

import sys

from edit_service.engine.preview import PreviewEditEngine
from vidgen import choice, profiles, service, weights
from vidgen.engine import Engine
from vidgen.settings import WorkerSettings


def make_engine(settings: WorkerSettings, chosen: choice.Choice) -> Engine:
    """The engine that was chosen, not set up yet."""
    if chosen.kind == "preview":
        return PreviewEditEngine(seconds_per_step=settings.preview_seconds_per_step)
    from vidgen.accel import ahead

    reading = (
        ahead.begin_for(
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
    engine.go_on_with(reading)
    return engine


def main() -> None:
    sys.exit(service.run("edit", make_engine))


if __name__ == "__main__":
    main()
