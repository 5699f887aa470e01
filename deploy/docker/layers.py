"""Spreads a model's files over the folders that worker.Dockerfile copies, each into a layer of its own.

    python layers.py MODEL LAYERS

moves the files of MODEL into LAYERS/00 to LAYERS/15, at most 10 GB in each: registries refuse larger layers, and
pulling goes over many of them at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

LAYERS = 16  # as many as worker.Dockerfile copies
LIMIT = 10_000_000_000  # bytes
NOTES = ".cache"  # of the hub's client, about its downloads: the manifest says it all


def packed(sizes: Mapping[str, int], layers: int = LAYERS, limit: int = LIMIT) -> list[list[str]]:
    """Share files out over layers of at most `limit` bytes, the largest first; the same files give the same layers.

    Raises ValueError that names what does not fit.
    """
    found: list[list[str]] = [[] for _ in range(layers)]
    room = [limit] * layers
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        layer = next((number for number, free in enumerate(room) if size <= free), None)
        if layer is None:
            raise ValueError(
                f"{name} ({size:,} bytes) does not fit into {layers} layers of {limit:,} bytes: keep the weights on a "
                "volume, or make an FP8 snapshot of the model first (vidgen weights quantize)"
            )
        found[layer].append(name)
        room[layer] -= size
    return found


def main(model: Path, target: Path) -> None:
    files = [path.relative_to(model) for path in sorted(model.rglob("*")) if path.is_file()]
    sizes = {str(path): (model / path).stat().st_size for path in files if path.parts[0] != NOTES}
    for number, names in enumerate(packed(sizes)):
        layer = target / f"{number:02}"
        layer.mkdir(parents=True)
        for name in names:
            (layer / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).rename(layer / name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*(Path(argument) for argument in sys.argv[1:]))
    except ValueError as exc:
        sys.exit(str(exc))
