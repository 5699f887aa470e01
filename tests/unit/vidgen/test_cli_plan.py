"""`vidgen plan`: tables, JSON, a picture, and what it says about wrong options."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vidgen import extras
from vidgen.cli import app

SMALL = ("--rate", "60", "--hours", "1", "--cold-start", "60")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", *arguments])


def told(*arguments: str) -> dict[str, Any]:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    first: dict[str, Any] = json.loads(result.stdout.splitlines()[0])
    return first


def test_it_says_how_long_jobs_wait_and_what_gpus_cost() -> None:
    result = plan(*SMALL, "--batch", "0.3", "--price", "3")

    assert result.exit_code == 0, result.output
    for word in ("interactive", "batch", "waits", "takes in all", "p95", "edit", "i2v", "H200", "edits", "clips"):
        assert word in result.stdout


def test_the_page_on_planning_shows_what_the_command_prints() -> None:
    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text(encoding="utf-8")
    [arguments] = re.findall(r"^ +vidgen plan (.*) --plot plan\.png$", page, re.MULTILINE)
    shown = page.split("```\n")[1]

    printed = plan(*arguments.split()).stdout

    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines(), "docs/planning.md: paste it anew"


def test_json_says_the_same_the_second_time_and_adds_up() -> None:
    one = told(*SMALL, "--price", "edit=1,i2v=4")

    assert one == told(*SMALL, "--price", "edit=1,i2v=4")
    i2v = one["stages"]["i2v"]
    assert i2v["tasks"] == one["lanes"]["interactive"]["jobs"]
    assert i2v["task_s"] == pytest.approx(8.3)
    assert i2v["dollars"] == pytest.approx(4 * i2v["gpu_hours"])
    assert i2v["dollars_per_1000"] == pytest.approx(1000 * i2v["dollars"] / i2v["tasks"])
    assert i2v["utilisation"] == pytest.approx(i2v["tasks"] * 8.3 / 3600 / i2v["gpu_hours"])


def test_a_gpu_without_a_price_gives_no_dollars() -> None:
    assert told(*SMALL)["stages"]["edit"]["dollars"] is None
    assert "--price" in plan(*SMALL).stderr


def test_candidates_are_made_one_after_another() -> None:
    assert told(*SMALL, "--candidates", "3")["stages"]["edit"]["task_s"] == pytest.approx(3 * 0.82)
    # What a thousand edits cost was told as the price of a thousand images, of which each made three.
    assert "images" not in plan(*SMALL, "--candidates", "3", "--price", "3").stdout


def test_a_list_of_jobs_takes_the_place_of_a_rate(tmp_path: Path) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text("time,lane,kind\n0,interactive,edit\n30,batch,edit\n")

    one = told("--arrivals", str(path), "--min", "1", "--max", "1")

    assert set(one["stages"]) == {"edit"}
    assert [lane["jobs"] for lane in one["lanes"].values()] == [1, 1]


def test_more_work_than_gpus_can_do_is_told() -> None:
    result = plan("--rate", "1000", "--hours", "0.5", "--min", "1", "--max", "1")

    assert result.exit_code == 0, result.output
    assert "i2v: the queue grows" in result.stderr


@pytest.mark.parametrize(("name", "begins"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")])
def test_one_picture_is_drawn_and_the_same_each_time(tmp_path: Path, name: str, begins: bytes) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        assert told(*SMALL, "--plot", str(folder / name))["type"] == "plan"
        found.append((folder / name).read_bytes())

    assert found[0].startswith(begins)
    assert found[0] == found[1]


def test_the_table_of_gpus_is_printed_and_can_be_given_back(tmp_path: Path) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(plan("--print-gpus").stdout.replace("[A100]", "[A100]\nedit_s = 2.5\ni2v_s = 30"))

    one = told(*SMALL, "--gpus", str(path), "--gpu", "A100")

    assert (one["stages"]["edit"]["task_s"], one["stages"]["edit"]["gpu"]) == (pytest.approx(2.5), "A100")
    assert one["stages"]["edit"]["dollars"] == pytest.approx(2.17 * one["stages"]["edit"]["gpu_hours"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--rate JOBS an hour or --arrivals FILE",)),
        (("--rate", "5", "--arrivals", "jobs.csv"), ("either",)),
        (("--rate", "60"), ("--cold-start edit=S", "--cold-start i2v=S", "not measured")),
        ((*SMALL, "--gpu", "edit=L4"), ("not measured", "--seconds edit=S", "L4")),
        ((*SMALL, "--gpu", "edit=L5"), ("'L5' is not in the table", "--gpus FILE")),
        ((*SMALL, "--seconds", "edit=0"), ("--seconds", "'0' is no number over 0")),
        ((*SMALL, "--seconds", "video=3"), ("--seconds", "'video=3' is for no stage")),
        ((*SMALL, "--price", "-1"), ("--price", "'-1' is no number from 0")),
        ((*SMALL, "--min", "i2v=20"), ("--min", "i2v has at least 20 GPUs and at most 16")),
        ((*SMALL, "--max", "1.5"), ("--max", "1.5 is no whole number from 1")),
        ((*SMALL, "--lag", "0"), ("--lag", "0 is no whole number from 1")),
        ((*SMALL, "--mix", "video=1"), ("--mix", "'video=1' is no share")),
        ((*SMALL, "--mix", "edit=0"), ("--mix", "all its shares are 0")),
        ((*SMALL, "--vary", "much"), ("--vary", "constant, exponential")),
        ((*SMALL, "--polling", "0"), ("--polling", "0 is no number over 0")),
        ((*SMALL, "--rate", "nan"), ("--rate", "nan is no number over 0")),
        (("--rate", "1e9", "--cold-start", "1"), ("--hours", "plan at most 2,000,000 at a time")),
        ((*SMALL, "--plot", "plan.pdf"), ("--plot", "end its name in .png or .svg")),
        ((*SMALL, "--plot", "no/such/folder.png"), ("--plot", "there is no folder no/such")),
        ((*SMALL, "--gpus", "missing.toml"), ("--gpus missing.toml", "cannot be read")),
        (("--arrivals", "missing.csv"), ("--arrivals missing.csv", "cannot be read")),
    ],
)
def test_wrong_options_are_named_with_the_remedy(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    result = plan(*arguments)

    assert result.exit_code == 2
    assert [word for word in words if word not in result.stderr] == []


def test_a_wrong_line_of_a_list_is_named_by_line_and_field(tmp_path: Path) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text("time,lane,kind\n0,interactive,edit\n30,express,edit\n")

    result = plan("--arrivals", str(path), "--cold-start", "1")

    assert result.exit_code == 2
    assert "line 3, lane: 'express' is none of interactive, batch" in result.stderr


@pytest.mark.parametrize("package", ["simpy", "matplotlib"])
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else there(name))

    result = plan(*SMALL, "--plot", "plan.png")

    assert result.exit_code == 1
    assert f"{package}: {extras.install('plan')}" in result.stderr
