"""搭建环境的几个文件：版本写死、不点名任何主机、quickstart 的预报时刻确在测试段内。"""

from __future__ import annotations

import re
from pathlib import Path

from packaging.requirements import Requirement

from util.config import load_config

ROOT = Path(__file__).resolve().parent.parent


def test_setup_names_no_host():
    """包索引由使用者的 pip 与 conda 的设置决定。"""
    for name in (
        "Makefile",
        ".ci/run",
        ".ci/environment",
        "environment.yml",
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-grib.txt",
        "requirements-onnx.txt",
        "requirements-remote.txt",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text, name
        assert "index-url" not in text, name


def test_every_requirement_is_exact_on_both_pythons():
    extras = [f"requirements-{name}.txt" for name in ("dev", "grib", "onnx", "remote")]
    for name in ("requirements.txt", *extras):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        pinned = [Requirement(line) for line in lines if line]
        for version in ("3.10", "3.11"):
            active = [r for r in pinned if r.marker is None or r.marker.evaluate({"python_version": version})]
            names = [r.name for r in active]
            assert sorted(set(names)) == sorted(names) == sorted({r.name for r in pinned}), f"{name} on {version}"
            assert all([s.operator for s in r.specifier] == ["=="] for r in active), f"{name} on {version}"
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert next(line for line in text.splitlines() if not line.startswith("#")).startswith("torch==")


def test_quickstart_forecast_lies_in_the_test_split():
    times = re.findall(r"^QUICKSTART_TIME := (\d{4}-\d\d-\d\d)T\d\d$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(times) == 1
    first, last = load_config(ROOT / "config" / "quickstart.yaml").data.splits.test
    # 日期可以只写年份；补成整日再按文本比较
    assert (first if len(first) > 4 else f"{first}-01-01") < times[0] <= (last if len(last) > 4 else f"{last}-12-31")
