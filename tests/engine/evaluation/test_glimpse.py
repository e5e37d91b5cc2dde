"""报告里取哪些场：地点、预算、地图与序列的数；代价里的运算次数与写开的公式相比。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.evaluation.cost import flops_per_sample, parameter_count
from engine.evaluation.glimpse import MAP_LEADS, MAP_VALUES, SERIES_VALUES, choose_glimpse, parse_points
from tests.models.small import make_model, small_spec, tiny_model
from util.grid import latitude_weights


def test_points_are_the_nearest_grid_points() -> None:
    spec = small_spec(grid=(8, 16))  # 纬度 78.75 … −78.75，每 22.5°；经度 0 … 337.5
    found = parse_points(["39.9N,116.4E", "33.9S,151.2E", "10S,20W", "40.7n,74w", "0N,359E"], spec)
    assert [(p.latitude, p.longitude) for p in found] == [
        (33.75, 112.5), (-33.75, 157.5), (-11.25, 337.5), (33.75, 292.5), (11.25, 0.0)
    ]  # fmt: skip
    for point in found:
        assert spec.latitudes[point.row] == point.latitude and spec.longitudes[point.column] == point.longitude
    assert [p.name for p in parse_points([], spec)] == ["Beijing", "London", "New York", "Singapore"]


def test_points_of_a_region() -> None:
    spec = replace(
        small_spec(grid=(4, 5)), latitudes=(60.0, 55.0, 50.0, 45.0), longitudes=(350.0, 355.0, 0.0, 5.0, 10.0)
    )
    assert [(p.name, p.latitude, p.longitude) for p in parse_points([], spec)] == [("London", 50.0, 0.0)]
    sea = replace(spec, latitudes=(-40.0, -45.0, -50.0, -55.0))
    assert [(p.name, p.latitude, p.longitude) for p in parse_points([], sea)] == [("centre", -50.0, 0.0)]
    with pytest.raises(ValueError, match="--points 39.9N,116.4E: outside the grid, latitude 45 to 60"):
        parse_points(["39.9N,116.4E"], spec)


@pytest.mark.parametrize(
    ("channels", "grid", "steps", "windows"),
    [(1, (8, 16), 1, 3), (69, (128, 256), 40, 1460), (9, (32, 64), 1, 1457)],
)
def test_the_plan_stays_within_its_budget(channels: int, grid: tuple[int, int], steps: int, windows: int) -> None:
    spec = small_spec(channels=channels, grid=grid)
    view = choose_glimpse(spec, windows, steps, parse_points([], spec))
    pixels = 0
    for reel in view.reels.values():
        latitudes, longitudes = view.axes(reel)
        pixels += len(reel.channels) * len(reel.leads) * len(reel.rows) * len(latitudes) * len(longitudes)
        assert 0 <= reel.rows.start < reel.rows.stop <= windows and reel.leads[-1] == steps - 1
    assert pixels <= 1.05 * MAP_VALUES
    assert ("roll" in view.reels) == (steps > MAP_LEADS)
    if "roll" in view.reels:
        assert view.reels["roll"].leads == list(range(steps)) and len(view.reels["roll"].rows) == 1
    numbers = 2 * len(view.channels) * len(view.leads) * len(view.series_rows) * (1 + len(view.points))
    assert numbers <= SERIES_VALUES
    assert view.leads[0] == 0 and view.leads[-1] == steps - 1
    assert 0 <= view.series_rows.start < view.series_rows.stop <= windows
    if channels * grid[0] < 1000:
        assert view.reels["maps"].factor == 1 and view.channels == list(range(channels))


def test_pictures_and_series_are_physical_and_north_to_south() -> None:
    spec = replace(
        small_spec(channels=2, grid=(8, 16)), mean=(280.0, 1.0), std=(10.0, 2.0),
        latitudes=tuple(-78.75 + 22.5 * i for i in range(8)),
    )  # fmt: skip
    view = choose_glimpse(spec, 4, 1, parse_points(["33.9S,151.2E"], spec))
    reel = view.reels["maps"]._replace(factor=2)
    fields = torch.randn(3, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    physical = fields.numpy() * np.array([10.0, 2.0])[:, None, None] + np.array([280.0, 1.0])[:, None, None]
    picture = view.picture(fields[0], reel)
    for i in range(4):
        for j in range(8):
            block = physical[0, :, ::-1][:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_allclose(picture[:, i, j], block.mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(view.axes(reel)[0], [67.5, 22.5, -22.5, -67.5])
    area = np.diff(np.sin(np.deg2rad(np.linspace(-90, 90, 9))))
    series = view.series(fields, latitude_weights(spec.latitudes))
    np.testing.assert_allclose(series[:, :, 0], (physical.mean(-1) * area).sum(-1) / area.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(series[:, :, 1], physical[:, :, 2, 7], rtol=1e-5, atol=1e-6)


def test_flops_equal_the_written_out_count() -> None:
    """小 AR_pred：每个矩阵乘 (m, k) @ (k, n) 是 2·m·k·n 次。"""
    spec = small_spec(channels=3, grid=(8, 16))
    model = tiny_model(spec).eval()
    frame, values, d, w = 2 * 4, 4 * 4 * 3, 16, 8  # 每帧的 token、每个 token 的数、编码与解码的宽度
    n = 3 * frame  # 历史的 token
    attention = 4 * 2 * n * d * d + 2 * 2 * n * n * d  # q、k、v 与输出；两次注意力的矩阵乘
    encoder = 2 * n * values * d + 2 * (attention + 2 * 2 * n * d * 4 * d)  # 嵌入，两层
    cross = 2 * 2 * frame * w * w + 2 * 2 * n * w * w + 2 * 2 * frame * n * w
    decoder = 2 * n * d * w + 2 * frame * d * w + cross + 2 * 2 * frame * w * 4 * w + 2 * frame * w * values
    assert flops_per_sample(model, spec) == encoder + decoder
    assert flops_per_sample(make_model({"name": "persistence"}, spec), spec) == 0
    assert parameter_count(model) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", ["lstm", "bidirectional", "seq2seq"])
def test_flops_of_an_lstm_equal_the_written_out_count(variant: str) -> None:
    spec = small_spec(channels=3, grid=(2, 4), frames_in=5, frames_out=2)
    options = {"name": "lstm", "variant": variant, "hidden": 6, "layers": 2}
    f, d = 3 * 2 * 4, 6  # 一帧的数、每个方向的宽度
    gates = 4 * d * (f + d) + 4 * d * (d + d)  # 一步的乘加：第一层读一帧，第二层读第一层
    both = 2 * 4 * d * (f + d) + 2 * 4 * d * (2 * d + d)  # 两个方向；第二层读两个方向的 h
    count = {
        "lstm": 5 * gates + d * 2 * f,  # 输出层一次给出两帧
        "bidirectional": 5 * both + 2 * d * 2 * f,
        "seq2seq": 5 * gates + 2 * (gates + d * f),  # 逐帧解码
    }
    assert flops_per_sample(make_model(options, spec).eval(), spec) == 2 * count[variant]


def test_flops_of_a_model_that_hands_on_a_view_of_a_parameter() -> None:
    class Queries(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.linear = torch.nn.Parameter(torch.ones(1, 5, 8)), torch.nn.Linear(8, 3, bias=False)

        def forecast(self, history: torch.Tensor, *_: object) -> torch.Tensor:
            return self.linear(self.query.expand(len(history), -1, -1))

    model: Any = Queries()
    assert flops_per_sample(model, small_spec()) == 2 * 5 * 8 * 3
