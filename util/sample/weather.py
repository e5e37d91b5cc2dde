"""样例数据的换算：模拟的状态 → 各变量在经纬网、气压层上的场，物理单位。

三层的流函数在 ln p 上作二次插值得到 13 层的风（无辐散）与位势（线性平衡），温度由位势按静力关系求导得到；
近地面几层的温度换成随风平流的近地面温度。降水 = 空气密度 × 上升速度 × 比湿 × 相对湿度的开关。
字母同 sphere.py。
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from util.sample.simulation import (
    GAS,
    LAYERS,
    ROTATION,
    Flow,
    Planet,
    ascent,
    land_share,
    season,
    stream_function,
    uplift,
)
from util.sample.sphere import Array, Viewer, balance, make_viewer, view
from util.variables import split_channel

PRESSURES = (50.0, 100.0, 150.0, 200.0, 250.0, 300.0, 400.0, 500.0, 600.0, 700.0, 850.0, 925.0, 1000.0)  # level_00 起
GRAVITY = 9.81


class Scene(NamedTuple):
    """输出网格，与网格上的海陆、地形。"""

    viewer: Viewer
    mu: Array  # (H, 1)
    longitude: Array  # (W,) 度
    land: Array  # (H, W)
    height: Array  # (H, W) m


class Snapshot(NamedTuple):
    """一个时刻在输出网格上的量，各变量由此算出。u、v、geopotential 为三层的 (3, H, W)，其余 (H, W)。"""

    hour: float
    u: Array
    v: Array
    geopotential: Array  # 对参考大气的偏差，m2 s-2
    surface: Array  # 近地面温度（不含日变化），K
    dew: Array  # 低层露点，K
    frost: Array  # 平流层霜点，K
    rising: Array  # 上升速度，m s-1


def make_scene(planet: Planet, latitudes: Array, longitudes: Array) -> Scene:
    """在给定经纬度（度）的网格上看这个行星。"""
    viewer = make_viewer(len(planet.transform.order), latitudes, longitudes)
    continents, height = view(viewer, np.concatenate([planet.continents, planet.orography], axis=2), 0)[0]
    return Scene(viewer, np.sin(np.deg2rad(latitudes))[:, None], longitudes, land_share(continents), height)


def take_snapshot(scene: Scene, planet: Planet, state: Flow) -> Snapshot:
    """把谱状态放到输出网格上。"""
    stream = stream_function(planet, state.flow[..., :3])
    spectra = [stream, balance(stream, ROTATION), state.flow[..., 3:], uplift(planet, state, stream)]
    values, east, north = view(scene.viewer, np.concatenate(spectra, axis=2), 3)  # (11, H, W)，(3, H, W)
    advection = east[2] * north[1] - north[2] * east[1]  # J(ψ_3, ψ_2)
    rising = ascent(scene.mu, state.hour, values[9], advection, values[10])
    return Snapshot(state.hour, -north[:3], east[:3], values[3:6], values[6], values[7], values[8], rising)


def compute_field(scene: Scene, snapshot: Snapshot, channel: str) -> Array:
    """一个通道的场 (H, W)，物理单位；通道名如 t2m、z_level_00。"""
    variable, level = split_channel(channel)
    if level is None:
        surface_fields = {"t2m": _t2m, "tp": _tp, "u10": _u10, "v10": _v10}
        return surface_fields[variable](scene, snapshot)
    pressure = PRESSURES[int(level.removeprefix("level_"))]
    if variable in ("u", "v"):
        return _at(pressure, snapshot.u if variable == "u" else snapshot.v)
    if variable == "z":
        return GRAVITY * standard_atmosphere(pressure)[1] + _at(pressure, snapshot.geopotential)
    temperature = _temperature(snapshot, pressure)
    if variable == "t":
        return temperature
    return _relative_humidity(temperature, _depression(snapshot, pressure))


def standard_atmosphere(pressure: float) -> tuple[float, float]:
    """国际标准大气：气压 hPa → (温度 K, 高度 m)。"""
    lapse, base, tropopause = 6.5e-3, 288.15, 226.32
    ratio = (max(pressure, tropopause) / 1013.25) ** (GAS * lapse / GRAVITY)
    temperature, height = base * ratio, base * (1 - ratio) / lapse
    if pressure < tropopause:
        height += GAS * temperature / GRAVITY * float(np.log(tropopause / pressure))
    return temperature, height


def layer_weights(pressure: float) -> tuple[Array, Array]:
    """三层在 ln p 上的二次插值：该气压处的权重 (3,)，与权重对 ln p 的导数 (3,)。"""
    nodes = np.log(LAYERS)
    vandermonde = np.linalg.inv(np.vander(nodes, 3, increasing=True))  # 系数 = 逆矩阵 × 三层的值
    s = float(np.log(pressure))
    return np.array([1.0, s, s * s]) @ vandermonde, np.array([0.0, 1.0, 2 * s]) @ vandermonde


def _at(pressure: float, layers: Array) -> Array:
    return np.tensordot(layer_weights(pressure)[0], layers, 1)


def _temperature(snapshot: Snapshot, pressure: float) -> Array:
    """静力关系 T = -(1/R) ∂Φ/∂ln p；边界层里逐渐换成近地面温度。"""
    reference, height = standard_atmosphere(pressure)
    free = reference - np.tensordot(layer_weights(pressure)[1], snapshot.geopotential, 1) / GAS
    share = 0.9 * float(np.clip(np.log(pressure / 600.0) / np.log(1000.0 / 600.0), 0.0, 1.0))
    return free + share * (snapshot.surface - 6.5e-3 * height - free)


def _depression(snapshot: Snapshot, pressure: float) -> Array:
    """温度露点差，K：850 hPa 以下取低层的，50 hPa 取平流层的，其间在 ln p 上线性过渡。"""
    share = float(np.clip(np.log(850.0 / pressure) / np.log(850.0 / 50.0), 0.0, 1.0))
    low, high = snapshot.surface - snapshot.dew, _temperature(snapshot, 50.0) - snapshot.frost
    return (1 - share) * low + share * high


def _relative_humidity(temperature: Array, depression: Array) -> Array:
    """克劳修斯–克拉珀龙：温度与露点 → 相对湿度，0–100 %。"""
    dew = temperature - np.maximum(depression, 0.0)
    return 100.0 * np.exp(5423.0 * (1 / temperature - 1 / dew))


def _t2m(scene: Scene, snapshot: Snapshot) -> Array:
    """近地面温度加日变化：地方时 15 时最暖，陆上、夏季、晴空处幅度大。"""
    local = snapshot.hour + scene.longitude / 15.0  # (W,) 地方太阳时
    latitude = np.arcsin(scene.mu)
    noon = np.maximum(np.cos(latitude + np.deg2rad(23.4) * season(snapshot.hour)), 0.0)  # 正午太阳高度角的正弦
    cloud = _relative_humidity(snapshot.surface, snapshot.surface - snapshot.dew) / 100.0
    amplitude = (0.4 + 8.0 * scene.land) * noon * (1 - 0.6 * cloud)
    return snapshot.surface + amplitude * np.cos(2 * np.pi * (local - 15.0) / 24.0)


def _tp(scene: Scene, snapshot: Snapshot) -> Array:
    """一小时的降水，m：湿空气上升才下，相对湿度 50 % 以下不下。"""
    humidity = _relative_humidity(snapshot.surface, snapshot.surface - snapshot.dew)
    switch = np.clip((humidity - 50.0) / 40.0, 0.0, 1.0)
    vapour = 611.0 * np.exp(5423.0 * (1 / 273.15 - 1 / snapshot.dew))  # 水汽压，Pa
    mixing = 0.622 * vapour / 9.0e4
    rising = np.maximum(snapshot.rising, 0.0)
    return 3.6 * rising / (1 + rising / 0.03) * mixing * switch**2  # 1 kg m-3 × 3600 s ÷ 1000 kg m-3


def _wind10(scene: Scene, snapshot: Snapshot) -> tuple[Array, Array]:
    """1000 hPa 风受地面摩擦：减速，并转向低压一侧 20 度（赤道处平滑变号）。"""
    u, v = _at(1000.0, snapshot.u), _at(1000.0, snapshot.v)
    factor = 0.8 - 0.3 * scene.land
    turn = np.deg2rad(20.0) * np.tanh(scene.mu / 0.2)
    return factor * (u * np.cos(turn) - v * np.sin(turn)), factor * (u * np.sin(turn) + v * np.cos(turn))


def _u10(scene: Scene, snapshot: Snapshot) -> Array:
    return _wind10(scene, snapshot)[0]


def _v10(scene: Scene, snapshot: Snapshot) -> Array:
    return _wind10(scene, snapshot)[1]
