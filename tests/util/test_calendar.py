"""时间换算：与 Python 的 datetime、NumPy 的 datetime64 相同；写错的、不是整点的是一行。"""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest

from util.calendar import (
    YEAR_HOURS,
    hour_of,
    hours_in_year,
    moment_of,
    parse_time,
    time_text,
    year_start,
    years_text,
)

YEARS = [1, 1000, 1582, 1900, 1969, 1970, 1999, 2000, 2004, 2100, 9000]


def numpy_hour(text: str) -> int:
    return int(np.datetime64(text, "h").astype(np.int64))


@pytest.mark.parametrize("year", YEARS)
def test_years(year: int):
    assert year_start(year) == numpy_hour(f"{year:04d}-01-01")
    assert hours_in_year(year) == (8784 if calendar.isleap(year) else 8760)


def test_the_mean_year_is_that_of_four_centuries():
    assert sum(map(hours_in_year, range(1600, 2000))) / 400 == YEAR_HOURS


@pytest.mark.parametrize("text", ["1000-01-01T00", "1969-12-31T23", "1970-01-01T00", "2000-02-29T18", "9000-12-31T23"])
def test_one_hour_all_ways(text: str):
    hour = numpy_hour(text)
    assert parse_time(text) == hour_of(moment_of(hour)) == hour
    assert moment_of(hour) == datetime.fromisoformat(f"{text}:00")
    assert time_text(hour) == text


@pytest.mark.parametrize(
    "text", ["2015-06-01T00", " 2015-06-01 00:00\n", "2015-06-01", "2015-06-01T00:00:00Z", "2015-06-01T02:00+02:00"]
)
def test_one_moment_however_written(text: str):
    assert parse_time(text) == numpy_hour("2015-06-01T00")


def test_time_zones_are_turned_into_utc():
    local = datetime(2000, 3, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=0)))
    assert hour_of(local) == numpy_hour("2000-02-29T20")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2015-06-31", "time '2015-06-31' is not understood; write it like 2015-06-01T00"),
        ("", "is not understood"),
        ("2015-06-01T00Z Z", "is not understood"),
        ("0999-12-31", "time '0999-12-31': years 1000 to 9000 only"),
        ("9001-01-01", "years 1000 to 9000 only"),
        ("2015-06-01T00:30", "time 2015-06-01T00:30:00 is not a full hour"),
        ("2015-06-01T00:00+00:30", "time 2015-05-31T23:30:00 is not a full hour"),
    ],
)
def test_mistakes_are_one_line(text: str, said: str):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        parse_time(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("years", "text"),
    [
        ([1979], "1979"),
        ([1979, 1980], "1979 to 1980"),
        ([1979, 1981, 1982], "1979, 1981 to 1982"),
        ([1979, 1980, 1981, 1985, 1990, 1991], "1979 to 1981, 1985, 1990 to 1991"),
    ],
)
def test_years_in_words(years: list[int], text: str):
    assert years_text(years) == text
