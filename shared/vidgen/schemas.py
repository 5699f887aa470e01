"""Writes the JSON Schemas of the public contracts: `python -m vidgen.schemas docs/schemas`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vidgen import contracts


def files() -> dict[str, str]:
    """Name and content of every schema file."""
    return {f"{name}.json": json.dumps(schema, indent=2) + "\n" for name, schema in contracts.json_schemas().items()}


def write(folder: Path) -> None:
    """Bring a folder up to date: files of contracts that are gone are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for stale in set(folder.glob("*.json")) - {folder / name for name in wanted}:
        stale.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m vidgen.schemas FOLDER")
    write(Path(sys.argv[1]))
