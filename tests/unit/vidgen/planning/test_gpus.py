"""The table of GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen.planning import gpus

PERFORMANCE = Path(__file__).parents[4] / "docs" / "performance.md"


def test_the_seconds_of_the_table_are_measured_ones() -> None:
    table, wrong = gpus.table()
    measured = PERFORMANCE.read_text(encoding="utf-8")

    assert wrong == []
    assert f"**{table['H200'].edit_s} s (" in measured
    assert f"**{table['H200'].i2v_s} s (" in measured
    assert table["H200"].dollars_per_hour is None
    for kind, dollars in (("A100", 2.17), ("A6000", 0.76), ("L4", 0.34)):
        assert table[kind] == gpus.Gpu(dollars_per_hour=dollars)


def test_a_file_adds_to_the_table(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text('[A100]\nedit_s = 2\n["RTX 4090"]\nedit_s = 3.5\ndollars_per_hour = 0.4\n')

    table, wrong = gpus.table(path)

    assert wrong == []
    assert table["A100"] == gpus.Gpu(edit_s=2, dollars_per_hour=2.17)
    assert table["RTX 4090"].edit_s == 3.5
    assert table["H200"].i2v_s == 11.0


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
