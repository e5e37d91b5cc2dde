"""训练走久了，主进程的内存不长（slope.py）；两小时的一次要 `make soak ARGS="--minutes 150"`。"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.slope import fit, watch

MOST = 0.1  # MB 每分钟，一天 144 MB


@pytest.mark.soak
@pytest.mark.parametrize("minutes", [25, 120], ids="{}-minutes".format)
def test_memory_does_not_grow(tmp_path: Path, minutes: int) -> None:
    found = watch(tmp_path, minutes)
    assert found.slope - 2 * found.error < MOST, found


def test_the_slope_of_a_line_and_of_noise() -> None:
    minutes = np.linspace(0, 30, 900)
    noise = np.random.default_rng(0).normal(0, 1, 900)
    slope, error = fit(minutes, 500 + 0.25 * minutes + noise)
    assert abs(slope - 0.25) < 3 * error and error < 0.01
    assert abs(fit(minutes, 500 + noise)[0]) < 0.02
