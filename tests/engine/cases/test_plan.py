"""个例的 YAML 写错了一行说清；看哪些窗口、时效、格点，与逐个数出来的相同；太大的少看些，或拒绝。"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from engine.cases import plan as planning
from engine.cases.plan import Plan, plan_cases
from engine.cases.settings import read_cases
from tests.models.small import small_spec
from util.batch import DataSpec
from util.calendar import parse_time
from util.grid import output_grid

FIRST = parse_time("2000-02-11T12")  # 头一次起报
INITS = np.arange(FIRST, FIRST + 10 * 24, 6)
GOOD = {"name": "storm", "dates": ["2000-02-14", "2000-02-15"]}


def write(path: Path, *cases: dict[str, Any], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"cases": list(cases), **more}), encoding="utf-8")
    return path


def planned(
    path: Path, spec: DataSpec, inits: np.ndarray = INITS, steps: int = 4, members: int = 1, **case: Any
) -> Plan:
    """GOOD 里改了几个键的一个个例。"""
    cases = read_cases(write(path / "cases.yaml", {**GOOD, **case}))
    (plan,) = plan_cases(cases, spec, inits, steps, members, np.ones(spec.height))
    return plan


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"date": ["2000-02-14", "2000-02-15"]}, r"unknown key cases\[0\].date = .*; nearest: cases\[0\].dates"),
        ({"longitudes": [0, 10]}, r"unknown key cases\[0\].longitudes = .*; nearest: cases\[0\].longitude$"),
        ({"dates": ["2000-02-14"]}, r"cases\[0\].dates = .*: write \[first, last\], both included"),
        ({"dates": ["2000-02-15", "2000-02-14"]}, "the last date lies before the first"),
        ({"dates": ["14.2.2000", "2000-02-14"]}, "write a day or an hour in UTC, like 1981-07-01"),
        ({"dates": ["2000-02-30", "2000-03-01"]}, "2000-02-30"),
        ({"latitude": [60, 20]}, r"cases\[0\].latitude = .*: write \[south, north\]"),
        ({"channels": "t2m"}, r"cases\[0\].channels = 't2m': input should be a valid list"),
        ({"channels": []}, r"cases\[0\].channels = \[\]"),
        ({"leads": [6.5]}, r"cases\[0\].leads\[0\] = 6.5: input should be a valid integer"),
        ({"point": [95, 0]}, r"a point is \[latitude, longitude\]"),
        ({"moments": ["2000-02-17"]}, "moments must lie within dates"),
        ({"channels": ["t2m"], "contours": {"u10": [3]}}, "contours names 'u10', which channels does not"),
        ({"name": "a/b"}, r"cases\[0\].name = 'a/b': a name is that of one folder"),
    ],
)
def test_mistakes_are_one_line(case: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_cases(write(tmp_path / "cases.yaml", {**GOOD, **case}))
    assert "\n" not in str(caught.value) and str(tmp_path / "cases.yaml") in str(caught.value)


def test_mistakes_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two cases are called storm"):
        read_cases(write(tmp_path / "a.yaml", GOOD, {**GOOD, "name": "Storm"}))
    with pytest.raises(ValueError, match="unknown key case = .*; nearest: cases"):
        read_cases(write(tmp_path / "a.yaml", GOOD, case=[]))
    with pytest.raises(ValueError, match="no file .*"):
        read_cases(tmp_path / "none.yaml")


@pytest.mark.parametrize(("inits", "steps"), [(INITS, 4), (INITS[::3], 4), (INITS, 1)])
def test_forecasts_valid_within_the_dates(inits: np.ndarray, steps: int, tmp_path: Path) -> None:
    """2 月 14 日 00 时到 15 日 23 时有效的，一对不多、一对不少；没有说的时刻是看得到的时效最多、最近正中的。"""
    plan = planned(tmp_path, small_spec(channels=2, grid=(8, 16)), inits, steps)
    first, last = parse_time("2000-02-14"), parse_time("2000-02-15T23")
    for row, init in enumerate(inits):
        for lead in range(steps):
            assert plan.inside[row, lead] == (first <= init + 6 * (lead + 1) <= last)
    seen = {hour: [6 * i for i in range(1, steps + 1) if hour - 6 * i in inits] for hour in range(first, last + 1)}
    most = max(map(len, seen.values()))
    ((hour, pairs),) = plan.shots.items()
    assert len(seen[hour]) == most
    nearest = min(abs(2 * other - first - last) for other, leads in seen.items() if len(leads) == most)
    assert abs(2 * hour - first - last) == nearest
    assert [(int(inits[row]), 6 * (lead + 1)) for row, lead in pairs] == [(hour - h, h) for h in seen[hour]]


def test_moments_and_leads_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """每天只在 12 时起报，滚 4 步：06 时看得到 +18 h，要 +6 h、+24 h 都成了它。"""
    inits = INITS[::4]
    with caplog.at_level(logging.INFO, "ar_pred"):
        plan = planned(
            tmp_path, small_spec(grid=(8, 16)), inits, moments=["2000-02-14T07", "2000-02-15T12"], leads=[6, 24]
        )
    hour = parse_time("2000-02-14T06")
    other = parse_time("2000-02-15T12")
    assert [*plan.shots] == [hour, other]
    assert [(int(inits[row]), lead) for row, lead in plan.shots[hour]] == [(hour - 18, 2)]
    assert [(int(inits[row]), lead) for row, lead in plan.shots[other]] == [(other - 24, 3)]
    assert "case storm: no forecast is valid at 2000-02-14T07 UTC, 2000-02-14T06 instead" in caplog.text
    assert "case storm: no forecast at +6 h is valid at 2000-02-14T06 UTC, +18 h instead" in caplog.text


@pytest.mark.parametrize(
    ("longitude", "wanted"),
    [
        ([-45, 45], [-45, -22.5, 0, 22.5, 45]),
        ([315, 45], [-45, -22.5, 0, 22.5, 45]),
        ([157.5, -157.5], [157.5, 180, 202.5]),
        ([90, 130], [90, 112.5]),
    ],
)
def test_boxes_run_from_west_to_east(longitude: list[float], wanted: list[float], tmp_path: Path) -> None:
    spec = small_spec(grid=(8, 16))
    plan = planned(tmp_path, spec, latitude=[20, 60], longitude=longitude)
    assert list(plan.spec.longitudes) == wanted
    np.testing.assert_allclose([spec.longitudes[c] for c in plan.columns], np.array(wanted) % 360)
    assert list(plan.spec.latitudes) == [v for v in spec.latitudes if 20 <= v <= 60]
    np.testing.assert_allclose(np.diff(output_grid(plan.spec).longitudes), 22.5)  # 图上也没有断开


def test_errors_of_the_data_are_one_line(tmp_path: Path) -> None:
    spec = small_spec(channels=2, grid=(8, 16))
    mistakes: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"dates": ["2001-01-01", "2001-01-02"]},
            "2001-01-01T00 to 2001-01-02T23 UTC; those of this split .* from 2000-02-11T18 to 2000-02-22T06",
        ),
        ({"channels": ["c00"]}, "case storm: no channel .c00.; nearest: c0"),
        (
            {"latitude": [1, 2]},
            "case storm: 0 x 16 grid points lie in its box, 2 x 2 at least are needed; ",
        ),
        ({"latitude": [20, 60], "point": [-30, 0]}, r"its point \[-30.0, 0.0\] lies outside the box"),
    )
    for case, message in mistakes:
        with pytest.raises(ValueError, match=message) as caught:
            planned(tmp_path, spec, **case)
        assert "\n" not in str(caught.value)


def test_large_cases_show_fewer_members_or_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(channels=3, grid=(8, 16))
    monkeypatch.setattr(planning, "FIELD_VALUES", 4 * 3 * 128 * (3 + 5))  # 四个时效、三个通道，五个成员
    named: dict[str, Any] = {"channels": list(spec.channels)}
    with caplog.at_level(logging.INFO, "ar_pred"):
        assert planned(tmp_path, spec, members=20, **named).members == 5
    assert "case storm: its maps show the first 5 of 20 members; scores and plumes use all" in caplog.text
    monkeypatch.setattr(planning, "FIELD_VALUES", 4 * 3 * 128 * 3)
    with pytest.raises(ValueError, match="case storm: its maps need .* a smaller box, fewer channels"):
        planned(tmp_path, spec, members=20, **named)
    assert planned(tmp_path, spec, members=20).channels == [0]  # 没有点名的通道：少看几个
    monkeypatch.setattr(planning, "LINE_VALUES", 10)
    with pytest.raises(ValueError, match="case storm: 32 forecasts are valid within its dates, .* shorter dates"):
        planned(tmp_path, spec)


def test_many_channels_are_thinned(tmp_path: Path) -> None:
    spec = small_spec(channels=3, grid=(8, 16))
    many = replace(
        spec, channels=tuple(f"x{i}" for i in range(30)), units=("1",) * 30, pressures=(None,) * 30,
        mean=tuple(map(float, range(30))), std=(1.0,) * 30,
    )  # fmt: skip
    plan = planned(tmp_path, many, contours={"x5": [1.0]})
    assert len(plan.channels) == 10 and {0, 5, 29} <= set(plan.channels)
    assert plan.spec.mean == tuple(float(c) for c in plan.channels)
