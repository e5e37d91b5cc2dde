"""成绩：由 statistics.nc 合成的每个数与写开的循环相比；共同的场、技巧的区间、长表。"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.small import small_spec
from util.batch import DataSpec
from util.files.records import as_json
from util.scores.bootstrap import BLOCK_HOURS, RESAMPLES, block_sums
from util.scores.common import Contender, common_pairs
from util.scores.final import METRICS, Metric
from util.scores.statistics_file import Statistics, StatisticsFile
from util.scores.tabulate import tabulate, write_csv

START = 300_000 - 300_000 % 24
NAMES = (
    *("square", "absolute", "error", "plain_square", "plain_absolute", "ssim", "crps"),
    *("forecast_anomaly", "truth_anomaly", "anomaly_product", "forecast_activity", "truth_activity"),
)


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """几周的数据就给区间，测试才小。"""
    monkeypatch.setattr("util.scores.bootstrap.FEWEST_BLOCKS", 4)


def spec_with(std: tuple[float, ...]) -> DataSpec:
    from dataclasses import replace

    return replace(small_spec(channels=len(std), grid=(4, 8)), std=std, units=("K", "m s-1", "%")[: len(std)])


def write(
    path: Path,
    spec: DataSpec,
    hours: np.ndarray,
    leads: list[int],
    models: tuple[str, ...] = ("model", "persistence", "climatology"),
    members: int = 1,
    seed: int = 0,
    holes: float = 0.2,
) -> dict[str, Any]:
    """随机的统计量；各模型无效的场相同。返回 模型 → 统计量 → (T, L, C)。"""
    rng = np.random.default_rng(seed)
    shape = (len(hours), len(leads), spec.num_channels)
    gone = rng.random(shape) < holes
    thresholds = np.array([[1.5, 2.5], [7.0, np.nan], [np.nan, np.nan]])[: spec.num_channels]
    values: dict[str, Any] = {}
    with StatisticsFile(path, spec, models, hours, leads, thresholds, {"model": models[0], "members": members}) as file:
        for model in models:
            names = [*NAMES, "brier_0", "brier_1"] + (["variance"] if members > 1 and model == models[0] else [])
            made = {n: (rng.random(shape) + 0.1).astype(np.float32) for n in names}
            made["error"] -= 0.6
            for n in made:
                made[n][gone] = np.nan
            made["brier_1"][:, :, 1:] = np.nan
            values[model] = made
        for row in range(0, len(hours), 7):  # 一批批写
            part = {m: {n: a[row : row + 7] for n, a in made.items()} for m, made in values.items()}
            file.write(row, part)
    return values


def mean(values: np.ndarray, lead: int, channel: int) -> float:
    """写开的平均，跳过 NaN。"""
    kept = [float(v) for v in values[:, lead, channel] if not math.isnan(v)]
    return sum(kept) / len(kept)


def test_scores_equal_a_written_out_loop(tmp_path: Path) -> None:
    spec, hours = spec_with((2.0, 0.5, 10.0)), START + np.arange(0, 40) * 6
    values = write(tmp_path / "s.nc", spec, hours, [6, 12], members=5)
    with Statistics(tmp_path / "s.nc") as file:
        table = tabulate([Contender(m, file, m) for m in file.models], ["persistence", "climatology"])
    json.dumps(as_json(table), allow_nan=False)
    assert table.units == {"c0": "K", "c1": "m s-1", "c2": "%"} and table.lead_hours == [6, 12]
    for model, made in values.items():
        for c, channel in enumerate(spec.channels):
            std = spec.std[c]
            for lead in range(2):
                m = {n: mean(made[n], lead, c) for n in NAMES}
                expected = {
                    "rmse": math.sqrt(m["square"]) * std,
                    "mae": m["absolute"] * std,
                    "bias": m["error"] * std,
                    "acc": m["anomaly_product"] / math.sqrt(m["forecast_anomaly"] * m["truth_anomaly"]),
                    "activity_ratio": math.sqrt(m["forecast_activity"] / m["truth_activity"]),
                    "ssim": m["ssim"],
                    "psnr": 10 * math.log10(36 / m["plain_square"]),
                    "mse_unweighted": m["plain_square"] * std**2,
                    "mae_unweighted": m["plain_absolute"] * std,
                    "crps": m["crps"] * std,
                }
                if c < 2:
                    expected["brier>1.5" if c == 0 else "brier>7"] = mean(made["brier_0"], lead, c)
                if c == 0:
                    expected["brier>2.5"] = mean(made["brier_1"], lead, c)
                if model == "model":
                    variance = mean(made["variance"], lead, c)
                    expected["spread"] = math.sqrt(variance) * std
                    expected["spread_skill"] = math.sqrt(6 / 5 * variance / m["square"])
                found = {n: v[lead] for n, v in table.scores[model][channel].items()}
                assert found == pytest.approx(expected, rel=1e-5)
    counted = np.isfinite(values["model"]["square"]).sum(0)
    assert [table.pairs[c] for c in spec.channels] == counted.T.tolist()
    assert [table.left_out[c] for c in spec.channels] == (40 - counted).T.tolist()
    one, two = (as_json(table.scores)[name] for name in ("model", "persistence"))
    ratio = [np.mean([one[c]["rmse"][i] / two[c]["rmse"][i] for c in spec.channels]) for i in range(2)]
    assert table.mean_rmse_ratio["persistence"]["model"] == pytest.approx(ratio)


def test_skill_and_its_block_bootstrap_equal_a_loop(tmp_path: Path) -> None:
    """六周、一周一块：同样的重抽次数表，逐次写开算。"""
    spec, hours = spec_with((3.0,)), START + np.arange(0, 6 * 28) * 6
    values = write(tmp_path / "s.nc", spec, hours, [6])
    with Statistics(tmp_path / "s.nc") as file:
        table = tabulate([Contender(m, file, m) for m in file.models], ["persistence"])
    found = {k: v[0] for k, v in as_json(table.skill["model"]["persistence"]["c0"]["rmse"]).items()}
    week = (hours - hours[0]) // BLOCK_HOURS
    draws = np.random.default_rng(0).multinomial(6, [1 / 6] * 6, RESAMPLES)

    def rmse(model: str, times: np.ndarray) -> float:
        square, count = 0.0, 0
        for block, repeat in enumerate(times):
            chosen = values[model]["square"][week == block, 0, 0]
            chosen = chosen[np.isfinite(chosen)]
            square, count = square + repeat * float(chosen.astype(float).sum()), count + repeat * len(chosen)
        return 3.0 * math.sqrt(square / count)

    pairs = [(rmse("model", d), rmse("persistence", d)) for d in draws]
    one, two = rmse("model", np.ones(6)), rmse("persistence", np.ones(6))
    assert found["value"] == pytest.approx(1 - one / two)
    assert found["difference"] == pytest.approx(one - two)
    for key, samples in (("", [1 - a / b for a, b in pairs]), ("difference_", [a - b for a, b in pairs])):
        assert found[f"{key}low"] == pytest.approx(np.percentile(samples, 2.5))
        assert found[f"{key}high"] == pytest.approx(np.percentile(samples, 97.5))
    assert found["low"] < found["value"] < found["high"]


def test_too_few_blocks_give_no_interval(tmp_path: Path) -> None:
    write(tmp_path / "s.nc", spec_with((1.0,)), START + np.arange(0, 3 * 28) * 6, [6])
    with Statistics(tmp_path / "s.nc") as file:
        table = tabulate([Contender(m, file, m) for m in file.models], ["persistence"])
    assert set(as_json(table.skill["model"]["persistence"]["c0"]["rmse"])) == {"value", "difference"}


def test_runs_are_compared_on_the_pairs_that_all_have(tmp_path: Path) -> None:
    """窗口、时效、通道、无效的场都不同的两个文件：起报时间与通道只剩共同的，时效都在；各按自己的标准差还原。"""
    one_spec, two_spec = spec_with((2.0, 0.5, 10.0)), spec_with((4.0, 0.25))
    one_hours, two_hours = START + np.arange(0, 60) * 6, START + np.arange(20, 100, 2) * 6
    one = write(tmp_path / "a.nc", one_spec, one_hours, [6, 12, 18], seed=1)
    two = write(tmp_path / "b.nc", two_spec, two_hours, [12, 24, 6], seed=2)
    with Statistics(tmp_path / "a.nc") as a, Statistics(tmp_path / "b.nc") as b:
        table = tabulate(
            [Contender("A", a, "model"), Contender("B", b, "model"), Contender("P", a, "persistence")], ["P"]
        )
    assert table.lead_hours == [6, 12, 18, 24] and table.channels == ["c0", "c1"]
    assert table.initial_times == 20
    for c in range(2):
        for lead, (i, j) in enumerate([(0, 2), (1, 0)]):
            square: dict[str, list[float]] = {"A": [], "B": [], "P": []}
            for t, hour in enumerate(one_hours):
                if hour in two_hours:
                    u = two_hours.tolist().index(hour)
                    x, y = one["model"]["square"][t, i, c], two["model"]["square"][u, j, c]
                    if np.isfinite(x) and np.isfinite(y):
                        for name, value in (("A", x), ("B", y), ("P", one["persistence"]["square"][t, i, c])):
                            square[name].append(float(value))
            assert table.pairs[f"c{c}"][lead] == len(square["A"])
            for name, spec in (("A", one_spec), ("B", two_spec), ("P", one_spec)):
                expected = math.sqrt(np.mean(square[name])) * spec.std[c]
                assert table.scores[name][f"c{c}"]["rmse"][lead] == pytest.approx(expected, rel=1e-5)


def test_reading_in_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "s.nc", spec_with((2.0, 0.5, 10.0)), START + np.arange(0, 50) * 6, [6, 12])
    with Statistics(tmp_path / "s.nc") as file:
        source = Contender("model", file, "model")
        whole = block_sums(source, common_pairs([source]))
        monkeypatch.setattr("util.scores.common.READ_BYTES", 8 * 2 * 3 * 4)
        pieces = block_sums(source, common_pairs([source]))
    for name, total in whole.sums.items():
        np.testing.assert_allclose(pieces.sums[name], total)
    np.testing.assert_array_equal(pieces.counts, whole.counts)


def test_nothing_in_common_is_one_line(tmp_path: Path) -> None:
    from dataclasses import replace

    spec, hours = spec_with((1.0,)), START + np.arange(10) * 6
    write(tmp_path / "a.nc", spec, hours, [6])
    write(tmp_path / "b.nc", spec, hours + 600, [6])
    write(tmp_path / "c.nc", spec, hours, [12])
    write(tmp_path / "d.nc", replace(spec, units=("degC",)), hours, [6])
    write(tmp_path / "e.nc", replace(spec, latitudes=(1.0, 2.0, 3.0, 4.0)), hours, [6])
    words = {"b": "no common initial time", "c": "no common lead time", "d": "no common channel", "e": "has latitudes"}
    for name, message in words.items():
        with Statistics(tmp_path / "a.nc") as a, Statistics(tmp_path / f"{name}.nc") as b:
            with pytest.raises(ValueError, match=message) as error:
                common_pairs([Contender("a", a, "model"), Contender("b", b, "model")])
            assert "\n" not in str(error.value)


def test_a_model_can_be_compared_with_another(tmp_path: Path) -> None:
    """两个运行之差；标准差不同的文件各按自己的还原。"""
    one, two = spec_with((2.0,)), spec_with((8.0,))
    hours = START + np.arange(0, 6 * 28) * 6
    first = write(tmp_path / "a.nc", one, hours, [6], seed=1, holes=0.0)
    second = write(tmp_path / "b.nc", two, hours, [6], seed=2, holes=0.0)
    with Statistics(tmp_path / "a.nc") as a, Statistics(tmp_path / "b.nc") as b:
        table = tabulate(
            [Contender("A", a, "model"), Contender("B", b, "model"), Contender("P", a, "persistence")], ["P"], ["A"]
        )
    assert list(table.skill["A"]) == ["P"] and list(table.skill["B"]) == ["P", "A"]
    rmse = [math.sqrt(v["model"]["square"].astype(float).mean()) for v in (first, second)]
    found = as_json(table.skill["B"]["A"]["c0"]["rmse"])
    assert found["difference"][0] == pytest.approx(8 * rmse[1] - 2 * rmse[0], rel=1e-6)
    assert found["value"][0] == pytest.approx(1 - 8 * rmse[1] / (2 * rmse[0]), rel=1e-6)
    assert found["difference_low"][0] < found["difference"][0] < found["difference_high"][0]


def test_no_field_valid_in_all_is_one_line(tmp_path: Path) -> None:
    spec, hours = spec_with((1.0,)), START + np.arange(10) * 6
    write(tmp_path / "a.nc", spec, hours, [6], holes=1.1)
    with Statistics(tmp_path / "a.nc") as a, pytest.raises(ValueError, match=r"no field is valid in all of .*a\.nc"):
        common_pairs([Contender("a", a, "model")])


def test_a_metric_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """METRICS 里多一行，成绩表与 CSV 里就有它，单位也对。"""
    more = Metric("nmse", "NMSE", "归一化均方误差", "", "lower", lambda m: m.of["square"])
    monkeypatch.setattr("util.scores.final.METRICS", (*METRICS, more))
    spec = spec_with((2.0,))
    write(tmp_path / "s.nc", spec, START + np.arange(0, 28) * 6, [6])
    with Statistics(tmp_path / "s.nc") as file:
        table = tabulate([Contender(m, file, m) for m in file.models], ["persistence", "climatology"])
    found = as_json(table.scores)["model"]["c0"]
    assert found["nmse"] == [pytest.approx((found["rmse"][0] / 2) ** 2)]
    write_csv(tmp_path / "m.csv", table)
    assert f"model,c0,6,nmse,{found['nmse'][0]},,,1" in (tmp_path / "m.csv").read_text().splitlines()


def test_csv_is_tidy_and_complete(tmp_path: Path) -> None:
    spec = spec_with((2.0, 0.5, 10.0))
    write(tmp_path / "s.nc", spec, START + np.arange(0, 6 * 28) * 6, [6, 12])
    with Statistics(tmp_path / "s.nc") as file:
        table = tabulate([Contender(m, file, m) for m in file.models], ["persistence", "climatology"])
    write_csv(tmp_path / "m.csv", table)
    with (tmp_path / "m.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == ["model", "channel", "lead_hours", "metric", "value", "low", "high", "unit"]
    found = {(r["model"], r["channel"], int(r["lead_hours"]), r["metric"]): r for r in rows}
    assert len(found) == len(rows)
    assert float(found["model", "c1", 12, "rmse"]["value"]) == table.scores["model"]["c1"]["rmse"][1]
    assert found["model", "c1", 12, "rmse"]["unit"] == "m s-1"
    assert found["model", "c0", 6, "mse_unweighted"]["unit"] == "(K)2"
    skill = found["model", "c2", 6, "rmse_difference_vs_climatology"]
    assert skill["unit"] == "%" and float(skill["low"]) < float(skill["value"]) < float(skill["high"])


def test_statistics_files_are_whole_or_absent(tmp_path: Path) -> None:
    spec, hours = spec_with((1.0,)), START + np.arange(3) * 6

    def write_and_die() -> None:
        with StatisticsFile(tmp_path / "s.nc", spec, ["m"], hours, [6], np.zeros((1, 0)), {}) as file:
            file.write(0, {"m": {"square": np.ones((2, 1, 1))}})
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_and_die()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"no file .*s\.nc"):
        Statistics(tmp_path / "s.nc")
    (tmp_path / "s.nc").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or not a statistics file"):
        Statistics(tmp_path / "s.nc")
