"""benchmarks.scaling：一步的秒数与手算的相同；一个窗口的字节与参数的个数是真的。"""

from __future__ import annotations

from benchmarks.scaling import Rates, Work, reduced_bytes, step_seconds, work_of
from engine.imagined import imagined_spec
from tests.engine.runs import SMALL_MODEL
from tests.models.small import make_model
from util.config import load_config


def test_a_step_is_the_sum_of_its_parts() -> None:
    work, rates = Work(bytes=100, flops=1000, parameters=10), Rates(read=50, compute=500, reduce=8, update=5)
    assert reduced_bytes(10, 2) == 40 and reduced_bytes(10, 4, sharded=True) == 90
    assert step_seconds(work, 4, 1, rates) == 8 + 8 + 2
    assert step_seconds(work, 4, 2, rates) == 4 + 4 + 5 + 2
    assert step_seconds(work, 4, 2, rates, sharded=True) == 4 + 4 + 7.5 + 1
    hidden = rates._replace(ahead=True, overlap=0.5)
    assert step_seconds(work, 4, 2, hidden) == max(4, 4 + (5 - 2) + 2)
    assert step_seconds(work, 4, 1, hidden._replace(read=10)) == 40


def test_a_window_is_counted_from_its_shape() -> None:
    small = ["data.variables={t2m: single, u10: single}", "data.latitude.count=8", "data.longitude.count=16"]
    config = load_config("config/quickstart.yaml", [*small, f"model={SMALL_MODEL}"])
    spec = imagined_spec(config.data)
    work = work_of(config, spec)
    assert work.bytes == spec.window * 2 * 8 * 16 * 4
    assert work.parameters == sum(p.numel() for p in make_model(SMALL_MODEL, spec).parameters()) and work.flops > 0
