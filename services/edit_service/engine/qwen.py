"""Edits images with Qwen-Image-Edit, through diffusers' `QwenImageEditPlusPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from vidgen import diffusion, images, weights
from vidgen.accel import resume
from vidgen.contracts import MAX_REFERENCES, EditWork, Work
from vidgen.engine import EngineInfo, Finished, Generated, OnStep
from vidgen.errors import RejectedError

WARM_UP = EditWork(
    prompt="warm up", user_prompt="warm up", negative_prompt=" ", steps=2, true_cfg_scale=1.0, guidance_scale=1.0,
    seed=0, width=256, height=256, candidates=1,
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What `prepare` lays out: the work and its references, upright RGB."""

    work: EditWork
    references: tuple[Image.Image, ...]


@dataclass(frozen=True)
class Edited:
    """What `generate` hands to `finish`: `pixels` is (candidates, height, width, 3) uint8."""

    work: EditWork
    pixels: np.ndarray[Any, np.dtype[np.uint8]]


class QwenEditEngine:
    """Qwen-Image-Edit on one device.

    `model` is a hub id (already downloaded) or a folder, `revision` its commit, `lora` a local .safetensors file or
    folder that is fused into the transformer. `dtype` auto is bfloat16 on a GPU and float32 on the CPU.

    `reference_area` and `condition_area` are the pixels to which each reference is resized for the VAE and for the
    text encoder (by default 1024² and 384²): fewer make every step cheaper. One such engine per process: the pipeline
    reads them from its module.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        lora: str | None = None,
        reference_area: int | None = None,
        condition_area: int | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self.lora = lora
        self.reference_area = reference_area
        self.condition_area = condition_area
        self.info = EngineInfo("qwen", Path(model).name if Path(model).is_dir() else model, revision, device=device)
        self._wanted = (device, dtype)

    def setup(self) -> None:
        """Load the weights, fuse the LoRA and, on a GPU, run once; raises FatalError with the remedy."""
        found = weights.require(self.model, self.revision, pipelines=weights.EDIT_PIPELINES)
        self._device = diffusion.device_of(self._wanted[0])
        dtype = diffusion.dtype_of(self._wanted[1], self._device)
        self._pipe: Any = diffusion.load(QwenImageEditPlusPipeline, found, self._device, dtype)
        if self.lora is not None:
            diffusion.fuse(self._pipe, self.lora)
        # Module constants of diffusers: set for the whole process, which holds this one engine.
        if self.reference_area is not None:
            pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = self.reference_area
        if self.condition_area is not None:
            pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = self.condition_area
        self._multiple: int = self._pipe.vae_scale_factor * 2
        self.info = replace(
            self.info, model=found.model, revision=found.revision,
            profile=str(dtype).removeprefix("torch."), device=str(self._device),
        )  # fmt: skip
        if self._device.type == "cuda":
            self._warm_up()

    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        """Open the references; raises RejectedError for what is no image, or not one to three of them."""
        if not isinstance(work, EditWork):
            raise RejectedError(f"an edit engine cannot do {work.kind} work: send it to that stage", field="work")
        if not 1 <= len(files) <= MAX_REFERENCES:
            raise RejectedError(f"references: give 1 to {MAX_REFERENCES}, not {len(files)}", field="references")
        if work.steps == 1 and self._pipe.scheduler.config.get("shift_terminal"):
            # The schedule is stretched between its first and its last step: with one step it divides by zero.
            raise RejectedError("steps: this model's schedule needs at least 2, use 4", field="steps")
        self._refuse_control_tokens(work)
        return Inputs(work, tuple(images.open_rgb(path) for path in files))

    def generate(self, inputs: Inputs, on_step: OnStep) -> Generated:
        """Run the pipeline; the output's pixels are on the host."""
        return self.resume(inputs, on_step, None)

    def resume(self, inputs: Inputs, on_step: OnStep, state: bytes | None) -> Generated:
        """Go on behind the step of a state that an interrupted run left; None: from the first step."""
        work = inputs.work
        generators = diffusion.generators(work.seed, work.candidates)
        steps = resume.Course(on_step, self._device, generators, self._made_with(), state)
        guidance = {"guidance_scale": work.guidance_scale} if self._pipe.transformer.config.guidance_embeds else {}
        with diffusion.faults(steps), steps.on(self._pipe) as given:
            pictures = self._pipe(
                image=list(inputs.references),
                prompt=work.prompt,
                # Guidance is on where both are given, and doubles the cost of a step.
                negative_prompt=work.negative_prompt if work.true_cfg_scale > 1 else None,
                true_cfg_scale=work.true_cfg_scale,
                num_inference_steps=work.steps,
                width=diffusion.round_up(work.width, self._multiple),
                height=diffusion.round_up(work.height, self._multiple),
                num_images_per_prompt=work.candidates,
                output_type="pt",
                **guidance,
                **given,
            ).images
            pixels = diffusion.cropped(diffusion.to_pixels(pictures), work.width, work.height).cpu().numpy()
        return Generated(Edited(work, pixels), denoise_s=steps.denoise_s, decode_s=steps.decode_s())

    def finish(self, output: Edited, folder: Path) -> tuple[Finished, ...]:
        """Write `edit-0.png`, `edit-1.png`, … with the engine, the model and the seed in each."""
        work, finished = output.work, []
        for index, picture in enumerate(output.pixels):
            path = folder / f"edit-{index}.png"
            images.write_png(picture, path, diffusion.provenance(self.info, work.seed) | {"candidate": str(index)})
            finished.append(Finished(path, "image/png", work.width, work.height))
        return tuple(finished)

    def _made_with(self) -> dict[str, object]:
        return {
            "lora": self.lora, "reference_area": self.reference_area, "condition_area": self.condition_area
        }  # fmt: skip

    def _warm_up(self) -> None:
        grey = Image.new("RGB", (WARM_UP.width, WARM_UP.height), (128, 128, 128))
        with diffusion.loading("the model", "see the log of this worker"):
            self.generate(Inputs(WARM_UP, (grey,)), lambda step, steps: None)

    def _refuse_control_tokens(self, work: EditWork) -> None:
        # The text encoder would read these as images or as another speaker's turn.
        for field, text in (("prompt", work.prompt), ("negative_prompt", work.negative_prompt)):
            for token in self._pipe.tokenizer.all_special_tokens:
                if token in text:
                    raise RejectedError(f"{field} contains the control token {token}: remove it", field=field)
