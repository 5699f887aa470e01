"""Make a CUDA-linked torchvision importable beside a CPU torch. For tests only: put this folder on PYTHONPATH.

PyPI's torchvision cannot load its C extension there, yet registers fake kernels for two of its operators, which fails
because nothing declared them. Declaring them is enough: transformers uses the pure Python part alone. Where torchvision
imports by itself, nothing is changed; and torch is not imported before torchvision is.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

DECLARED: list[Any] = []  # a torch Library takes its declarations with it when it is collected


class Declaring(Loader):
    """Loads torchvision; if that fails for want of its operators, declares them and loads it again."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.inner.exec_module(module)
        except RuntimeError as exc:
            if "torchvision::" not in str(exc):
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
            declare()
            self.inner.exec_module(module)


class TorchvisionFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Declaring(spec.loader)
        return spec


def declare() -> None:
    from torch.library import Library

    library = Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    DECLARED.append(library)


def install() -> None:
    """Have the hook in place, once; called at interpreter start when this file is found as sitecustomize."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


if __name__ == "sitecustomize":
    install()
