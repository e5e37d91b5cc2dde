"""一份各段齐全的报告内容：真值是向东移动的平滑随机场，预报是它的模糊与错位，成绩都由这些场算出来。

python -m tests.util.report.report_example [目标文件夹]     写出 evaluation.html、comparison.html、run.html
"""

from __future__ import annotations

import base64
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.evaluation.page_facts import windows_text
from util.plot.coast import coastlines
from util.plot.style import color_limits, plotly_scale
from util.report import write_report
from util.report.bilingual import Bilingual
from util.variables import variable_info

CHANNELS = {"t2m": (284.0, 9.0), "tp": (6e-4, 2e-4), "u10": (0.5, 5.0), "z_level_00": (54300.0, 1900.0)}  # 均值、标准差
FIRST = datetime(1981, 7, 1)
INTERVAL = 6
BASELINES = ("persistence", "climatology")
DRAWN = ("t2m", "tp", "z_level_00")  # 谱、序列、地图只有这些通道
DRAWN_LEADS = 4  # 与至多这么多个时效
POINTS = (("Beijing", 39.9, 116.4), ("Paris", 48.9, 2.4))


class World(NamedTuple):
    """truth (T, C, H, W) 标准化；forecasts[model] (N, L, C, H, W)，起报时刻 n 的第 l 个时效对着 truth[n + l + 1]。"""

    latitudes: np.ndarray
    longitudes: np.ndarray
    truth: np.ndarray
    forecasts: dict[str, np.ndarray]


def smooth(rng: np.random.Generator, shape: tuple[int, ...], size: float) -> np.ndarray:
    """(..., H, W) 的平滑随机场，方差约为 1；size 越大越粗。"""
    rows, columns = (np.fft.fftfreq(n) * n for n in shape[-2:])
    keep = np.exp(-((rows[:, None] ** 2 + columns[None, :] ** 2) ** 0.75) / size)
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape)) * keep).real
    return field / field.std()


def blur(fields: np.ndarray, strength: float) -> np.ndarray:
    """(..., H, W) 去掉高波数：预报越远越平滑。"""
    rows, columns = (np.fft.fftfreq(n) * n for n in fields.shape[-2:])
    keep = np.exp(-strength * (rows[:, None] ** 2 + columns[None, :] ** 2) / 200)
    return np.fft.ifft2(np.fft.fft2(fields) * keep).real


def make_world(shape: tuple[int, int], times: int, leads: int, models: dict[str, float], seed: int) -> World:
    """models: 名字 → 误差的大小。"""
    rng = np.random.default_rng(seed)
    steps, (height, width) = times + leads, shape
    patterns = smooth(rng, (2, len(CHANNELS), height, width), 9.0)  # 一个向东移，一个不动
    noise = smooth(rng, (steps, len(CHANNELS), height, width), 7.0)
    for i in range(1, steps):
        noise[i] = 0.93 * noise[i - 1] + np.sqrt(1 - 0.93**2) * noise[i]
    moving = np.stack([np.roll(patterns[0], i, axis=-1) for i in range(steps)])  # (T, C, H, W)
    truth = 0.7 * moving + 0.5 * patterns[1] + 0.5 * noise
    rain = list(CHANNELS).index("tp")
    truth[:, rain] = np.maximum(truth[:, rain] + 0.2, 0) * 1.6 - 1.0
    ahead = np.stack([truth[i + 1 : i + 1 + times] for i in range(leads)], axis=1)  # (N, L, C, H, W)
    forecasts = {}
    for name, error in models.items():
        wrong = smooth(rng, ahead.shape, 8.0) * error * np.sqrt(np.arange(1, leads + 1))[:, None, None, None]
        softened = np.stack([blur(ahead[:, i], 1.5 * (i + 1)) for i in range(leads)], axis=1)
        forecasts[name] = softened + wrong
    forecasts["persistence"] = np.repeat(truth[:times, None], leads, axis=1)
    forecasts["climatology"] = np.broadcast_to(truth.mean(axis=0), ahead.shape).copy()
    latitudes = 90 - (np.arange(height) + 0.5) * 180 / height
    return World(latitudes, np.arange(width) * 360 / width, truth, forecasts)


def content_of(world: World, members: int = 10, kind: str = "evaluation") -> dict[str, Any]:
    """由各场算出报告的一切段落。"""
    times, leads = next(iter(world.forecasts.values())).shape[:2]
    hours = [INTERVAL * (i + 1) for i in range(leads)]
    drawn = np.linspace(0, leads - 1, min(leads, DRAWN_LEADS)).round().astype(int).tolist()
    initial = [(FIRST + timedelta(hours=INTERVAL * n)).isoformat() for n in range(times)]
    ahead = np.stack([world.truth[i + 1 : i + 1 + times] for i in range(leads)], axis=1)  # (N, L, C, H, W)
    weights = np.cos(np.radians(world.latitudes))
    weights = (weights / weights.mean())[:, None]
    squares = {m: ((f - ahead) ** 2 * weights).mean((-2, -1)) for m, f in world.forecasts.items()}  # (N, L, C)
    own = [m for m in world.forecasts if m not in BASELINES]
    size = "×".join(map(str, ahead.shape[-2:]))
    content = {
        "kind": kind,
        "title": Bilingual("AR_pred: test 1981", "AR_pred：1981 年的测试"),
        "subtitle": "ar_pred_video_vanilla",
        "facts": [
            ["split", "test"],
            ["windows", windows_text(times, initial[0], initial[-1])],
            ["fields scored", times * leads * len(CHANNELS)],
            ["members", Bilingual(f"{members}, initial noise 0.05 std", f"{members} 个，初值噪声为 0.05 倍标准差")],
            ["grid", size],
            ["checkpoint", "checkpoints/quickstart/best.ckpt"],
        ],
        "models": [{"name": m, "role": "baseline" if m in BASELINES else "model"} for m in world.forecasts],
        "channels": [
            {
                "name": c,
                "long_name": variable_info(c).long_name,
                "unit": variable_info(c).units,
                "kind": variable_info(c).kind,
            }
            for c in CHANNELS
        ],
        "lead_hours": hours,
        "scores": scores_of(world, ahead, weights),
        "skill": {
            m: {
                b: {c: {"rmse": skill_of(squares[m][..., i], squares[b][..., i])} for i, c in enumerate(CHANNELS)}
                for b in BASELINES
            }
            for m in own
        },
        "fields": {c: {"scored": [times - i] * leads, "left_out": [i] * leads} for i, c in enumerate(CHANNELS)},
        "spectra": spectra_of(world, ahead, drawn),
        "series": series_of(world, ahead, initial, drawn, weights),
        "costs": [cost_of(m, i) for i, m in enumerate(own)],
    }
    if kind == "comparison":
        note = Bilingual("log/A has every start, log/B every second one.", "log/A 有全部起点，log/B 隔一个有一个。")
        content["comparison"] = {
            "pairs": times * leads,
            "notes": [note],
        }
        content["links"] = [[m, f"../{m}/report.html"] for m in own]
        return content
    content["ranks"] = ranks_of(world, leads, members)
    content["curves"] = curves(np.random.default_rng(1))
    content["maps"] = maps_of(world, own[0], ahead, initial, drawn, weights)
    content["coast"] = [np.round(line, 2) for line in coastlines(-2.0, 358.0, -90, 90)]
    content |= about_run()
    return content


def cost_of(name: str, place: int) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": 1_080_000 * (place + 1),
        "flops_per_sample": 3.21e9 * (place + 1),
        "training_seconds": 340.0 * (place + 1) if place < 2 else None,
        "training_samples_per_second": 31.4 / (place + 1) if place < 2 else None,
        "inference_samples_per_second": 118.0 / (place + 1),
        "inference_peak_memory_bytes": 1.3e9 * (place + 1),
        "device": "CPU, 2 threads",
    }


def scores_of(world: World, ahead: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """模型 → 通道 → 评分 → 每个时效一个数。"""
    normal = world.truth.mean(axis=0)  # (C, H, W)
    scores = {
        m: {
            c: metrics_of(forecast[:, :, i], ahead[:, :, i], normal[i], weights, std)
            for i, (c, (_, std)) in enumerate(CHANNELS.items())
        }
        for m, forecast in world.forecasts.items()
    }
    for m in scores:  # 只有一个通道有阈值
        scores[m]["t2m"]["brier>290"] = 0.01 * scores[m]["t2m"]["rmse"]
    return scores


def metrics_of(
    forecast: np.ndarray, truth: np.ndarray, normal: np.ndarray, weights: np.ndarray, std: float
) -> dict[str, np.ndarray]:
    """forecast、truth (N, L, H, W)，normal (H, W) → 各评分 (L,)。"""
    error = forecast - truth
    a, b = forecast - normal, truth - normal

    def total(values: np.ndarray) -> np.ndarray:
        return (values * weights).mean((0, 2, 3))

    rmse = std * np.sqrt(total(error**2))
    strength = total(a**2) * total(b**2)  # 气候态没有距平，相关系数没有意义
    return {
        "rmse": rmse,
        "mae": std * total(np.abs(error)),
        "bias": std * total(error),
        "acc": np.where(strength > 1e-9, total(a * b), np.nan) / np.sqrt(np.maximum(strength, 1e-9)),
        "crps": 0.7 * rmse,
        "spread": 0.8 * rmse,
        "spread_skill": np.full(len(rmse), 0.8) + 0.03 * np.arange(len(rmse)),
        "activity_ratio": np.sqrt(total(a**2) / total(b**2)),
    }


def skill_of(own: np.ndarray, other: np.ndarray, draws: int = 60) -> dict[str, np.ndarray]:
    """(N, L) 的误差平方 → 技巧评分与自助法区间。"""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(own), (draws, len(own)))
    skill = 1 - np.sqrt(own[picks].mean(1) / other[picks].mean(1))  # (draws, L)
    low, high = np.percentile(skill, [2.5, 97.5], axis=0)
    return {"value": 1 - np.sqrt(own.mean(0) / other.mean(0)), "low": low, "high": high}


def hours_of(leads: list[int]) -> list[int]:
    return [INTERVAL * (i + 1) for i in leads]


def spectra_of(world: World, ahead: np.ndarray, leads: list[int]) -> dict[str, Any]:
    def power(fields: np.ndarray) -> dict[str, np.ndarray]:  # (N, L, C, H, W) → {channel: (L, K)}
        spectrum = (np.abs(np.fft.rfft(fields) / fields.shape[-1]) ** 2 * 2).mean((0, 3))[..., 1:]  # (L, C, K)
        return {c: spectrum[leads, i] * std**2 for i, (c, (_, std)) in enumerate(CHANNELS.items()) if c in DRAWN}

    return {
        "label": "zonal wavenumber",
        "lead_hours": hours_of(leads),
        "wavenumber": list(range(1, ahead.shape[-1] // 2 + 1)),
        "truth": power(ahead),
        "models": {m: power(f) for m, f in world.forecasts.items()},
    }


def series_of(
    world: World, ahead: np.ndarray, initial: list[str], leads: list[int], weights: np.ndarray
) -> dict[str, Any]:
    places = [(np.abs(world.latitudes - y).argmin(), np.abs(world.longitudes - x).argmin()) for _, y, x in POINTS]

    def at_points(fields: np.ndarray) -> dict[str, Any]:  # (N, L, C, H, W) → {channel: (L, P, N)}
        values = [(fields * weights).mean((-2, -1)), *(fields[..., i, j] for i, j in places)]  # P × (N, L, C)
        stacked = np.stack(values).transpose(3, 2, 0, 1)  # (C, L, P, N)
        return {c: stacked[i][leads] * std + mean for i, (c, (mean, std)) in enumerate(CHANNELS.items()) if c in DRAWN}

    hours = hours_of(leads)
    valid = [[(datetime.fromisoformat(time) + timedelta(hours=hour)).isoformat() for time in initial] for hour in hours]
    points = [{"name": "area mean", "latitude": None, "longitude": None}]
    points += [{"name": name, "latitude": lat, "longitude": lon} for name, lat, lon in POINTS]
    models = {m: at_points(f) for m, f in world.forecasts.items()}
    return {"points": points, "lead_hours": hours, "valid_times": valid, "truth": at_points(ahead), "models": models}


def ranks_of(world: World, leads: int, members: int) -> dict[str, Any]:
    shape = np.abs(np.linspace(-1, 1, members + 1)) ** 3  # 略呈 U 形
    share = [(1 + (0.5 + 0.1 * i) * shape) / (1 + (0.5 + 0.1 * i) * shape).sum() for i in range(leads)]
    return dict.fromkeys(CHANNELS, share)


def encode_field(field: np.ndarray) -> dict[str, Any]:
    """(H, W) 的一张图压成每格一个字节。"""
    low, high = float(field.min()), float(field.max())
    data = np.rint((field - low) / ((high - low) or 1.0) * 255).astype(np.uint8).tobytes()
    return {"data": base64.b64encode(data).decode(), "low": low, "high": high}


def maps_of(
    world: World, model: str, ahead: np.ndarray, initial: list[str], leads: list[int], weights: np.ndarray
) -> dict[str, Any]:
    """weights (H, 1)：平均为 1 的纬度权重。"""
    fields, colors, scores = {}, {}, {}
    for c, (mean, std) in ((c, CHANNELS[c]) for c in DRAWN):
        i = list(CHANNELS).index(c)
        truth, forecast = mean + std * ahead[:, :, i], mean + std * world.forecasts[model][:, :, i]  # (N, L, H, W)
        fields[c] = [[{"truth": encode_field(truth[n, k]), "forecast": encode_field(forecast[n, k]),
                       "error": encode_field(forecast[n, k] - truth[n, k])} for n in range(len(initial))]
                     for k in leads]  # fmt: skip
        error = forecast - truth
        rmse, bias = np.sqrt((error**2 * weights).mean((-2, -1))), (error * weights).mean((-2, -1))  # (N, L)
        scores[c] = [[{"rmse": rmse[n, k], "bias": bias[n, k]} for n in range(len(initial))] for k in leads]
        kinds = {
            "field": (variable_info(c).kind, np.stack([truth, forecast])),
            "error": ("difference", forecast - truth),
        }
        limits = {name: color_limits(values, kind) for name, (kind, values) in kinds.items()}
        colors[c] = {name: {"scale": plotly_scale(kind), "low": limits[name][0], "high": limits[name][1]}
                     for name, (kind, _) in kinds.items()}  # fmt: skip
    notes = [
        Bilingual(f"{shown} of {whole} {english}", f"{whole} 个{chinese}中的 {shown} 个")
        for shown, whole, english, chinese in (
            (len(DRAWN), len(CHANNELS), "channels", "通道"),
            (len(leads), ahead.shape[1], "lead times", "时效"),
        )
    ]
    return {"latitudes": world.latitudes, "longitudes": world.longitudes, "times": initial,
            "lead_hours": hours_of(leads), "channels": list(DRAWN), "note": notes,
            "scores": scores, "fields": fields, "colors": colors}  # fmt: skip


def curves(rng: np.random.Generator) -> dict[str, Any]:
    steps = np.arange(1, 553)
    loss = 0.9 * np.exp(-steps / 90) + 0.06 + 0.02 * rng.standard_normal(len(steps)) * np.exp(-steps / 300)
    val = [[int(s), 0.95 * np.exp(-s / 90) + 0.065 + 2e-7 * max(0, s - 400) ** 2] for s in range(46, 553, 46)]
    return {"train": [[int(s), float(v)] for s, v in zip(steps, loss, strict=True)], "val": val, "climatology": 0.5}


CONFIG = """\
run: {name: quickstart, seed: 42}
data:
  set: config/data/sample.yaml
  frames_in: 3  # t - 1
model:
  name: ar_pred_video_vanilla
  token_size: [8, 8]
  mask_ratio: 0.8
train:
  lr: 1.0e-3
"""
EVALUATE = "--checkpoint checkpoints/quickstart/best.ckpt --split test --steps 4 --out log/quickstart/evaluation"


def about_run() -> dict[str, Any]:
    return {
        "config": CONFIG,
        "data": {
            "facts": [["data set", "config/data/sample.yaml"], ["frames", 5844], ["missing files", 3]],
            "missing": [
                ["t2m", 2, "1981-03-01T06", "1981-03-02T00", "missing"],
                ["tp", 1, "1981-08-09T12", "1981-08-09T12", "unreadable"],
            ],
        },
        "environment": {"python": "3.11.7", "torch": "2.13.0", "numpy": np.__version__, "device": "cpu"},
        "reproduce": ["python train.py --config config/quickstart.yaml run.name=quickstart",
                      f"python evaluate.py {EVALUATE}"],
    }  # fmt: skip


RUN = ("facts", "models", "channels", "lead_hours", "scores", "skill", "curves", "maps", "coast", "config")


def example(kind: str, shape: tuple[int, int], times: int = 16, leads: int = 4) -> dict[str, Any]:
    """三种报告之一（evaluation、comparison、run）的内容；每次相同。"""
    if kind == "run":
        one = content_of(make_world(shape, times, 1, {"AR_pred": 0.18}, seed=0), members=1)
        head = {"kind": "run", "title": "quickstart", "subtitle": "ar_pred_video_vanilla"}
        return head | {key: one[key] for key in RUN}
    names = {"AR_pred": 0.18} if kind == "evaluation" else {"AR_pred": 0.18, "SimVP": 0.22, "linear_regression": 0.3}
    return content_of(make_world(shape, times, leads, names, seed=0), kind=kind)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "tmp/report")
    for name in ("evaluation", "comparison", "run"):
        write_report(folder / f"{name}.html", example(name, shape=(45, 90)))
        print(folder / f"{name}.html")
