"""搭建环境的几个文件：版本写死、不点名任何主机、quickstart 的预报时刻确在测试段内。"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.audit import SEPARATE, changed_files, differences, lock_file, read_lock
from util.config import load_config

ROOT = Path(__file__).resolve().parent.parent


def test_setup_names_no_host():
    """包索引由使用者的 pip 与 conda 的设置决定。"""
    for name in (
        "Makefile",
        ".ci/run",
        ".ci/environment",
        ".ci/lock",
        "requirements-lock-3.10.txt",
        "requirements-lock-3.11.txt",
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


@pytest.mark.parametrize("version", ["3.10", "3.11"])
def test_the_lock_has_every_pin_with_hashes(version: str):
    locked = read_lock(lock_file(version).read_text(encoding="utf-8"))
    assert len(locked) > 100
    assert all(
        hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes) for _, hashes in locked.values()
    )
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
        for wanted in (Requirement(line) for line in lines if line):
            active = wanted.marker is None or wanted.marker.evaluate({"python_version": version})
            if active and wanted.name not in SEPARATE:
                assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)][0]), f"{wanted}: make lock"
    assert not [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))]


def test_the_audit_sees_what_differs(tmp_path: Path):
    locked = read_lock("# x\na==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nb-c[d]==2 --hash=sha256:cc\n")
    assert locked == {"a": ("1.0", ["sha256:aa", "sha256:bb"]), "b-c": ("2", ["sha256:cc"])}
    found = list(differences({"a": "1.0", "b-c": "3", "e": "1", "pip": "9", "torch": "2.13.0+cpu"}, locked))
    assert found == ["b-c 3 is installed, the lock has 2", "e 1 is installed, the lock does not have it"]
    info = tmp_path / "x-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: x\nVersion: 1\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"good").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"x.py,sha256={digest},4\ny.py,sha256={digest},4\nx-1.dist-info/RECORD,,\n")
    (tmp_path / "x.py").write_text("good")
    assert changed_files(PathDistribution(info)) == ["y.py"]
    (tmp_path / "y.py").write_text("bad")
    assert changed_files(PathDistribution(info)) == ["y.py"]
    (tmp_path / "y.py").write_text("good")
    assert changed_files(PathDistribution(info)) == []


def test_quickstart_forecast_lies_in_the_test_split():
    times = re.findall(r"^QUICKSTART_TIME := (\d{4}-\d\d-\d\d)T\d\d$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(times) == 1
    first, last = load_config(ROOT / "config" / "quickstart.yaml").data.splits.test
    # 日期可以只写年份；补成整日再按文本比较
    assert (first if len(first) > 4 else f"{first}-01-01") < times[0] <= (last if len(last) > 4 else f"{last}-12-31")
