"""样例数据的动力：球面上三层准地转湍流，带季节、海陆、日变化和水汽。

状态是谱系数；每一步平流、松弛、摩擦、超扩散（三阶 Adams–Bashforth，超扩散隐式）：
* 位涡 q_k = ∇²ψ_k + Σ_j S_kj ψ_j + f + 地形：热力松弛维持西风切变，斜压不稳定长出天气系统，
  底层 Ekman 摩擦和超扩散消耗能量；是非线性的混沌，不是正弦波之和。
* 近地面温度、低层露点、平流层霜点：随风平流，并向随季节与海陆变化的平衡值松弛；露点还随上升运动增减、饱和则凝结。
  （露点在水平平流中守恒，与纬度近于线性，比比湿更适合谱方法：不会出现负值。）
由状态到各变量的换算在 weather.py。单位 SI；时间是 1970 年以来的小时（UTC），可以是小数。字母同 sphere.py。
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from util.calendar import YEAR_HOURS
from util.sample.sphere import RADIUS, Array, Spectrum, Transform, laplacian, make_transform, to_grid, to_spectrum

HOUR, DAY = 3600.0, 86400.0
ROTATION = 7.292e-5  # Ω，s-1
GAS = 287.0  # 干空气气体常数，J kg-1 K-1
LAYERS = (50.0, 250.0, 750.0)  # 三层的名义气压，hPa；第一层就是 level_00
THICKNESS = (0.2, 0.35, 0.45)  # 各层占的质量：平流层轻，反过来推不动对流层
BOTTOM_DEPTH = THICKNESS[2] * 1.0e4  # 大气按 10 km 厚算，m
DEFORMATION = (1.0e6, 0.62e6)  # 上、下两个界面的变形半径，m
LOG_GAP = float(np.log(LAYERS[2] / LAYERS[1]))
STABILITY = 4.0e-3  # 对流层中部 g/cp 减去直减率，K m-1

RADIATION = 12 * DAY  # 热力松弛的时间尺度
EKMAN = 2.5 * DAY
DRAG = (40 * DAY, None, EKMAN)  # 各层摩擦的时间尺度
DIFFUSION = 0.5 * DAY  # 最短的波 e 折所需
DIFFUSION_ORDER = np.array([4.0] * 3 + [2.0] * 3)  # 位涡用 ∇⁸；示踪物用 ∇⁴，锋面处少些振铃
SPIN_UP_HOURS = 90 * 24
# 六个状态量各随哪一层的风走：三层位涡随本层，近地面温度与露点随底层，霜点随平流层
CARRIERS = ((slice(0, 3), slice(0, 3)), (slice(2, 3), slice(3, 5)), (slice(0, 1), slice(5, 6)))


class Planet(NamedTuple):
    """不随时间变的东西：变换、反演、海陆、地形、平衡态。"""

    transform: Transform
    inverse: Array  # (M, 3, 3)：各总波数上 q → ψ
    stretching: Array  # (3, 3)：S
    background: Spectrum  # (M, M, 3)：f 与地形的位涡
    continents: Spectrum  # (M, M, 1)：随机场，过 land_share 变成海陆
    orography: Spectrum  # (M, M, 1)：m
    balanced: tuple[Spectrum, Spectrum]  # 热力平衡的 ψ (M, M, 3)：年平均、冬夏差
    land: Array  # (I, J) 陆地份额
    height: Array  # (I, J) m


class Flow(NamedTuple):
    """某时刻的状态。"""

    hour: float
    flow: Spectrum  # (M, M, 6)：三层位涡（扣除 background）、近地面温度 K、低层露点 K、平流层霜点 K
    trend: Spectrum  # (M, M, 3)：位涡倾向，诊断上升运动要用


def season(hour: float) -> float:
    """1 = 北半球隆冬，-1 = 盛夏；指辐射，流场和温度滞后几周。"""
    return float(np.cos(2 * np.pi * (hour / YEAR_HOURS - 5 / 365)))


def land_share(continents: Array) -> Array:
    """随机场 → 陆地份额 0–1；海岸是平滑的，谱方法才装得下。"""
    return 0.5 + 0.5 * np.tanh(2.5 * (continents - 0.4))


def make_planet(seed: int, truncation: int) -> Planet:
    """由种子决定海陆与山脉，并备好动力要用的矩阵。"""
    transform = make_transform(truncation)
    mu = transform.mu
    rng = np.random.default_rng(seed)
    continents, ridges = (_random_field(rng, transform, *degrees) for degrees in ((1, 7), (3, 9)))
    land = land_share(to_grid(transform, continents, 0, 1)[2])[:, 0]  # (I, J)
    rough = np.maximum(to_grid(transform, ridges, 0, 1)[2][:, 0], 0.0)
    orography = to_spectrum(transform, (1200.0 * land**2 * rough)[:, None])
    height = to_grid(transform, orography, 0, 1)[2][:, 0]
    vorticity = 2 * ROTATION * mu * np.ones((len(land), 3, 1))  # (I, 3, J)
    vorticity[:, 2] *= 1 + height / BOTTOM_DEPTH
    upper, lower = THICKNESS[1] / DEFORMATION[0] ** 2, THICKNESS[2] / DEFORMATION[1] ** 2
    coupling = np.array([[-upper, upper, 0.0], [upper, -upper - lower, lower], [0.0, lower, -lower]])
    stretching = coupling / np.array(THICKNESS)[:, None]
    inverse = np.zeros((truncation + 1, 3, 3))
    inverse[1:] = np.linalg.inv(laplacian(truncation + 1)[1:, None, None] * np.eye(3) + stretching)
    background = to_spectrum(transform, vorticity)
    balanced = _balanced(transform, land)
    return Planet(transform, inverse, stretching, background, continents, orography, balanced, land, height)


def _random_field(rng: np.random.Generator, transform: Transform, lowest: int, highest: int) -> Spectrum:
    """只含总波数 lowest … highest 的随机场 (M, M, 1)，全球标准差为 1。"""
    size = len(transform.order)
    spectrum = np.zeros((size, size, 1), complex)
    for degree in range(lowest, highest + 1):
        noise = rng.standard_normal((2, degree + 1)) / degree
        noise[1, 0] = 0.0  # m = 0 的系数是实数
        spectrum[: degree + 1, degree, 0] = noise[0] + 1j * noise[1]
    grid = to_grid(transform, spectrum, 0, 1)[2]
    return spectrum / np.sqrt((grid**2 * transform.area).mean())


def _balanced(transform: Transform, land: Array) -> tuple[Spectrum, Spectrum]:
    """热力平衡的流函数：写成 μ 的多项式，西风 u = -cosφ/a ∂ψ/∂μ 在赤道自然为零。"""
    mu = np.broadcast_to(transform.mu, land.shape)
    mean, swing = np.zeros((2, len(mu), 3, mu.shape[1]))
    mean[:, 1] = -RADIUS * 165.0 * (mu**3 / 3 - mu**5 / 5)  # 对流层切变，40 度附近约 31 m/s
    swing[:, 1] = -RADIUS * 75.0 * (mu**4 / 4 - mu**6 / 6)  # 冬半球更强
    swing[:, 1] -= 15.0 * GAS * LOG_GAP / (2 * ROTATION) * land * mu**2  # 大陆冬冷夏热，热成风换成 ψ
    mean[:, 0] = mean[:, 1] + RADIUS * 8.0 * mu**3
    swing[:, 0] = swing[:, 1] - RADIUS * 8.0 * mu**6  # 冬季极夜急流，夏季东风
    return to_spectrum(transform, mean), to_spectrum(transform, swing)


def balanced_flow(planet: Planet, hour: float) -> Spectrum:
    """该时刻热力平衡的流函数 (M, M, 3)。"""
    return planet.balanced[0] + season(hour) * planet.balanced[1]


def stream_function(planet: Planet, vorticity: Spectrum) -> Spectrum:
    """位涡（扣除 background）(M, M, 3) → 流函数 (M, M, 3)，m2 s-1。"""
    return np.einsum("lkj,mlj->mlk", planet.inverse, vorticity)


def surface_balance(mu: Array, land: Array, height: Array, hour: float) -> Array:
    """近地面温度的平衡值，K：随纬度、海陆、高度与季节。"""
    return 300.0 - 40.0 * mu**2 - season(hour) * mu * (5.0 + 20.0 * land) - 5.0e-3 * height


def uplift(planet: Planet, state: Flow, stream: Spectrum) -> Spectrum:
    """诊断上升运动要用的两个场 (M, M, 2)：厚度 ψ_2 - ψ_3 的局地变化减去热力松弛；底层相对涡度。"""
    excess = stream_function(planet, state.trend) - (balanced_flow(planet, state.hour) - stream) / RADIATION
    vorticity = laplacian(len(stream))[:, None] * stream[..., 2:3]
    return np.concatenate([excess[..., 1:2] - excess[..., 2:3], vorticity], axis=2)


def ascent(mu: Array, hour: float, change: Array, advection: Array, vorticity: Array) -> Array:
    """对流层中部的上升速度，m s-1，三部分之和。

    准地转：变冷而没有冷平流，就是在上升。Ekman 抽吸：低压里摩擦辐合。热带环流圈：随太阳南北移动，准地转在那里给不出。
    change、vorticity 是 uplift 的格点值，advection 是厚度平流 J(ψ_3, ψ_2)；形状都与 mu 可广播。
    """
    coriolis = 2 * ROTATION * mu
    geostrophic = -coriolis / (GAS * LOG_GAP * STABILITY) * (change + advection)
    pumping = BOTTOM_DEPTH / EKMAN * coriolis / (coriolis**2 + 5.0e-9) * vorticity  # 5e-9：热带渐弱，赤道为零
    latitude = np.rad2deg(np.arcsin(mu))
    rising = 8.0e-3 * np.exp(-(((latitude + 10.0 * season(hour)) / 12.0) ** 2))
    sinking = 2.0e-3 * np.exp(-((latitude / 35.0) ** 4))
    return geostrophic + pumping + rising - sinking


def _tendency(planet: Planet, state: Flow) -> Spectrum:
    """状态的变化率 (M, M, 6)，不含超扩散。"""
    transform = planet.transform
    stream = stream_function(planet, state.flow[..., :3])
    carried = np.concatenate([stream, state.flow, uplift(planet, state, stream)], axis=2)  # (M, M, 11)
    carried[..., 3:6] += planet.background
    east, north, values = to_grid(transform, carried, 9, 5)  # 各 (I, ·, J)
    grid = np.empty((len(east), 6, east.shape[2]), np.float32)
    for wind, moved in CARRIERS:  # -J(ψ, A) = ψ_μ A_λ - ψ_λ A_μ
        grid[:, moved] = north[:, wind] * east[:, 3:][:, moved] - east[:, wind] * north[:, 3:][:, moved]
    advection = east[:, 2] * north[:, 1] - north[:, 2] * east[:, 1]
    metric = 1 / (RADIUS**2 * (1 - transform.mu**2))
    grid *= metric
    rising = ascent(transform.mu, state.hour, values[:, 3], metric * advection, values[:, 4])
    grid[:, 3:] += _sources(planet, state.hour, values[:, :3], rising)
    change = to_spectrum(transform, grid)
    change[..., :3] += (balanced_flow(planet, state.hour) - stream) @ (planet.stretching.T / RADIATION)
    for layer, scale in enumerate(DRAG):
        if scale is not None:
            change[..., layer] -= laplacian(len(transform.order)) * stream[..., layer] / scale
    return change


def _sources(planet: Planet, hour: float, tracers: Array, rising: Array) -> Array:
    """三个示踪物的源汇 (I, 3, J)，K s-1：海上松弛得快，因为海温几乎不变、水汽充足。"""
    mu, land = planet.transform.mu, planet.land
    surface, dew, frost = tracers[:, 0], tracers[:, 1], tracers[:, 2]
    result = np.empty_like(tracers)
    result[:, 0] = (surface_balance(mu, land, planet.height, hour) - surface) / (DAY * (2.5 + 1.5 * land))
    evaporation = (surface - 4.0 - 4.0 * land - dew) / (DAY * (1.5 + 2.5 * land))
    condensation = np.maximum(dew - surface + 0.3, 0.0) / (3 * HOUR)
    result[:, 1] = evaporation - condensation + 3.0e-3 * rising  # 露点随高度每公里降 3 K
    result[:, 2] = (frost_balance(mu) - frost) / (15 * DAY)
    return result


def frost_balance(mu: Array) -> Array:
    """平流层霜点的平衡值，K：热带冷阱最干。"""
    return 188.0 + 8.0 * mu**2


def _initial(planet: Planet, seed: int, hour: float) -> Flow:
    """平衡态加一点随机扰动；起转期里它会长成湍流。"""
    transform = planet.transform
    rng = np.random.default_rng([seed, 1])
    noise = np.concatenate([_random_field(rng, transform, 4, 10) for _ in range(3)], axis=2)
    stream = balanced_flow(planet, hour) + 2.0e6 * noise
    vorticity = laplacian(len(transform.order))[:, None] * stream + stream @ planet.stretching.T
    mu = np.broadcast_to(transform.mu, planet.land.shape)
    surface = surface_balance(mu, planet.land, planet.height, hour)
    tracers = to_spectrum(transform, np.stack([surface, surface - 5.0, frost_balance(mu)], axis=1))
    return Flow(hour, np.concatenate([vorticity, tracers], axis=2), np.zeros_like(vorticity))


def simulate(planet: Planet, seed: int, first_hour: int, last_hour: int, interval: int, spin_up: int) -> Iterator[Flow]:
    """从 first_hour 到 last_hour（不含）每隔 interval 小时给出一个状态；此前 spin_up 小时的起转期不给出。

    步长由截断决定，与 interval 无关：同一种子下，6 小时的序列就是逐小时序列的抽样。
    """
    truncation = len(planet.transform.order) - 1
    per_hour = max(1, round(truncation / 8.5))  # T10、T21、T42 每小时 1、2、5 步：风速约 120 m/s 以内稳定
    step = HOUR / per_hour
    shortest = laplacian(truncation + 1) / laplacian(truncation + 1)[-1]  # (M,) 0–1
    damping = 1 / (1 + step * shortest[:, None] ** DIFFUSION_ORDER / DIFFUSION)  # (M, 6)
    state = _initial(planet, seed, first_hour - spin_up)
    past: list[Spectrum] = []
    for count in range((spin_up + last_hour - first_hour) * per_hour):
        hour = first_hour - spin_up + count / per_hour
        tendency = _tendency(planet, state._replace(hour=hour))
        state = Flow(hour, state.flow, tendency[..., :3])
        if count >= spin_up * per_hour and (count - spin_up * per_hour) % (interval * per_hour) == 0:
            yield state
        past = [tendency, *past[:2]]
        weights = ((1.0,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12))[len(past) - 1]
        change = sum(weight * old for weight, old in zip(weights, past, strict=True))
        state = state._replace(flow=(state.flow + step * change) * damping)
