"""网络的输入：历史里喂回来的通道，接上外强迫（不必预报就知道的量：太阳辐射、日历、地点、地形）。

算出来的由时刻与格点得来，都在 [-1, 1.04] 之内；读来的（static/NAME）已按自己的均值与标准差标准化，存为 buffer，
所以检查点离开数据也能预报。外强迫只进网络，不预报、不计分；data.roles 里 diagnostic 的通道反过来：预报，不进网络。

| solar | 大气顶的太阳辐射，到这一帧为止的一个间隔里的平均，占太阳常数的份额 |
| day_of_year | 年内时刻的正弦与余弦 |
| hour_of_day | 地方平时的正弦与余弦 |
| latitude | 纬度的正弦 |
| longitude | 经度的正弦与余弦 |

字母：B 批，T 帧数，L ≥ T 帧数，C 通道，H×W 网格，E 一帧里随时间变的外强迫的通道数。
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from util.batch import DataSpec
from util.calendar import YEAR_HOURS
from util.variables import STATIC

J2000 = 262980  # 2000-01-01T12，1970 年以来的小时
TURN = 2 * math.pi
Axes = tuple[Tensor, Tensor]  # 纬度 (H, 1)、经度 (W,)，弧度，float64：float32 的 π/2 已过了极点


class Inputs(nn.Module):
    """第 i 帧带着自己的外强迫，和以后每隔 shift 帧的，直到全部目标时刻都有；不随时间变的只带一份。

    各帧的通道数这样才相同；shift = min(T_in, T_out)，末几帧带的正是各目标的。
    没有外强迫、没有 diagnostic 时原样给出历史，一个 buffer 也没有。
    """

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.interval, self.shift = spec.interval_hours, min(spec.frames_in, spec.frames_out)
        self.copies = 1 + math.ceil(spec.frames_out / self.shift)
        axes, grid = axes_of(spec), (spec.height, spec.width)
        constant = [part for name in spec.forcings if name in CONSTANT for part in CONSTANT[name](axes)]
        read = [spec.static.get(name, torch.zeros(grid)) for name in spec.forcings if name.startswith(STATIC)]
        fed = [i for i, channel in enumerate(spec.channels) if channel not in spec.diagnostic]
        self.changing = [name for name in spec.forcings if name in CHANGING]
        if self.changing:
            self.latitude, self.longitude = (nn.Buffer(axis, persistent=False) for axis in axes)
        self.place = nn.Buffer(stacked(constant, grid), persistent=False) if constant else None
        self.static = nn.Buffer(torch.stack(read)) if read else None  # 检查点里的随权重装进来
        self.fed = nn.Buffer(torch.tensor(fed), persistent=False) if spec.diagnostic else None
        each = sum(len(CHANGING[name](torch.zeros(1, 1), axes, 1)) for name in self.changing)
        self.fields = len(fed)  # 其中喂回来的
        self.channels = self.fields + len(constant) + len(read) + self.copies * each  # 一帧进网络的

    def forward(self, fields: Tensor, time: Tensor | None, wraps: bool = False) -> Tensor:
        """(B, T, C, H, W) 与从第一帧起的 UTC 小时 (B, ≥ T) → (B, T, channels, H, W)。

        恰好给到各帧带着的最后一个时刻的，照给的（时效不止一种）；不然由第一帧起每隔一个间隔。
        wraps: 没有给到的绕回头几帧：拿掉头一帧来重建时，末一帧带着它的（AR_pred）。

        Raises:
            ValueError: 有随时间变的外强迫而不知道时刻。
        """
        frames = fields.shape[1]
        parts = [self.fed_back(fields)]
        parts += [part.expand(*fields.shape[:2], -1, -1, -1) for part in (self.place, self.static) if part is not None]
        if self.changing:
            if time is None:
                raise ValueError(
                    f"data.forcings = {self.changing} need the time of the forecast: give --time beside --inputs"
                )
            count = frames + (self.copies - 1) * self.shift
            if wraps:
                time = torch.cat([time, time[:, : count - time.shape[1]]], 1)
            regular = time[:, :1] + self.interval * torch.arange(count, device=time.device)
            made = self.at(time if time.shape[1] == count else regular).to(fields.dtype)
            parts += [made[:, first : first + frames] for first in range(0, count - frames + 1, self.shift)]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def at(self, hours: Tensor) -> Tensor:
        """(B, L) UTC 小时 → 随时间变的外强迫 (B, L, E, H, W) float32。"""
        axes = self.latitude, self.longitude
        made = [part for name in self.changing for part in CHANGING[name](hours, axes, self.interval)]
        return stacked(made, (*hours.shape, len(self.latitude), len(self.longitude)))

    def fed_back(self, fields: Tensor) -> Tensor:
        """(B, T, C, H, W) → 喂回来的通道 (B, T, C', H, W)。"""
        return fields if self.fed is None else fields.index_select(2, self.fed)

    def base(self, fields: Tensor, dim: int = 2) -> Tensor:
        """(B, T, C, H, W) → 差加在上面的：diagnostic 的通道是 0，网络给出的就是场。dim: 通道在哪一维。"""
        if self.fed is None:
            return fields
        return torch.zeros_like(fields).index_copy(dim, self.fed, fields.index_select(dim, self.fed))


def axes_of(spec: DataSpec) -> Axes:
    degrees = (torch.tensor(axis, dtype=torch.float64) for axis in (spec.latitudes, spec.longitudes))
    latitude, longitude = (axis.deg2rad() for axis in degrees)
    return latitude[:, None], longitude


def stacked(parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """各自铺满 (…, H, W)，叠成 (…, n, H, W) float32。"""
    return torch.stack([part.float().expand(shape) for part in parts], -3)


def day_of_year(hours: Tensor, axes: Axes, interval: int) -> list[Tensor]:
    """(B, L) → (B, L, 1, 1)。"""
    angle = (hours.double() * (TURN / YEAR_HOURS))[..., None, None]
    return [angle.sin(), angle.cos()]


def hour_of_day(hours: Tensor, axes: Axes, interval: int) -> list[Tensor]:
    """(B, L) → (B, L, 1, W)：地方平时，每 15° 差一小时。"""
    angle = (hours % 24)[..., None, None] * (TURN / 24) + axes[1]
    return [angle.sin(), angle.cos()]


def solar(hours: Tensor, axes: Axes, interval: int) -> list[Tensor]:
    """(B, L) → (B, L, H, W)：大气顶水平面上 (hours − interval, hours] 的平均，占太阳常数的份额。

    赤纬与时差取间隔正中的，太阳高度的正弦 a + b cos h 对时角 h 的积分就有闭式：日出日落的时角之外不计，
    转过几圈加几天的总量。与数值积分差不到千分之一（tests/models/layers/test_forcings.py）。
    """
    latitude, longitude = axes
    declination, equation, nearness = (part[..., None, None] for part in sun(hours.double() - interval / 2))
    a = (latitude.sin() * declination.sin()).float()  # (B, L, H, 1)
    b = (latitude.cos() * declination.cos()).float()
    sunset = (-latitude.tan() * declination.tan()).clamp(-1, 1).acos().float()  # 极夜 0，极昼 π

    def risen(angle: Tensor) -> Tensor:  # 从正午积到时角 angle
        return a * angle + b * angle.sin()

    span = TURN * interval / 24
    end = (hours % 24 - 12)[..., None, None] * (TURN / 24) + equation + longitude  # (B, L, 1, W)
    sums = []
    for angle in (end, end - span):
        turns = (angle / TURN).round()
        today = (angle - TURN * turns).float().clamp(-sunset, sunset)  # (B, L, H, W)
        sums.append(risen(today) + 2 * turns.float() * risen(sunset))
    return [(sums[0] - sums[1]) * (nearness / span).float()]


def sun(hours: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1970 年以来的 UTC 小时 (…) → 太阳的赤纬、时差（视时减平时），弧度；平均的日地距离与此刻的之比的平方。

    The Astronomical Almanac 的低精度公式，1950–2050 年准到 0.01°（Michalsky 1988, Solar Energy 40, 227–235）。
    """
    days = (hours.double() - J2000) / 24
    anomaly = (357.528 + 0.9856003 * days).deg2rad()
    mean_longitude = 280.460 + 0.9856474 * days
    longitude = (mean_longitude + 1.915 * anomaly.sin() + 0.020 * (2 * anomaly).sin()).deg2rad()
    obliquity = (23.439 - 4e-7 * days).deg2rad()
    declination = (obliquity.sin() * longitude.sin()).asin()
    ascension = torch.atan2(obliquity.cos() * longitude.sin(), longitude.cos())
    equation = torch.remainder(mean_longitude.deg2rad() - ascension + math.pi, TURN) - math.pi
    distance = 1.00014 - 0.01671 * anomaly.cos() - 0.00014 * (2 * anomaly).cos()  # 天文单位
    return declination, equation, distance**-2


def of_latitude(axes: Axes) -> list[Tensor]:
    """(H, 1)。"""
    return [axes[0].sin()]


def of_longitude(axes: Axes) -> list[Tensor]:
    """(W,)。"""
    return [axes[1].sin(), axes[1].cos()]


CHANGING = {"solar": solar, "day_of_year": day_of_year, "hour_of_day": hour_of_day}  # 随时间变的
CONSTANT = {"latitude": of_latitude, "longitude": of_longitude}
