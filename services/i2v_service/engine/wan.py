"""Animates images with Wan (2.1, 2.2 A14B, 2.2 TI2V-5B), through diffusers' `WanImageToVideoPipeline`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from vidgen import diffusion, images, profiles, video, weights
from vidgen.accel import resume
from vidgen.accel.engine import DiffusersEngine, Layout
from vidgen.accel.guidance import Partner
from vidgen.contracts import I2VWork, Work
from vidgen.engine import Finished, Generated, OnStep
from vidgen.errors import RejectedError

# Not square: dynamo would take it that width and height are always the same, and compile again for the first task.
WARM_UP = I2VWork(
    prompt="warm up", negative_prompt="", steps=2, guidance_scale=1.0, seed=0, num_frames=5, fps=16, width=320,
    height=256,
)  # fmt: skip
# What attention in 8 bits is tried on: a clip of the common size, a bit shorter, from noise to picture.
REHEARSAL = I2VWork(
    prompt="A woman in a red coat walks along a windy beach at sunset; waves break behind her, gulls cross the sky, "
    "and the camera follows her slowly.",
    negative_prompt="", steps=6, guidance_scale=1.0, seed=0, num_frames=33, fps=16, width=832, height=480,
)  # fmt: skip
TEXTS = 16  # that are remembered as the text encoder has them, 4 MB each
TOKENS = 512  # of a text, as the pipeline has it


@dataclass(frozen=True)
class Inputs:
    """What `prepare` lays out: the work and its first frame, at the size that is rendered."""

    work: I2VWork
    start: Image.Image


@dataclass(frozen=True)
class Animated:
    """What `generate` hands to `finish`: `frames` is (num_frames, height, width, 3) uint8."""

    work: I2VWork
    frames: np.ndarray[Any, np.dtype[np.uint8]]


class WanI2VEngine(DiffusersEngine):
    """Wan image-to-video on one device.

    `model` is a hub id (already downloaded) or a folder, `revision` its commit. `lora` is fused into the transformer
    (Wan 2.2 A14B: the high-noise expert) and `lora_2` into the low-noise expert; each is a local .safetensors file or
    folder. With dtype auto on a GPU all is bfloat16 but what the model's makers keep in float32: the image encoder,
    and, except in the models of two experts, the VAE. An explicit dtype holds for all of it. With a `guidance_device`
    half of each guided step is computed there, by a process of its own.
    """

    NAME = "wan"
    PIPELINE = WanImageToVideoPipeline
    PIPELINES = weights.I2V_PIPELINES
    WORK = profiles.WORK["i2v"]

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        lora: str | None = None,
        lora_2: str | None = None,
        guidance_device: str | None = None,
        layout: Layout = Layout(),  # noqa: B008  frozen
    ) -> None:
        super().__init__(model, revision, {"transformer": lora, "transformer_2": lora_2}, layout)
        self._texts: dict[str, torch.Tensor] = {}
        self._partner: Partner | None = None
        if guidance_device is not None:
            self._twin = functools.partial(WanI2VEngine, model, revision=revision, lora=lora, lora_2=lora_2)
            self._guidance_device = guidance_device
            self._pair_up()

    def _pair_up(self) -> None:
        other = replace(self.layout, device=self._guidance_device, step_cache=1)
        self._partner = Partner(functools.partial(self._twin, layout=other), self._guidance_device)

    def settle_for(self, profile: profiles.Name, room: int) -> None:
        """Take this profile in `setup`, on both devices where there are two."""
        super().settle_for(profile, room)
        if self._partner is not None:
            self._pair_up()

    def setup(self) -> Mapping[str, float]:
        """Set up as every engine, and meanwhile on the second device where there is one."""
        if self._partner is None:
            return super().setup()
        self._partner.start()
        super().setup()
        self._timed("partner", functools.partial(self._partner.ready, self.info, [one.narrow for one in self.verdicts]))
        return self.load_seconds

    def _dtypes(self, found: weights.Weights, dtype: torch.dtype) -> dict[str, torch.dtype]:
        exact = torch.float32 if self.layout.dtype == "auto" else dtype
        vae = dtype if "transformer_2" in self._sizes(found) else exact
        return {"default": dtype, "vae": vae, "image_encoder": exact}

    def _adopt(self) -> None:
        # The VAE's own factor times the patches of the transformer: 16, and 32 for TI2V-5B.
        patch: Sequence[int] = self._pipe.transformer.config.patch_size
        self._multiple = math.lcm(16, self._pipe.vae_scale_factor_spatial * max(patch[1:]))
        if self._partner is not None:
            self._partner.attach(self.transformers())

    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        """Open the start image and fit it to the video; raises RejectedError for what is no image, or not one."""
        if not isinstance(work, I2VWork):
            raise RejectedError(f"an i2v engine cannot do {work.kind} work: send it to that stage", field="work")
        if len(files) != 1:
            raise RejectedError(f"references: a video starts from exactly one image, not {len(files)}", field="inputs")
        return Inputs(work, self._laid_out(images.fit(images.open_rgb(files[0]), work.width, work.height)))

    def generate(self, inputs: Inputs, on_step: OnStep) -> Generated:
        """Run the pipeline; the output's frames are on the host."""
        return self.resume(inputs, on_step, None)

    def resume(self, inputs: Inputs, on_step: OnStep, state: bytes | None) -> Generated:
        """Go on behind the step of a state that an interrupted run left; None: from the first step."""
        return self._within_memory(
            lambda _, left: self._animated(inputs, on_step, left), state, on_step, inputs.work.steps
        )

    def _animated(self, inputs: Inputs, on_step: OnStep, state: bytes | None) -> Generated:
        work = inputs.work
        steps = resume.Course(on_step, self._device, diffusion.generators(work.seed), self._made_with(), state)
        scale, scale_2 = self._guidance(work)
        self._step_cache.begin(work.steps, steps.done)
        if self._partner is not None:
            self._partner.begin(guided=scale > 1)
        with diffusion.faults(steps), steps.on(self._pipe) as given:
            clip = self._pipe(
                image=inputs.start,
                prompt_embeds=self._embedded(work.prompt),
                negative_prompt_embeds=self._embedded(work.negative_prompt) if scale > 1 else None,
                num_inference_steps=work.steps,
                guidance_scale=scale,
                guidance_scale_2=scale_2,
                num_frames=self._rendered_frames(work.num_frames),
                width=inputs.start.width,
                height=inputs.start.height,
                output_type="pt",
                **given,
            ).frames[0]
            diffusion.require_finite(clip, "the decoded pixels")
            pixels = diffusion.to_pixels(clip[: work.num_frames])
            frames = diffusion.on_host(diffusion.cropped(pixels, work.width, work.height))
        return Generated(Animated(work, frames), denoise_s=steps.denoise_s, decode_s=steps.decode_s())

    def _embedded(self, text: str) -> torch.Tensor:
        """What the text encoder makes of a text; of the last ones it is remembered, in the host's memory.

        The negative prompt is the same for most tasks, and the prompt for the seeds of one.
        """
        found = self._texts.pop(text, None)
        if found is None:
            with torch.no_grad():
                [made, _] = self._pipe.encode_prompt(
                    text, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=self._device
                )
            diffusion.require_finite(made, "the encoded text's numbers")  # or they would be remembered
            found = made.cpu()
        self._texts[text] = found  # the newest comes last
        if len(self._texts) > TEXTS:
            del self._texts[next(iter(self._texts))]
        return found.to(self._device)

    def finish(self, output: Animated, folder: Path) -> tuple[Finished, ...]:
        """Write `video.mp4`, with the engine, the model and the seed in it, and its first frame as `poster.jpg`."""
        work = output.work
        clip, poster = folder / "video.mp4", folder / "poster.jpg"
        video.write_mp4(output.frames, clip, fps=work.fps, metadata=diffusion.provenance(self.info, work.seed))
        Image.fromarray(output.frames[0]).save(poster, "JPEG", quality=90)
        return (
            Finished(clip, "video/mp4", work.width, work.height, frames=len(output.frames), fps=work.fps),
            Finished(poster, "image/jpeg", work.width, work.height),
        )

    def _guidance(self, work: I2VWork) -> tuple[float, float | None]:
        """The scales of the two experts, as the pipeline takes them; only a model with a boundary has a second."""
        scale, scale_2 = work.guidance_scale, work.guidance_scale_2
        if self._pipe.config.boundary_ratio is None:
            return scale, None
        if scale_2 is not None and scale_2 > 1 >= scale:
            # The pipeline reads from the first scale whether there is any guidance: the smallest one that says
            # yes leaves the first expert as it would be without.
            return math.nextafter(1.0, 2.0), scale_2
        return scale, scale_2

    def _rendered_frames(self, wanted: int) -> int:
        step: int = self._pipe.vae_scale_factor_temporal
        return diffusion.round_up(wanted - 1, step) + 1

    def _laid_out(self, start: Image.Image) -> Image.Image:
        """Mirror the edges out to the size that can be rendered; `generate` cuts them off again.

        So the video has exactly the asked size and shows exactly the start image, neither scaled nor cropped.
        """
        wide, high = (diffusion.round_up(side, self._multiple) for side in start.size)
        if (wide, high) == start.size:
            return start
        left, top = (wide - start.width) // 2, (high - start.height) // 2
        edges = ((top, high - start.height - top), (left, wide - start.width - left), (0, 0))
        return Image.fromarray(np.pad(np.asarray(start), edges, mode="symmetric"))

    def _rehearsal(self) -> Callable[[], object]:
        def rehearse() -> None:
            work = REHEARSAL
            self._pipe(
                image=_scene(work.width, work.height), prompt=work.prompt, num_inference_steps=work.steps,
                guidance_scale=work.guidance_scale, num_frames=work.num_frames, width=work.width, height=work.height,
                output_type="latent", generator=diffusion.generators(work.seed),
            )  # fmt: skip

        return rehearse

    def _warm_up(self) -> None:
        self._run_grey(WARM_UP)

    def _run_what_works(self) -> None:
        self._texts.clear()  # the text encoder may be what is sick
        # With guidance, for half of what a sick task came of may have been the second device's.
        self._run_grey(WARM_UP if self._partner is None else WARM_UP.model_copy(update={"guidance_scale": 2.0}))

    def _run_grey(self, work: I2VWork) -> None:
        grey = Image.new("RGB", (work.width, work.height), (128, 128, 128))
        self.generate(Inputs(work, self._laid_out(grey)), lambda step, steps: None)


def _scene(width: int, height: int) -> Image.Image:
    """A picture that nobody took, with the spectrum of one: its amplitude falls with the frequency."""
    draw = np.random.default_rng(0)
    across = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None, :] * width)
    shared = draw.standard_normal((height, width))
    made = []
    for _ in range(3):  # channels of a photograph go together
        noise = np.fft.rfft2(shared + 0.4 * draw.standard_normal((height, width)))
        plane = np.fft.irfft2(noise / np.maximum(across, 1.0), (height, width))
        made.append(np.clip(128 + 55 * plane / plane.std(), 0, 255))
    return Image.fromarray(np.stack(made, -1).astype(np.uint8))
