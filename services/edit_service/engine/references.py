"""References as Qwen-Image-Edit's pipeline takes them, made ahead of its call, which holds the device.

Everything comes from the pipeline's own two processors, so it is what the call would have made to the last bit.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import torch

PIXELS = "pixel_values"


@dataclass(frozen=True)
class Ready:
    """What was made of references: all that the pipeline does with them on the CPU.

    `conditions` are those for the text encoder, `features` what its processor makes of them. `pixels` are for the VAE,
    one tensor (1, 3, height, width) for each reference.
    """

    references: tuple[Image.Image, ...]
    conditions: tuple[Image.Image, ...]
    features: Mapping[str, torch.Tensor]
    pixels: tuple[torch.Tensor, ...]


class Processors:
    """A pipeline's two processors: `make_ready` has them work ahead of its call, `answering` has it find that done.

    `make_ready` may run in any thread, several at a time, and while `answering` is on for another task: it knows the
    processors themselves, never what stands in for them. It reads no text: a tokenizer is for one thread.
    """

    def __init__(self, pipe: Any, condition_area: int) -> None:
        self._pipe = pipe
        self._images = pipe.image_processor
        self._processor = pipe.processor
        self._dtype = pipe.text_encoder.dtype  # in which the pipeline takes the VAE's images, too
        self._condition_area = condition_area

    def make_ready(self, references: Sequence[Image.Image], area: int) -> Ready:
        """Make what the call would, where the VAE's images have this area."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

        conditions, pixels = [], []
        for image in references:
            width, height = calculate_dimensions(self._condition_area, image.width / image.height)
            conditions.append(self._images.resize(image, height, width))
            width, height = calculate_dimensions(area, image.width / image.height)
            pixels.append(self._images.preprocess(image, height, width).to(self._dtype))
        features = dict(self._processor(images=conditions, return_tensors="pt"))
        return Ready(tuple(references), tuple(conditions), features, tuple(pixels))

    @contextlib.contextmanager
    def answering(self, ready: Ready, device: torch.device) -> Iterator[None]:
        """Answer the pipeline from what was made ready, in one call of it at a time.

        The text encoder's pixels are one tensor on the device for all prompts, so that it can tell that they are.
        """
        features = {**ready.features, PIXELS: ready.features[PIXELS].to(device)}
        processor = copy.copy(self._processor)
        processor.image_processor = _Features(self._processor.image_processor, ready.conditions, features)
        self._pipe.image_processor, self._pipe.processor = _Images(self._images, ready), processor
        try:
            yield
        finally:
            self._pipe.image_processor, self._pipe.processor = self._images, self._processor


class _Images:
    """Stands in for the processor of the VAE's images; what was not made ready is the stock one's to make."""

    def __init__(self, stock: Any, ready: Ready) -> None:
        self._stock = stock
        # By the image itself: `ready` holds it, so nothing else can have its id.
        self._conditions = {
            (id(image), made.height, made.width): made
            for image, made in zip(ready.references, ready.conditions, strict=True)
        }
        self._pixels = {
            (id(image), *made.shape[-2:]): made for image, made in zip(ready.references, ready.pixels, strict=True)
        }

    def resize(self, image: Image.Image, height: int, width: int) -> Any:
        made = self._conditions.get((id(image), height, width))
        return self._stock.resize(image, height, width) if made is None else made

    def preprocess(self, image: Image.Image, height: int, width: int) -> Any:
        made = self._pixels.get((id(image), height, width))
        return self._stock.preprocess(image, height, width) if made is None else made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


class _Features:
    """Stands in for the processor of the text encoder's images; other images are the stock one's."""

    def __init__(self, stock: Any, conditions: Sequence[Image.Image], features: Mapping[str, torch.Tensor]) -> None:
        self._stock, self._conditions, self._features = stock, conditions, features

    def __call__(self, images: Sequence[Image.Image], **options: Any) -> Any:
        same = len(images) == len(self._conditions) and all(map(operator.is_, images, self._conditions))
        return self._features if same else self._stock(images, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)
