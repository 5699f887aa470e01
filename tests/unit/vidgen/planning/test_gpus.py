"""The table of GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vidgen.planning import gpus

DOCS = Path(__file__).parents[4] / "docs"
PERFORMANCE = DOCS / "performance.md"
COSTS = (DOCS / "operations.md").read_text(encoding="utf-8").split("\n## What it costs\n")[1]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in COSTS.splitlines() if line.startswith("| ")]


def test_the_seconds_of_the_table_are_measured_ones() -> None:
    table, wrong = gpus.table()
    measured = PERFORMANCE.read_text(encoding="utf-8")

    assert wrong == []
    assert f"**{table['H200'].edit_s} s" in measured
    assert f"**{table['H200'].i2v_s} s" in measured
    assert table["H200"].dollars_per_hour is None
    for kind, dollars in (("A100", 2.17), ("A6000", 0.76), ("L4", 0.34)):
        assert table[kind] == gpus.Gpu(dollars_per_hour=dollars)


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row[0].partition(",")[0])
def test_the_page_of_costs_multiplies_measured_seconds_by_the_tables_prices(row: list[str]) -> None:
    table, _ = gpus.table()
    measured = PERFORMANCE.read_text(encoding="utf-8")
    name, price, *items, both = row
    dollars = table[name.partition(",")[0]].dollars_per_hour
    unit = "" if dollars else " × *p*"

    def cost(seconds: float) -> str:
        return f"${seconds * (dollars or 1) / 3.6:.2f}{unit}"

    seconds = {cell: float(cell.partition(" s")[0]) for cell in items if cell != "not measured"}
    assert price == (f"{dollars}" if dollars else "by its price *p*")
    assert len(ROWS[0]) == len(row)
    for cell, taken in seconds.items():
        said = cell.partition(" s")[0]
        assert cell == f"{said} s: {cost(taken)}"
        assert re.search(rf"\*\*{re.escape(said)} s\b", measured), "an item's seconds are those of docs/performance.md"
    *_, draft, video = items
    assert both == (cost(seconds[draft] + seconds[video]) if {draft, video} <= set(seconds) else "not measured")


def test_a_file_adds_to_the_table(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text('[A100]\nedit_s = 2\n["RTX 4090"]\nedit_s = 3.5\ndollars_per_hour = 0.4\n')

    table, wrong = gpus.table(path)

    assert wrong == []
    assert table["A100"] == gpus.Gpu(edit_s=2, dollars_per_hour=2.17)
    assert table["RTX 4090"].edit_s == 3.5
    assert table["H200"].i2v_s == 8.3


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        ("[L4]\nedit_s = -1\n", ", L4.edit_s", "must be more than 0"),
        ("[L4]\nprice = 1\n", ", L4.price", ""),
        ("L4 = 1\n", ", L4", "[L4]"),
        ("[L4\n", "", "not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, field: str, message: str) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(text)

    _, [wrong] = gpus.table(path)

    assert wrong.field == f"{path}{field}"
    assert message in wrong.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    _, [wrong] = gpus.table(tmp_path / "gpus.toml")

    assert "cannot be read" in wrong.message
