"""Imports transformers and diffusers, without what they do twice, and without what nobody here will use.

They find the same as without this module, in half a second less of each start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "models."


def import_libraries(*, loras: bool) -> None:
    """Import transformers with its package of models, and diffusers; `loras` says whether any are to be fused.

    Where none are, diffusers in this process does not know of peft, which it would import for them.
    """
    with contextlib.nullcontext() if loras else _as_if_absent("peft"), _distributions_once():
        importlib.import_module("transformers")
        with _models_once():
            importlib.import_module("transformers.models")
        importlib.import_module("diffusers")


@contextlib.contextmanager
def _as_if_absent(package: str) -> Iterator[None]:
    """Let who looks for a package meanwhile not find it, unless it has been imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]  # as Python has it for what is not to be imported
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def _distributions_once() -> Iterator[None]:
    """Read the list of files of each installed package once: both look up in it whose the packages are."""
    stock = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = functools.cache(stock)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = stock


@contextlib.contextmanager
def _models_once() -> Iterator[None]:
    """Let the package of models take its listing from transformers', which went through the same folders just before.

    transformers means that, but it keeps 128 folders and goes through 549 (5.23). A version that does otherwise is left
    to do so.
    """
    names: Any = importlib.import_module("transformers.utils.import_utils")
    stock = names.define_import_structure
    models = Path(names.__file__).parents[1] / "models"

    def define_import_structure(module_path: str, prefix: str | None = None) -> Any:
        if prefix is not None or Path(module_path) != models / "__init__.py" or not hasattr(stock, "cache_info"):
            return stock(module_path, prefix)
        # Asked for as transformers did, so it is the answer that was kept; with the models in it comes all else.
        listed = stock(models, prefix="models")
        return {
            needs: {name.removeprefix(PREFIX): found for name, found in modules.items() if name.startswith(PREFIX)}
            for needs, modules in listed.items()
        }

    names.define_import_structure = define_import_structure
    try:
        yield
    finally:
        names.define_import_structure = stock
