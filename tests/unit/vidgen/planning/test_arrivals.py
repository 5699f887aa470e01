"""Where the jobs of a plan come from."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from vidgen.planning import arrivals
from vidgen.planning.arrivals import Arrival


def test_the_same_seed_gives_the_same_jobs_in_order_of_time() -> None:
    mix: dict[arrivals.Kind, float] = {"edit": 1, "both": 3}
    jobs = arrivals.poisson(1000, 2, mix=mix, batch_share=0.25, seed=3)

    assert jobs == arrivals.poisson(1000, 2, mix=mix, batch_share=0.25, seed=3)
    assert jobs != arrivals.poisson(1000, 2, mix=mix, batch_share=0.25, seed=4)
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)
    assert jobs[0].at >= 0
    assert jobs[-1].at <= 7200


def test_rate_mix_and_lanes_are_as_asked_for() -> None:
    jobs = arrivals.poisson(10_000, 2, mix={"edit": 1, "both": 3}, batch_share=0.25, seed=1)

    assert len(jobs) == pytest.approx(20_000, rel=0.03)
    assert {job.kind for job in jobs} == {"edit", "both"}
    assert sum(job.kind == "edit" for job in jobs) / len(jobs) == pytest.approx(0.25, abs=0.02)
    assert sum(job.lane == "batch" for job in jobs) / len(jobs) == pytest.approx(0.25, abs=0.02)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "jobs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_in_order_of_time_from_its_earliest_job(tmp_path: Path) -> None:
    path = written(tmp_path, "kind,time,lane\nboth,12.5,batch\nedit,10,interactive\n")

    jobs, wrong = arrivals.read(path)

    assert wrong == []
    assert jobs == [Arrival(0.0, "interactive", "edit"), Arrival(2.5, "batch", "both")]


def test_times_may_be_dates(tmp_path: Path) -> None:
    lines = ("time,lane,kind", "2026-11-23T08:00:00Z,batch,i2v", "2026-11-23T09:00:30+01:00,batch,i2v")

    jobs, wrong = arrivals.read(written(tmp_path, "\n".join(lines)))

    assert wrong == []
    assert [job.at for job in jobs] == [0.0, 30.0]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ("soon,batch,both", "time", "'soon' is no time"),
        ("nan,batch,both", "time", "'nan' is no time"),
        ("2026-11-23T08:00:00Z,batch,both", "time", "mixed"),
        ("3,fast,both", "lane", "'fast' is none of interactive, batch"),
        ("3,batch,video", "kind", "'video' is none of edit, i2v, both"),
        ("3,batch", "kind", "'' is none of"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_line_and_field(
    tmp_path: Path, line: str, field: str, message: str
) -> None:
    path = written(tmp_path, f"time,lane,kind\n1,batch,both\n{line}\n")

    _, [wrong] = arrivals.read(path)

    assert wrong.field == f"{path} line 3, {field}"
    assert message in wrong.message


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "time,lane,kind"), ("time,lane\n1,batch\n", "kind is missing"), ("time,lane,kind\n", "no job")],
)
def test_a_file_without_jobs_or_columns_says_so(tmp_path: Path, text: str, message: str) -> None:
    _, [wrong] = arrivals.read(written(tmp_path, text))

    assert message in wrong.message


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    picture = tmp_path / "jobs.png"
    picture.write_bytes(b"time\xff\xfe")

    assert "cannot be read" in arrivals.read(tmp_path / "missing.csv")[1][0].message
    assert "not CSV" in arrivals.read(picture)[1][0].message


def test_of_many_wrong_lines_the_first_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, "time,lane,kind\n" + "soon,batch,both\n" * 1000)

    assert len(arrivals.read(path)[1]) == arrivals.MOST_ERRORS


def test_a_time_without_a_zone_is_utc_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jobs.csv"
    lines = ("time,lane,kind", "2026-11-23T08:00:00Z,batch,both", "2026-11-23T08:00:10,batch,both")
    path.write_text("\n".join(lines))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "America/New_York")
        time.tzset()
        found, wrong = arrivals.read(path)
    time.tzset()
    assert ([one.at for one in found], wrong) == ([0.0, 10.0], [])
