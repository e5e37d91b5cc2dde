"""经 HDF5 写的文件写不下：一行，说出文件、要多少、有多少；不留下临时文件，进程不会死于 HDF5 的收尾。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.full_disk import largest_file, needs_a_small_disk, run_on_a_small_disk
from tests.models.small import small_spec
from util.files.netcdf import ForecastFile
from util.scores.statistics_file import StatisticsFile

SPEC = small_spec(3, (32, 64))


def write_statistics(folder: Path) -> None:
    rows = np.arange(50_000)
    with StatisticsFile(folder / "statistics.nc", SPEC, ["a"], rows, [6, 12], np.full((3, 1), np.nan), {}) as file:
        for row in range(0, rows.size, 1000):
            file.write(row, {"a": {name: np.ones((1000, 2, 3), "f4") for name in ("square", "abs", "bias")}})


def write_forecasts(folder: Path) -> None:
    rows = np.arange(100)
    with ForecastFile(folder / "forecast.nc", SPEC, rows, [6], 1, {}) as file:
        for row in rows.tolist():
            file.write(row, np.ones((1, 1, 1, 3, 32, 64), "f4"))


@pytest.mark.parametrize("write", [write_statistics, write_forecasts])
@pytest.mark.parametrize("size", [3_000, 1_000_000])
def test_a_full_disk_is_one_line(tmp_path: Path, write: Callable[[Path], None], size: int) -> None:
    """头一块（目录）写不下，以后的写不下。"""
    with (
        largest_file(size),
        pytest.raises(OSError, match=r"File too large, more than \S+ MB needed, \S+ MB free: '\S+.nc'"),
    ):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)


@needs_a_small_disk
def test_a_process_on_a_full_disk_ends_by_itself(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.util.files.test_hdf5 import write_forecasts
from util.cli import run_command
run_command(lambda: write_forecasts(Path({str(tmp_path)!r})))
"""
    status, said, left = run_on_a_small_disk(tmp_path, 1, code)
    assert (status, len(said), left) == (1, 1, []), said
    assert "No space left on device, more than 1.0 MB needed, 1.0 MB free" in said[0]
