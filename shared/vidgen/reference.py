"""Keeps the generated tables of a markdown page between their markers."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, begin: str, end: str, table: str) -> None:
    """Put `table` between the two markers of a page; ValueError where the page lacks them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} lacks the two markers: add {begin} and {end}, in this order")
    page.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")
