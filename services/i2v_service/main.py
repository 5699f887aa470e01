"""i2v-service: animates a frame into a video. The composition root: alone in naming engines."""

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
        from i2v_service.engine.preview import PreviewI2VEngine

        return PreviewI2VEngine(seconds_per_step=settings.preview_seconds_per_step)
    from vidgen import profiles, weights
    from vidgen.accel import ahead

    begun = (
        ahead.beginning_for(
            settings.i2v_model, settings.i2v_revision, settings.layout(), weights.I2V_PIPELINES, profiles.WORK["i2v"]
        )
        if chosen.alone
        else None
    )
    from i2v_service.engine.wan import WanI2VEngine
    from vidgen.accel.engine import Layout

    engine = WanI2VEngine(
        model=settings.i2v_model,
        revision=settings.i2v_revision,
        lora=settings.i2v_lora,
        lora_2=settings.i2v_lora_2,
        guidance_device=settings.i2v_guidance_device,
        layout=Layout(**settings.layout()),
    )
    engine.go_on_with(None if begun is None else begun())
    return engine


def main() -> None:
    gc.disable()  # as `service.run` does, and gives it back: it has nothing to find in what is imported
    native.load_ahead()
    from vidgen import service, settings  # what takes long to import comes behind that

    settings.refuse_arguments("i2v-service")
    sys.exit(service.run("i2v", make_engine))


if __name__ == "__main__":
    main()
