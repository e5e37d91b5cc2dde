"""每个时效、每批窗口问一遍：两种答案——每一对场一个可平均的数（进 statistics.nc），与各场相加的和（表、谱、矩）。"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.verification.climate import Climate, dry_limits, rain_channels
from engine.verification.result import PERIODIC, REGIONAL, Asked
from engine.verification.settings import Events
from util.batch import DataSpec
from util.grid import latitude_weights
from util.scores.cells import periods_of
from util.scores.metrics import blocks
from util.scores.regional import Cells, by_region
from util.verification.areas import mean_over
from util.verification.drift import moments
from util.verification.events import happens, joint_table, member_count
from util.verification.members import Places, choose_places, energy_score, tail_crps, variogram_score
from util.verification.neighbourhood import fraction_errors, fractions
from util.verification.precipitation import category, penalties, seeps
from util.verification.sphere import is_global, spherical_spectrum

log = logging.getLogger("ar_pred")
Found = dict[tuple[str, str], Tensor]
SUMS = ("table", REGIONAL, PERIODIC, "fractions", "exceedance", "moments", "sphere")  # 这些是和，别的键是每一对场的


class Event(NamedTuple):
    """一个事件：各通道的名字（没有的是 None），高于还是低于阈值 (C, H, W)，阈值是不是相对气候态的。"""

    names: tuple[str | None, ...]
    above: bool
    threshold: Tensor
    relative: bool


class Rain(NamedTuple):
    """一个算 SEEPS 的通道：序号，干湿的界，大雨的界 (H, W)，罚分 (9, H, W)。"""

    channel: int
    wet: Tensor
    heavy: Tensor
    penalties: Tensor


@dataclass(frozen=True)
class Verifier:
    """问什么，和问要用的常量；都在设备上。"""

    settings: Events
    spec: DataSpec
    times: int  # 气候看了几个时刻
    events: list[Event]
    sizes: list[int]  # FSS 的窗
    places: Places
    rain: list[Rain]
    sphere: bool
    weights: Tensor  # (H,)
    regions: list[str]  # 事件另在哪里问
    by: tuple[str, ...]  # 另按什么分
    periods: list[str]  # 分出来的，有窗口的

    @property
    def asked(self) -> Asked:
        events, limits = [event.names for event in self.events], self.settings.exceedance
        return Asked(events, self.sizes, limits, self.times, self.regions, self.periods)

    def lead(
        self,
        forecasts: Mapping[str, Tensor],
        truth: Tensor,
        normal: Tensor,
        keep: Tensor,
        valid_hours: np.ndarray,
        cells: Cells | None = None,
    ) -> Found:
        """一批的一个时效。forecasts: 各 (B, M, C, H, W)；truth、normal: (B, C, H, W)；keep: (B, C) bool，计的场。

        （模型，统计量）→ (B, C)；（SUMS 之一，模型或 truth）→ (C, …)，计的场之和。

        Args:
            valid_hours: (B,) 有效时间，UTC。
            cells: 各区域，给了就有（REGIONAL，模型）。
        """
        found: Found = {}
        inside = periods_of(valid_hours, self.by)
        periods = None  # (B, P)
        if self.periods:
            periods = torch.from_numpy(np.stack([inside[name] for name in self.periods], 1)).double().to(truth.device)
        for windows, channels in blocks(truth):
            part = {name: one[windows, :, channels] for name, one in forecasts.items()}
            scored = self._block(part, truth[windows, channels], normal[windows, channels], channels, cells)
            for key, values in scored:
                kept = keep[windows, channels]
                if key[0] in SUMS:
                    counted = torch.where(kept.view(*kept.shape, *[1] * (values.ndim - 2)), values, 0.0)
                    totals = {key: counted.sum(0)}
                    if key[0] == "table" and periods is not None:
                        totals[PERIODIC, key[1]] = torch.einsum("bp,b...->...p", periods[windows], counted)
                    for one, total in totals.items():
                        whole = found.setdefault(one, values.new_zeros(truth.shape[1], *total.shape[1:]))
                        whole[channels] += total
                else:
                    whole = found.setdefault(key, values.new_empty(truth.shape[:2]))
                    whole[windows, channels] = values
        for name, forecast in forecasts.items():
            found[name, "variogram"] = variogram_score(forecast, truth, self.places)
            found |= self._seeps(name, forecast, truth)
        return found

    def _block(
        self,
        forecasts: Mapping[str, Tensor],
        truth: Tensor,
        normal: Tensor,
        channels: slice,
        cells: Cells | None,
    ) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """一段（几个窗口、几个通道）的全部答案，各 (b, c, …)。"""
        means = {"table": lambda field: mean_over(field, self.weights)}
        if cells is not None:
            means[REGIONAL] = lambda field: by_region(field, cells.area)
        tables: dict[tuple[str, str], list[Tensor]] = {(kind, name): [] for kind in means for name in forecasts}
        errors: dict[str, list[Tensor]] = {name: [] for name in forecasts}
        for event in self.events:
            threshold = event.threshold[channels] + normal if event.relative else event.threshold[channels]
            real = happens(truth, threshold, event.above)
            windows = self._fractions(real, 1)
            for name, forecast in forecasts.items():
                members = forecast.shape[1]
                count = member_count(forecast, threshold, event.above)
                for kind, mean in means.items():
                    tables[kind, name].append(joint_table(count, real, members, mean))
                pairs = zip(self._fractions(count, members), windows, strict=True)
                errors[name] += [fraction_errors(one, other, self.weights) for one, other in pairs]
        if self.events:
            for key, rows in tables.items():
                yield key, torch.stack(rows, 2)  # (b, c, E, M + 1, 2[, R])
        for name, forecast in forecasts.items():
            if errors[name]:
                stacked = torch.stack(errors[name], 2)
                yield ("fractions", name), stacked.unflatten(2, (-1, len(self.sizes)))  # (b, c, E, S, 2)
            yield from self._one(name, forecast, truth)
        yield ("moments", "truth"), moments(truth[:, None], self.weights)
        if self.sphere:
            yield ("sphere", "truth"), spherical_spectrum(truth, self.spec.latitudes)

    def _fractions(self, fields: Tensor, members: int) -> list[Tensor]:
        return [fractions(fields, members, size, self.spec.closes_circle) for size in self.sizes]

    def _one(self, name: str, forecast: Tensor, truth: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """与事件无关的，一个模型的。"""
        for tail, values in tail_crps(forecast, truth, self.weights).items():
            yield (name, f"crps_{tail}"), values
        yield (name, "energy"), energy_score(forecast, truth, self.weights)
        error = (forecast.mean(1) - truth).abs()
        limits = self.settings.exceedance
        if limits:
            over = [mean_over(error > limit, self.weights) for limit in limits]
            yield ("exceedance", name), torch.stack(over, -1)
        yield ("moments", name), moments(forecast, self.weights)
        if self.sphere:
            yield ("sphere", name), spherical_spectrum(forecast, self.spec.latitudes).mean(1)

    def _seeps(self, name: str, forecast: Tensor, truth: Tensor) -> Found:
        """各成员的平均：集合平均是一场哪里都不下的小雨。没有降水的通道时什么也没有。"""
        if not self.rain:
            return {}
        found = torch.full(truth.shape[:2], torch.nan, dtype=torch.float64, device=truth.device)
        for channel, wet, heavy, table in self.rain:
            real = category(truth[:, channel], wet, heavy)
            members = [category(one[:, channel], wet, heavy) for one in forecast.unbind(1)]
            found[:, channel] = torch.stack([seeps(one, real, table, self.weights) for one in members]).mean(0)
        return {(name, "seeps"): found}


def make_verifier(
    settings: Events,
    spec: DataSpec,
    climate: Climate,
    thresholds: Tensor,
    given: Mapping[str, tuple[float, ...]],
    device: torch.device,
    regions: Collection[str] = (),
    by: tuple[str, ...] = (),
    valid_hours: np.ndarray | None = None,
) -> Verifier:
    """thresholds: (C, K) 标准化的，不足的是 NaN；given: 命令行的 --thresholds，物理单位。

    regions: 各区域的名字；by: season、month、hour，那时 valid_hours 是全部有效时间，UTC。
    """
    fits = [size for size in settings.neighbourhoods if size <= min(spec.height, spec.width)]
    if left := sorted(set(settings.neighbourhoods) - set(fits)):
        log.warning("no FSS for neighbourhoods %s: the grid has %d x %d cells", left, spec.height, spec.width)
    latitudes, longitudes = np.array(spec.latitudes), np.array(spec.longitudes)
    sphere = is_global(latitudes, spec.closes_circle)
    if not sphere:
        log.info("no spherical spectra: the grid does not reach from pole to pole around the globe")
    places = choose_places(latitudes, longitudes, settings.variogram_points)
    rain = rain_channels(spec)
    limits = dry_limits(spec, rain, settings.dry_mm)
    rows = zip(rain, limits, climate.dry.to(device), climate.heavy.to(device), strict=True)
    periods = {} if valid_hours is None else periods_of(valid_hours, by)
    return Verifier(
        settings=settings,
        spec=spec,
        times=climate.times,
        events=[*quantile_events(settings, spec, climate, device), *fixed_events(spec, thresholds, given, device)],
        sizes=fits,
        places=Places(*(one.to(device) for one in places)),
        rain=[Rain(i, torch.tensor(wet, device=device), heavy, penalties(dry)) for i, wet, dry, heavy in rows],
        sphere=sphere,
        weights=latitude_weights(spec.latitudes).to(device),
        regions=[*regions],
        by=by,
        periods=[name for name, there in periods.items() if there.any()],
    )


def quantile_events(settings: Events, spec: DataSpec, climate: Climate, device: torch.device) -> list[Event]:
    """低于低的、高于高的分位数；降水没有「异常地少」这样的事件（那是干，由 SEEPS 问）。"""
    rain = {spec.channels[i] for i in rain_channels(spec)}
    events = []
    for q, threshold in zip(settings.quantiles, climate.quantiles.to(device), strict=True):
        above = q > 0.5
        names = tuple(None if c in rain and not above else f"{'>' if above else '<'}q{q:g}" for c in spec.channels)
        events.append(Event(names, above, threshold, relative=True))
    return events


def fixed_events(
    spec: DataSpec, thresholds: Tensor, given: Mapping[str, tuple[float, ...]], device: torch.device
) -> list[Event]:
    """超过命令行所说的阈值。"""
    events = []
    for k, threshold in enumerate(thresholds.to(device).unbind(1)):
        names = (given.get(channel, ())[k : k + 1] for channel in spec.channels)
        labels = tuple(f">{value[0]:.12g}" if value else None for value in names)
        events.append(Event(labels, True, threshold[:, None, None], relative=False))
    return events
