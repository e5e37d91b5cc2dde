"""时间换算：目录树按「年 + 年内小时」编号，程序里一律用 1970 年以来的小时数。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta, timezone

EPOCH = datetime(1970, 1, 1)
YEAR_HOURS = 365.2425 * 24  # 平均的一年


def hours_in_year(year: int) -> int:
    """非闰年 8760，闰年 8784。"""
    return year_start(year + 1) - year_start(year)


def year_start(year: int) -> int:
    """该年 1 月 1 日 00 时是 1970 年以来的第几小时。"""
    return (date(year, 1, 1) - EPOCH.date()).days * 24


def years_text(years: Sequence[int]) -> str:
    """升序的年份，连着的写成一段，空着的看得出：`1979, 1981 to 1982`。"""
    breaks = [i for i in range(1, len(years)) if years[i] != years[i - 1] + 1]
    runs = [years[a:b] for a, b in zip([0, *breaks], [*breaks, len(years)], strict=True)]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def hour_of(moment: datetime) -> int:
    """整点时刻 → 1970 年以来的小时；带时区的先换成 UTC。

    Raises:
        ValueError: 不是整点。
    """
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc).replace(tzinfo=None)
    hours, rest = divmod(moment - EPOCH, timedelta(hours=1))
    if rest:
        raise ValueError(f"time {moment.isoformat()} is not a full hour")
    return hours


def moment_of(hour: int) -> datetime:
    """hour_of 的逆。"""
    return EPOCH + timedelta(hours=int(hour))


def parse_time(text: str) -> int:
    """`2015-06-01T00`、`2015-06-01 00:00`、`2015-06-01` 等 ISO 写法 → 小时。

    Raises:
        ValueError: 写法不对，或不是整点。
    """
    try:  # Python 3.10 的 fromisoformat 不认识末尾的 Z
        moment = datetime.fromisoformat(text.strip().removesuffix("Z"))
    except ValueError:
        raise ValueError(f"time {text!r} is not understood; write it like 2015-06-01T00") from None
    if not 1000 <= moment.year <= 9000:  # 再远，前后几帧就出了 datetime 的范围
        raise ValueError(f"time {text!r}: years 1000 to 9000 only")
    return hour_of(moment)


def time_text(hour: int) -> str:
    """小时 → `2015-06-01T00`。"""
    return moment_of(hour).strftime("%Y-%m-%dT%H")
