"""Edits images with Qwen-Image-Edit, through diffusers' `QwenImageEditPlusPipeline`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import structlog
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from edit_service.engine.references import Processors, Ready
from vidgen import diffusion, images, profiles, weights
from vidgen.accel import fp8, graphs, resume, speed, vision
from vidgen.accel.engine import DiffusersEngine, Layout
from vidgen.accel.resume import Part
from vidgen.contracts import MAX_REFERENCES, EditWork, Work
from vidgen.engine import Finished, Generated, OnStep
from vidgen.errors import RejectedError
from vidgen.profiles import GIB

if TYPE_CHECKING:
    from vidgen.accel.assemble import Instead

log = structlog.get_logger(__name__)

REFERENCE_AREA: int = pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
MEGAPIXEL = 1 << 20
WARM_UP = EditWork(
    prompt="warm up", user_prompt="warm up", negative_prompt=" ", steps=2, true_cfg_scale=1.0, guidance_scale=1.0,
    seed=0, width=256, height=256, candidates=1,
)  # fmt: skip
DRAFT = {"width": 832, "height": 480, "reference_area": 832 * 480}


@dataclass(frozen=True)
class Inputs:
    """What `prepare` lays out: the work and its references, upright RGB, with all that the CPU makes of them.

    `ready` None: the pipeline makes it in its call.
    """

    work: EditWork
    references: tuple[Image.Image, ...]
    ready: Ready | None = None


@dataclass(frozen=True)
class Edited:
    """What `generate` hands to `finish`: `pixels` is (candidates, height, width, 3) uint8."""

    work: EditWork
    pixels: np.ndarray[Any, np.dtype[np.uint8]]


class QwenEditEngine(DiffusersEngine):
    """Qwen-Image-Edit on one device.

    `model` is a hub id (already downloaded) or a folder, `revision` its commit, `lora` a local .safetensors file or
    folder that is fused into the transformer.

    `reference_area` and `condition_area` are the pixels to which each reference is resized for the VAE and for the
    text encoder (by default 1024² and 384²): fewer make every step cheaper. A task may ask for fewer still. One such
    engine per process: the pipeline reads them from its module.
    """

    NAME = "qwen"
    PIPELINE = QwenImageEditPlusPipeline
    PIPELINES = weights.EDIT_PIPELINES
    WORK = profiles.WORK["edit"]
    BOUND_BY_BUS = True  # a forward takes less time than its weights take to come
    # The pipeline reads text by its processor alone, and a tokenizer of this size takes a quarter of a second.
    INSTEAD: ClassVar[Instead] = {"tokenizer": lambda made: made["processor"].tokenizer}

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        lora: str | None = None,
        reference_area: int | None = None,
        condition_area: int | None = None,
        layout: Layout = Layout(),  # noqa: B008  frozen
    ) -> None:
        super().__init__(model, revision, {"transformer": lora}, layout)
        self.reference_area = reference_area
        self.condition_area = condition_area

    def _adopt(self) -> None:
        # A module constant of diffusers: set for the whole process, which holds this one engine.
        if self.condition_area is not None:
            pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE = self.condition_area
        condition_area: int = pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE
        self._processors = Processors(self._pipe, condition_area)
        vision.fuse_segments(self._pipe.text_encoder)
        vision.attend_without_plans(self._pipe.text_encoder)
        graphs.encode(self._graphs, self._pipe.text_encoder)
        self._multiple: int = self._pipe.vae_scale_factor * 2
        self._pipe.transformer.pos_embed.register_forward_hook(_refuse_long_text, with_kwargs=True)

    def prepare(self, work: Work, files: Sequence[Path]) -> Inputs:
        """Open and resize the references; raises RejectedError for what is no image, or not one to three of them."""
        if not isinstance(work, EditWork):
            raise RejectedError(f"an edit engine cannot do {work.kind} work: send it to that stage", field="work")
        if not 1 <= len(files) <= MAX_REFERENCES:
            raise RejectedError(f"references: give 1 to {MAX_REFERENCES}, not {len(files)}", field="references")
        if work.steps == 1 and self._pipe.scheduler.config.get("shift_terminal"):
            # The schedule is stretched between its first and its last step: with one step it divides by zero.
            raise RejectedError("steps: this model's schedule needs at least 2, use 4", field="steps")
        self._refuse_control_tokens(work)
        return self._laid_out(work, tuple(images.open_rgb(path) for path in files))

    def _laid_out(self, work: EditWork, opened: tuple[Image.Image, ...]) -> Inputs:
        try:
            return Inputs(work, opened, self._processors.make_ready(opened, self._area_of(work)))
        except ValueError as exc:  # a size that the model's processors cannot take
            raise RejectedError(f"the model refuses these inputs: {exc}", code="invalid_input") from exc

    def generate(self, inputs: Inputs, on_step: OnStep) -> Generated:
        """Run the pipeline; the output's pixels are on the host."""
        return self.resume(inputs, on_step, None)

    def resume(self, inputs: Inputs, on_step: OnStep, state: bytes | None) -> Generated:
        """Go on behind the step of a state that an interrupted run left; None: from the first step.

        Several candidates are one batch where it is likely to fit, else made one after another, with the same noise
        each. Then `on_step` counts the steps of all of them; what was left so goes on so.
        """
        work = inputs.work

        def attempt(one_by_one: bool, left: bytes | None) -> Generated:
            begun = None if left is None else resume.part_of(left)
            if begun is None and not one_by_one:
                whole = self._edited(inputs, on_step, left, resume.WHOLE)
                return replace(whole, output=Edited(work, whole.output))
            made: list[Generated] = []
            pixels = [] if begun is None else [one.numpy() for one in begun.made]
            with self._encoding_once():
                for index in range(len(pixels), work.candidates):
                    part = Part(index, work.candidates, tuple(map(torch.from_numpy, pixels)))
                    own = left if begun is None or begun.index == index else None
                    made.append(self._edited(inputs, on_step, own, part))
                    pixels.extend(made[-1].output)
            return Generated(
                Edited(work, np.stack(pixels)),
                denoise_s=sum(one.denoise_s for one in made), decode_s=sum(one.decode_s for one in made),
            )  # fmt: skip

        begun = None if state is None else resume.part_of(state)
        at_once = work.candidates > 1 and begun is None and self._has_room(inputs)
        return self._within_memory(attempt, state, on_step, work.steps, at_once=at_once)

    def _has_room(self, inputs: Inputs) -> bool:
        """Whether all candidates of a task are likely to fit beside the weights at once."""
        free = self._free_memory()
        if free is None:
            return True
        tokens = inputs.work.width * inputs.work.height + len(inputs.references) * self._area_of(inputs.work)
        need = int(self.WORK * inputs.work.candidates * tokens / (2 * MEGAPIXEL))
        if need > free:
            log.info(
                f"{inputs.work.candidates} candidates would take {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are "
                "free: they are made one after another", _event="candidates_one_by_one",
            )  # fmt: skip
        return need <= free

    def _area_of(self, work: EditWork) -> int:
        """Pixels to which each reference is resized for the VAE."""
        own = self.reference_area or REFERENCE_AREA
        return min(own, work.reference_area or own)

    def _edited(self, inputs: Inputs, on_step: OnStep, state: bytes | None, part: Part) -> Generated:
        """One call of the pipeline; the output is pixels."""
        work = inputs.work
        generators = diffusion.generators(work.seed, work.candidates)
        steps = resume.Course(on_step, self._device, generators, self._made_with(), state, part)
        # A module constant of diffusers, too: set by every task, one at a time.
        pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE = self._area_of(work)
        guidance = {"guidance_scale": work.guidance_scale} if self._pipe.transformer.config.guidance_embeds else {}
        self._step_cache.begin(work.steps, steps.done)
        with diffusion.faults(steps), steps.on(self._pipe) as given, self._reading(inputs):
            pictures = self._pipe(
                image=list(inputs.references),
                prompt=work.prompt,
                # Guidance is on where both are given, and doubles the cost of a step.
                negative_prompt=work.negative_prompt if work.true_cfg_scale > 1 else None,
                true_cfg_scale=work.true_cfg_scale,
                num_inference_steps=work.steps,
                width=diffusion.round_up(work.width, self._multiple),
                height=diffusion.round_up(work.height, self._multiple),
                num_images_per_prompt=len(given["generator"]),
                output_type="pt",
                **guidance,
                **given,
            ).images
            diffusion.require_finite(pictures, "the decoded pixels")
            pixels = diffusion.cropped(diffusion.to_pixels(pictures), work.width, work.height).cpu().numpy()
        return Generated(pixels, denoise_s=steps.denoise_s, decode_s=steps.decode_s())

    @contextlib.contextmanager
    def _reading(self, inputs: Inputs) -> Iterator[None]:
        """Let the pipeline's call find what is ready, and read the references once for both prompts."""
        if inputs.ready is None:
            yield
            return
        with self._processors.answering(inputs.ready, self._device), vision.reading_once(self._pipe.text_encoder):
            yield

    @contextlib.contextmanager
    def _encoding_once(self) -> Iterator[None]:
        """Within it the pipeline encodes each prompt once: of one task, whose references are the same."""
        stock = self._pipe.encode_prompt
        encoded: dict[object, Any] = {}

        def once(*, prompt: str, **given: Any) -> Any:
            if prompt not in encoded:
                encoded[prompt] = stock(prompt=prompt, **given)
            return encoded[prompt]

        self._pipe.encode_prompt = once
        try:
            yield
        finally:
            del self._pipe.encode_prompt

    def finish(self, output: Edited, folder: Path) -> tuple[Finished, ...]:
        """Write `edit-0.png`, `edit-1.png`, … with the engine, the model and the seed in each."""
        work, finished = output.work, []
        for index, picture in enumerate(output.pixels):
            path = folder / f"edit-{index}.png"
            images.write_png(picture, path, diffusion.provenance(self.info, work.seed) | {"candidate": str(index)})
            finished.append(Finished(path, "image/png", work.width, work.height))
        return tuple(finished)

    def _compiles(self, profile: profiles.Name) -> bool:
        # Two seconds of every start, and many more of the first, for what the kernels of `fuse_norms` do already.
        replays = self.layout.cuda_graphs != "off" and speed.takes_lengths(
            speed.attention_of(self.layout.attention, self._device, self._dtype)
        )
        fused = profile == "resident-fp8" and fp8.has_arithmetic(self._device)
        return super()._compiles(profile) and not (self.layout.compile == "auto" and fused and replays)

    def _made_with(self) -> dict[str, object]:
        areas = {"reference_area": self.reference_area, "condition_area": self.condition_area}
        return super()._made_with() | areas

    def _warm_up(self) -> None:
        # One run compiles for all sizes and lengths. The graphs of one more would save its first task less than they
        # take here.
        work = WARM_UP if self._graphs is None else WARM_UP.model_copy(update=DRAFT)
        grey = Image.new("RGB", (work.width, work.height), (128, 128, 128))
        self.generate(self._laid_out(work, (grey,)), lambda step, steps: None)

    def _refuse_control_tokens(self, work: EditWork) -> None:
        # The text encoder would read these as images or as another speaker's turn.
        for field, text in (("prompt", work.prompt), ("negative_prompt", work.negative_prompt)):
            for token in self._pipe.tokenizer.all_special_tokens:
                if token in text:
                    raise RejectedError(f"{field} contains the control token {token}: remove it", field=field)


def _refuse_long_text(
    rotations: Any, args: Any, given: dict[str, Any], made: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Raise RejectedError where the model's table of rotations ends within a text: it is cut short without a word."""
    wanted, room = int(given["max_txt_seq_len"]), len(made[1])
    if room < wanted:
        raise RejectedError(
            f"prompt: it or the negative one has {wanted} tokens with its references, and beside pictures of this size "
            f"the model reads {room}: shorten it", field="prompt",
        )  # fmt: skip
