"""球面上的谱变换：样例数据的流场在球谐空间里推进，极点没有缝，经向边界也不用另设。

字母：M = 截断波数 + 1（纬向波数 m 与总波数 l 都取 0 … M-1）；J、I = 2J = 高斯格点的纬、经向个数；
H、W = 输出格点；n = 一起变换的场的个数。谱系数 (M, M, n) complex，先 m 后 l，l < m 处为零；
场 = Σ_m Σ_l X_ml P_lm(μ) e^{imλ}，只存 m ≥ 0，μ = sin(纬度)，∫P²dμ = 1。
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Spectrum = NDArray[np.complex128]

RADIUS = 6.371e6  # 地球半径，m


class Transform(NamedTuple):
    """高斯格点与谱之间的矩阵；格点场一律 (I, n, J)：纬度连续存放，逐场运算才快。

    格点上的乘积用单精度（快一倍），状态与倾向在谱空间累加，用双精度。
    """

    mu: Array  # (J,) 由南向北
    area: Array  # (J,) 各纬圈的面积权重，均值为 1
    synthesis: Array  # (M, 2J, M)：上半给 P，下半给 (1-μ²)dP/dμ
    analysis: Array  # (M, M, J)：P 乘高斯权重
    order: NDArray[np.complex64]  # (M, 1, 1)，即 i m


def _epsilon(order: int | Array, degree: Array) -> Array:
    """μP_l = ε_{l+1} P_{l+1} + ε_l P_{l-1} 里的 ε。"""
    return np.sqrt(np.maximum(degree**2 - order**2, 0) / (4.0 * degree**2 - 1.0))


def legendre(size: int, mu: Array) -> tuple[Array, Array]:
    """归一化的连带勒让德函数 P_lm(μ) 与 (1-μ²)dP_lm/dμ，各 (M, J, M)。"""
    values = np.zeros((size, len(mu), size + 1))  # 多一个 l，导数要用
    for m in range(size):
        scale = np.prod(np.sqrt((2.0 * np.arange(1, m + 1) + 1) / (2.0 * np.arange(1, m + 1)))) * np.sqrt(0.5)
        values[m, :, m] = scale * (1 - mu**2) ** (m / 2)
        epsilon = _epsilon(m, np.arange(size + 2.0))
        for degree in range(m + 1, size + 1):
            below = values[m, :, degree - 2] if degree >= m + 2 else 0.0
            values[m, :, degree] = (mu * values[m, :, degree - 1] - epsilon[degree - 1] * below) / epsilon[degree]
    slopes = np.zeros((size, len(mu), size))
    for m in range(size):
        epsilon = _epsilon(m, np.arange(size + 1.0))
        for degree in range(m, size):
            below = values[m, :, degree - 1] if degree > m else 0.0
            slopes[m, :, degree] = (degree + 1) * epsilon[degree] * below
            slopes[m, :, degree] -= degree * epsilon[degree + 1] * values[m, :, degree + 1]
    return values[:, :, :size], slopes


def make_transform(truncation: int) -> Transform:
    """三角截断 T{truncation} 的变换；格点取到二次乘积不混叠的大小。"""
    size = truncation + 1
    num_lat = -(-(3 * truncation + 1) // 4) * 2  # 不小于 (3T+1)/2 的偶数
    mu, weights = np.polynomial.legendre.leggauss(num_lat)
    values, slopes = legendre(size, mu)
    return Transform(
        mu=mu.astype(np.float32),
        area=(weights / weights.mean()).astype(np.float32),
        synthesis=np.concatenate([values, slopes], axis=1).astype(np.float32),
        analysis=np.ascontiguousarray((values * weights[:, None]).transpose(0, 2, 1), np.float32),
        order=(1j * np.arange(size, dtype=np.complex64))[:, None, None].astype(np.complex64),
    )


def _multiply(matrix: NDArray, spectrum: NDArray) -> NDArray:
    """实矩阵 (M, a, b) 乘复数 (M, b, n) → (M, a, n)：把实虚部看成相邻两列，交给一次实数乘法。"""
    spectrum = np.ascontiguousarray(spectrum)
    return np.matmul(matrix, spectrum.view(matrix.dtype)).view(spectrum.dtype)


def to_grid(transform: Transform, spectrum: Spectrum, num_slopes: int, num_values: int) -> list[Array]:
    """谱 (M, M, n) → [∂/∂λ, (1-μ²)∂/∂μ, 值]，各 (I, ·, J)；前 num_slopes 个场求导，后 num_values 个场求值。"""
    from scipy.fft import irfft

    num_lat, size = len(transform.mu), len(transform.order)
    waves = _multiply(transform.synthesis, spectrum.astype(np.complex64)).transpose(0, 2, 1)  # (M, n, 2J)
    padded = np.zeros((num_lat + 1, 2 * num_slopes + num_values, num_lat), np.complex64)
    np.multiply(transform.order, waves[:, :num_slopes, :num_lat], out=padded[:size, :num_slopes])
    padded[:size, num_slopes : 2 * num_slopes] = waves[:, :num_slopes, num_lat:]
    padded[:size, 2 * num_slopes :] = waves[:, waves.shape[1] - num_values :, :num_lat]
    grid = np.asarray(irfft(padded, axis=0, norm="forward", overwrite_x=True))
    return np.split(grid, [num_slopes, 2 * num_slopes], axis=1)


def to_spectrum(transform: Transform, grid: Array) -> Spectrum:
    """格点场 (I, n, J) → 谱 (M, M, n)。"""
    from scipy.fft import rfft

    waves = np.asarray(rfft(grid.astype(np.float32, copy=False), axis=0, norm="forward"))[: len(transform.order)]
    return _multiply(transform.analysis, waves.transpose(0, 2, 1)).astype(np.complex128)


class Viewer(NamedTuple):
    """任意规则经纬网上求值的矩阵。"""

    synthesis: Array  # (M, 2H, M)
    waves: Array  # (2M, W)
    cosine: Array  # (H,) cos(纬度)


def make_viewer(size: int, latitudes: Array, longitudes: Array) -> Viewer:
    """在给定的经纬度（度）上求值；不经 FFT，网格疏密不受截断限制。"""
    mu = np.sin(np.deg2rad(latitudes))
    phase = np.outer(np.arange(size), np.deg2rad(longitudes))  # (M, W)
    double = np.where(np.arange(size) > 0, 2.0, 1.0)[:, None]  # m 与 -m 合在一起
    waves = np.stack([double * np.cos(phase), -double * np.sin(phase)], axis=1).reshape(2 * size, -1)
    return Viewer(np.concatenate(legendre(size, mu), axis=1), waves, np.sqrt(1 - mu**2))


def view(viewer: Viewer, spectrum: Spectrum, num_slopes: int) -> tuple[Array, Array, Array]:
    """谱 (M, M, n) → 值 (n, H, W)，前 num_slopes 个场的东向、北向梯度（每米）(num_slopes, H, W)。"""
    size, num, num_lat = len(spectrum), spectrum.shape[2], len(viewer.cosine)
    both = _multiply(viewer.synthesis, spectrum)  # (M, 2H, n)
    values, slopes = both[:, :num_lat], both[:, num_lat:, :num_slopes]
    east = 1j * np.arange(size)[:, None, None] * values[..., :num_slopes]
    waves = np.concatenate([values, east, slopes], axis=2)  # (M, H, n + 2 num_slopes)
    parts = np.stack([waves.real, waves.imag], axis=1).reshape(2 * size, num_lat, -1)
    # 逐纬圈相乘：每块都小，BLAS 不会为它唤醒多线程（别的进程占着核时，那会慢十倍）
    grid = (parts.transpose(1, 2, 0) @ viewer.waves).swapaxes(0, 1)  # (n + 2 num_slopes, H, W)
    metric = RADIUS * viewer.cosine[:, None]
    return grid[:num], grid[num : num + num_slopes] / metric, grid[num + num_slopes :] / metric


def laplacian(size: int) -> Array:
    """∇² 在谱空间的特征值 -l(l+1)/a²，(M,)。"""
    degree = np.arange(float(size))
    return -degree * (degree + 1) / RADIUS**2


def balance(stream: Spectrum, rotation: float) -> Spectrum:
    """线性平衡 ∇²Φ = ∇·(f∇ψ)，f = 2Ωμ：流函数 (M, M, n) → 位势，全球平均取零。"""
    size = len(stream)
    order, degree = np.arange(float(size))[:, None], np.arange(2.0, size)
    up = (degree - 1) / degree * _epsilon(order, degree)  # (M, M - 2)：l - 1 → l，l = 2 … M-1
    down = (degree + 1) / degree * _epsilon(order, degree)  # l → l - 1
    result = np.zeros_like(stream)
    result[:, 2:] += up[..., None] * stream[:, 1:-1]
    result[:, 1:-1] += down[..., None] * stream[:, 2:]
    return 2 * rotation * result
