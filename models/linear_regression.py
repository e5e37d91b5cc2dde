"""岭回归：历史展平 (B, T_in·F) → 预报展平 (B, T_out·F)，F = C·H·W，截距不受惩罚；闭式，以 float64 求解。

ridge：一个岭回归管全部变量。multi_output：每个变量一个，都看全部变量的历史，输入输出先标准化。
岭回归的各个输出互不相干，输出的缩放又会在还原时抵消，所以「每个变量一个」与合在一起解完全相同；
multi_output 真正的不同只有输入的标准化（等价于惩罚乘以各格点的方差）与更大的 alpha。
与原版不同：输入的标准差按格点取、各历史帧合计（原版的 StandardScaler 每个历史帧各算，步长 1 的窗口里几乎一样）。

两种解法，哪种所需的内存小用哪种：
* 原问题：Gram 矩阵 (T_in·F)²，结果是系数 (T_in·F, T_out·F)。9 通道 32×64、12 → 4 时 Gram 矩阵要 391 GB。
* 对偶：Gram 矩阵 N²，N 个训练窗口。系数不写出来：预报是训练目标的加权和，权重由历史与各训练历史的内积经一个 N×N 的
  矩阵得到。步长 1 的窗口共用帧，所以只存帧（每帧一份）和各窗口由哪些帧组成：12 → 4 时比存窗口小 16 倍。

惩罚（alpha: auto）在验证段的窗口上挑：Gram 矩阵 = QΛQᵀ 只分解一次，预报 = Z (Λ + α)⁻¹ QᵀM，
Z 是验证的历史在 Q 上的坐标，所以验证误差只是 1/(λ + α) 的二次式，系数边看边加（RidgePath），每个 α 只要几次乘加。

buffer 的形状要在看数据之前定下，检查点才能装回：对偶按 max_frames 开，用不满的行为零。
来源：Hoerl & Kennard 1970；对偶见 Saunders et al. 1998。

字母：B 批，N 窗口，n 帧，t = T_in + T_out，F 一帧的数，E 一帧里作输入的数（外强迫在内），D = T_in·E，P = T_out·F。
"""

from __future__ import annotations

import logging
import math
from hashlib import blake2b
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from models.layers.forcings import Inputs
from models.layers.losses import refuse_members
from models.layers.members import Generators
from util.batch import Batch, DataSpec
from util.strict import PositiveInt, Strict

log = logging.getLogger("ar_pred")
CONSTANT = 1e-12  # 方差比这还小的格点当作不变的，不缩放（数据已是标准化的）
COLUMNS = 1024  # 原问题一次解几个输出
ALPHAS = [10 ** (quarter / 4) for quarter in range(-12, 41)]  # 0.001 到 10¹⁰


class Config(Strict):
    """variant 见文件开头；原版的 alpha：ridge 1.0，multi_output 10.0。对偶的大小、用哪种解法由 max_frames 定。"""

    variant: Literal["ridge", "multi_output"] = "ridge"
    """multi_output: inputs are standardised first, which equals one ridge regression a variable"""
    alpha: float | Literal["auto"] = "auto"
    """L2 penalty; auto: chosen on the validation windows"""
    max_frames: PositiveInt
    """at least the frames of the training dates (samples of split train in the log); sets the size of the checkpoint"""
    memory_gb: float = Field(8.0, gt=0)
    """memory the solution may take, 10^9 bytes"""

    @field_validator("alpha", mode="before")
    @classmethod
    def _positive_or_auto(cls, alpha: object) -> object:  # 否则报错只提联合类型的第一种
        if alpha == "auto" or (isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < math.inf):
            return alpha
        raise ValueError("must be auto (chosen on the validation split) or a number above 0")


class RidgePath:
    """各 α 的验证误差：Σ|y − z (Λ + α)⁻¹ W|² = 常数 + sᵀ(ZᵀZ ∘ WWᵀ)s − 2 sᵀ Σ z∘(yWᵀ)，s = 1/(λ + α)。"""

    def __init__(self, values: Tensor, targets: Tensor) -> None:
        """values: λ (r,)；targets: WWᵀ (r, r)。"""
        self.values, self.targets = values, targets
        self.square = torch.zeros_like(targets)  # ZᵀZ
        self.cross = torch.zeros_like(values)  # Σ z∘(yWᵀ)
        self.count = 0
        self.floor = len(values) * torch.finfo(values.dtype).eps * float(values.max())  # 特征值准到这里

    def add(self, z: Tensor, y: Tensor) -> None:
        """几个窗口的 z、yWᵀ，都是 (B, r)。"""
        self.square.addmm_(z.T, z)
        self.cross += (z * y).sum(0)
        self.count += len(z)

    def best(self) -> float:
        """误差最小的 α。"""
        quadratic, alphas = self.square * self.targets, [alpha for alpha in ALPHAS if alpha > self.floor]
        shrunk = [1 / (self.values + alpha) for alpha in alphas]
        errors = [float(s @ quadratic @ s - 2 * s @ self.cross) for s in shrunk]
        return alphas[min(range(len(alphas)), key=errors.__getitem__)]

    def inverse(self, alpha: float) -> Tensor:
        """1/(λ + α)，(r,)。

        Raises:
            ValueError: 在舍入之内奇异。
        """
        shifted = self.values + alpha
        if shifted.min() <= self.floor:
            raise ValueError(f"model.alpha = {alpha:g} is too small: the equations are singular to rounding; try auto")
        return 1 / shifted


class Primal(nn.Module):
    """正规方程 (XᵀX + αS) W = XᵀY，X、Y 去掉各自的平均；S 为单位阵或各输入的方差。"""

    def __init__(self, frames_in: int, frames_out: int, seen: int, size: int) -> None:
        super().__init__()
        self.frames_in, self.frames_out = frames_in, frames_out
        self.coefficients = nn.Buffer(torch.zeros(frames_in * seen, frames_out * size))
        self.intercept = nn.Buffer(torch.zeros(frames_out * size))
        self.count = 0
        self.sums: list[Tensor] = []  # ΣX (D,)、ΣY (P,)、XᵀX (D, D)、XᵀY (D, P)；看数据时才分配

    @staticmethod
    def bytes_needed(frames_in: int, frames_out: int, seen: int, size: int) -> int:
        """Gram 矩阵、特征向量与分解的草稿（float64），XᵀY 与它在特征向量上的（float64），系数（float32）。"""
        inputs, outputs = frames_in * seen, frames_out * size
        return 32 * inputs**2 + 20 * inputs * outputs

    def add(self, seen: Tensor, fields: Tensor) -> None:
        """(B, t, E)、(B, t, F)。"""
        x, y = (part.to(self.coefficients.device, torch.float64) for part in self._pair(seen, fields))
        inputs, outputs = self.coefficients.shape
        if not self.sums:
            self.sums = [x.new_zeros(shape) for shape in ((inputs,), (outputs,), (inputs, inputs), (inputs, outputs))]
        x_sum, y_sum, gram, moment = self.sums
        x_sum += x.sum(0)
        y_sum += y.sum(0)
        gram.addmm_(x.T, x)
        moment.addmm_(x.T, y)
        self.count += len(x)

    def factor(self, standardise: bool) -> RidgePath:
        """输入先除以各自惩罚的平方根，惩罚就是 α 乘单位阵。"""
        x_sum, y_sum, gram, moment = self.sums
        self.x_mean, self.y_mean, self.sums = x_sum / self.count, y_sum / self.count, []
        self.scale = torch.ones_like(x_sum)
        if standardise:
            square = (gram.diagonal() / self.count).view(self.frames_in, -1).mean(0)  # (E,)
            variance = square - self.x_mean.view(self.frames_in, -1).mean(0).square()
            self.scale = _or_one(variance).rsqrt().repeat(self.frames_in)
        gram.addr_(self.x_mean, self.x_mean, alpha=-self.count).mul_(self.scale).mul_(self.scale[:, None])
        moment.addr_(self.x_mean, self.y_mean, alpha=-self.count).mul_(self.scale[:, None])
        values, self.vectors = torch.linalg.eigh(gram)
        self.moment = self.vectors.T @ moment  # (D, P)
        return RidgePath(values, self.moment @ self.moment.T)

    def project(self, seen: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t, E)、(B, t, F) → z、yWᵀ，(B, D)。"""
        x, y = (part.double() for part in self._pair(seen, fields))
        return (x - self.x_mean) * self.scale @ self.vectors, (y - self.y_mean) @ self.moment.T

    def _pair(self, seen: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        """历史与目标，展平。"""
        return seen[:, : self.frames_in].flatten(1), fields[:, self.frames_in :].flatten(1)

    def finish(self, inverse: Tensor) -> None:
        """inverse: 1/(λ + α)。"""
        rotation = self.scale[:, None] * self.vectors * inverse  # (D, D)
        for i in range(0, len(self.y_mean), COLUMNS):
            part = rotation @ self.moment[:, i : i + COLUMNS]  # (D, ≤ COLUMNS)
            self.coefficients[:, i : i + COLUMNS] = part
            self.intercept[i : i + COLUMNS] = self.y_mean[i : i + COLUMNS] - self.x_mean @ part
        del self.vectors, self.moment, self.x_mean, self.y_mean, self.scale

    def forward(self, history: Tensor) -> Tensor:
        """(B, T_in, E) → (B, T_out, F)。"""
        return (history.flatten(1) @ self.coefficients + self.intercept).unflatten(1, (self.frames_out, -1))


class Dual(nn.Module):
    """预报 = Σᵢ wᵢ · 第 i 个窗口的目标，w = 1/N + (k − k̄)·H(HKH + αI)⁻¹，Σ wᵢ = 1。

    每一帧存两样：场（作目标），网络看的（作历史；没有外强迫与 diagnostic 时就是场，不另存）。
    k (N,) 是历史与各训练历史的内积（标准化时各格点除以方差），K 是训练历史之间的，k̄ 是 K 的列平均，H 去掉平均。
    预报也用 float64：K 的条件数可达 10⁹，float32 不够。
    """

    def __init__(self, frames_in: int, frames_out: int, seen: int | None, size: int, max_frames: int) -> None:
        super().__init__()
        self.frames_in, self.frames_out = frames_in, frames_out
        double = torch.float64
        self.frames = nn.Buffer(torch.zeros(max_frames, size))
        self.seen = None if seen is None else nn.Buffer(torch.zeros(max_frames, seen))
        self.windows = nn.Buffer(torch.zeros(max_frames, frames_in + frames_out, dtype=torch.int64))  # 各由哪几帧组成
        self.precision = nn.Buffer(torch.ones(seen or size, dtype=double))  # 1/方差，不标准化时为 1
        self.share = nn.Buffer(torch.zeros(max_frames, dtype=double))  # 1/N；空行为零
        self.kernel_mean = nn.Buffer(torch.zeros(max_frames, dtype=double))
        self.inverse = nn.Buffer(torch.zeros(max_frames, max_frames, dtype=double))
        self.count = 0
        self.rows: dict[bytes, int] = {}  # 帧的摘要 → 第几行；同一时刻因「插值只看过去」可能有两个样子，各存一份

    @staticmethod
    def bytes_needed(seen: int | None, size: int, max_frames: int) -> int:
        """帧（float32，求解时另有两份 float64），六个 n×n（float64）：历史间、目标间的内积，特征向量，草稿，逆。"""
        return 20 * max_frames * (size + (seen or 0)) + 48 * max_frames**2

    @property
    def inputs(self) -> Tensor:
        """(n, E)：各帧作历史时的样子。"""
        return self.frames if self.seen is None else self.seen

    def add(self, seen: Tensor, fields: Tensor) -> None:
        """(B, t, E)、(B, t, F)。"""
        for pair in zip(seen.cpu(), fields.cpu(), strict=True):
            rows = torch.tensor([self._row(*frame) for frame in zip(*pair, strict=True)])
            self._check_room(self.count)
            self.windows[self.count] = rows
            self.count += 1

    def _row(self, seen: Tensor, frame: Tensor) -> int:
        key = _digest(frame) if self.seen is None else _digest(torch.cat([seen, frame]))
        if key not in self.rows:
            row = len(self.rows)
            self._check_room(row)
            self.frames[row] = frame
            if self.seen is not None:
                self.seen[row] = seen
            self.rows[key] = row
        return self.rows[key]

    def _check_room(self, used: int) -> None:
        if used == len(self.frames):
            raise ValueError(
                f"model.max_frames = {used}: the training windows hold more frames than that (an interpolated frame "
                f"can count twice); try {used * 11 // 10}, at least the samples that the log gives for split train, or "
                "shorten data.splits.train"
            )

    def factor(self, standardise: bool) -> RidgePath:
        """窗口间的 Gram 矩阵去掉平均，再分解。"""
        frames = self.inputs[: len(self.rows)].double()  # (n, E)
        past, future = self.windows[: self.count].T.split([self.frames_in, self.frames_out])  # (T_in, N)、(T_out, N)
        self.rows = {}
        if standardise:
            uses = past.flatten().bincount(minlength=len(frames)).double() / past.numel()
            self.precision.copy_(1 / _or_one(uses @ frames.square() - (uses @ frames).square()))
        gram = _summed((frames * self.precision) @ frames.T, past)  # (N, N)
        frames = frames if self.seen is None else self.frames[: len(frames)].double()
        targets = _summed(frames @ frames.T, future)
        del frames
        self.kernel_mean[: self.count] = gram.mean(0)
        self.target_mean = targets.mean(0)
        values, self.vectors = torch.linalg.eigh(_centred(_centred(gram).T))
        targets = _centred(_centred(targets).T)
        return RidgePath(values, self.vectors.T @ targets @ self.vectors)

    def project(self, seen: Tensor, fields: Tensor) -> tuple[Tensor, Tensor]:
        """(B, t, E)、(B, t, F) → z、yWᵀ，(B, N)。"""
        frames, rows = _distinct(fields)  # 步长 1 的窗口共用帧：内积只算一次
        looks, places = (frames, rows) if self.seen is None else _distinct(seen)
        count, known = self.frames_in, self.frames.double()
        scaled, plain = (looks * self.precision) @ self.inputs.double().T, frames.double() @ known.T  # (m, n)
        past, later = self.windows[: self.count].T.split([count, self.frames_out])  # (T_in, N)、(T_out, N)
        kernel = scaled[places[:, :count, None], past].sum(1)  # (B, N)
        targets = plain[rows[:, count:, None], later].sum(1)
        kernel, targets = kernel - self.kernel_mean[: self.count], targets - self.target_mean
        return _centred(kernel) @ self.vectors, _centred(targets) @ self.vectors

    def finish(self, inverse: Tensor) -> None:
        """inverse: 1/(λ + α)。"""
        whole = (self.vectors * inverse) @ self.vectors.T  # (N, N)
        self.inverse[: self.count, : self.count] = _centred(whole)
        self.share[: self.count] = 1 / self.count
        del self.vectors, self.target_mean

    def forward(self, history: Tensor) -> Tensor:
        """(B, T_in, E) → (B, T_out, F)。"""
        frames, size = self.frames.double(), len(history)
        past, future = self.windows.T.split([self.frames_in, self.frames_out])  # (T_in, n)、(T_out, n)
        known = frames if self.seen is None else self.seen.double()
        products = (history.double() * self.precision) @ known.T  # (B, T_in, n)
        kernel = products.gather(2, past.expand(size, -1, -1)).sum(1)  # (B, n)
        weights = self.share + (kernel - self.kernel_mean) @ self.inverse  # (B, n)，各窗口的权重
        spread = products.new_zeros(size, self.frames_out, len(frames))  # (B, T_out, n)，各帧的权重
        spread = spread.scatter_add(2, future.expand_as(spread), weights[:, None].expand_as(spread))
        return (spread @ frames).to(history.dtype)


class Model(nn.Module):
    """OnePass、Tuned；有无效目标的窗口整个不用：各输出共用一个 Gram 矩阵，不能只去掉一部分。"""

    probabilistic = False
    can_forecast = True
    needs_pass = True
    takes_forcings = True

    def __init__(self, config: Config, spec: DataSpec, first_stage: None = None) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.inputs = Inputs(spec)
        self.tunes = config.alpha == "auto"
        self.left_out = 0
        points, plain = spec.height * spec.width, spec.bare == spec
        size, seen = spec.num_channels * points, self.inputs.channels * points
        lengths, own = (spec.frames_in, spec.frames_out), (None if plain else seen)
        primal = Primal.bytes_needed(*lengths, seen, size)
        dual = Dual.bytes_needed(own, size, config.max_frames)
        if min(primal, dual) > config.memory_gb * 1e9:
            raise ValueError(
                f"model.memory_gb = {config.memory_gb:g}: {lengths[0]} -> {lengths[1]} frames of {seen} numbers "
                f"need {primal / 1e9:.3g} GB as primal, {dual / 1e9:.3g} GB as dual with model.max_frames = "
                f"{config.max_frames}; allow the smaller, choose fewer channels, or shorten the training dates "
                "and lower model.max_frames"
            )
        self.system = Primal(*lengths, seen, size) if primal <= dual else Dual(*lengths, own, size, config.max_frames)

    def accumulate(self, batch: Batch) -> None:
        """收下目标全部有效的窗口。

        Raises:
            ValueError: 对偶时帧数超过 max_frames。
        """
        windows = self._whole(batch)
        self.left_out += len(batch.valid) - len(windows[0])
        self.system.add(*windows)

    def solve(self) -> None:
        """分解；惩罚是给定的，连系数（对偶：各窗口的权重所需的矩阵）也求出来。

        Raises:
            ValueError: 没有一个窗口的目标全部有效；alpha 小到方程组在舍入之内奇异。
        """
        log.info(
            "linear_regression: %s system from %d windows, %d left out for invalid targets",
            type(self.system).__name__.lower(), self.system.count, self.left_out,
        )  # fmt: skip
        if not self.system.count:
            raise ValueError(f"data.splits.train: none of its {self.left_out} windows has all targets valid")
        self.path = self.system.factor(self.config.variant == "multi_output")
        if self.config.alpha != "auto":
            self._finish(self.config.alpha)

    def judge(self, batch: Batch) -> None:
        """收下一批验证的窗口。"""
        seen, fields = (part.to(next(self.system.buffers()).device) for part in self._whole(batch))
        if len(fields):
            self.path.add(*self.system.project(seen, fields))

    def choose(self) -> None:
        """取验证误差最小的惩罚，求出系数。

        Raises:
            ValueError: 验证段没有一个窗口的目标全部有效。
        """
        if not self.path.count:
            raise ValueError("data.splits.val: none of its windows has all targets valid; give model.alpha a number")
        alpha = self.path.best()
        log.info("linear_regression: alpha %.3g has the lowest error of %d validation windows", alpha, self.path.count)
        self._finish(alpha)

    def _whole(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """目标全部有效的窗口的各帧：看的 (B', t, E)、场 (B', t, F)。"""
        whole = batch.valid[:, self.spec.frames_in :].all(2).all(1)  # (B,)
        device = next(self.inputs.buffers(), batch.history).device  # 没有外强迫就不搬
        window = torch.cat([batch.history, batch.future], 1)
        fields, time = window[whole].to(device), batch.time[whole].to(device)
        return self.inputs(fields, time).flatten(2), fields.flatten(2)

    def _finish(self, alpha: float) -> None:
        self.system.finish(self.path.inverse(alpha))
        del self.path

    def forward(self, history: Tensor, time: Tensor | None = None) -> Tensor:
        """(B, T_in, C, H, W)、时刻 → (B, T_out, C, H, W)。"""
        return self.system(self.inputs(history, time).flatten(2)).unflatten(2, history.shape[2:])

    def forecast(
        self, history: Tensor, time: Tensor | None, num_members: int = 1, generator: Generators | None = None
    ) -> Tensor:
        """(B, T_in, C, H, W) → (B, 1, T_out, C, H, W)；num_members > 1 是 ValueError。"""
        refuse_members("linear_regression", num_members)
        return self(history, time)[:, None]


def _or_one(variance: Tensor) -> Tensor:
    return torch.where(variance > CONSTANT, variance, 1.0)


def _summed(products: Tensor, rows: Tensor) -> Tensor:
    """帧间的内积 (n, n)、各窗口的帧 (T, N) → 窗口间的内积 (N, N)。"""
    result = products.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        result += products[row[:, None], row]
    return result


def _digest(frame: Tensor) -> bytes:
    return blake2b(frame.numpy().tobytes()).digest()


def _distinct(windows: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, F) → 不同的帧 (m, F)，各窗口由哪几帧组成 (B, T)。"""
    frames, places = windows.flatten(0, 1), dict[bytes, int]()
    rows = [places.setdefault(_digest(frame), len(places)) for frame in frames.cpu()]
    first = [rows.index(row) for row in range(len(places))]
    return frames[first], torch.tensor(rows, device=windows.device).view(windows.shape[:2])


def _centred(matrix: Tensor) -> Tensor:
    """每一行去掉平均。"""
    return matrix - matrix.mean(-1, keepdim=True)
