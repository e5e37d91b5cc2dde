"""放得下的最大的批：内存随批是一段段的直线，沿着它们猜，几次就到。"""

from __future__ import annotations

from engine.memory.estimate import MARGIN, Machine, changed, estimate
from util.config import RunConfig, least_batch
from util.data.batches import epoch_starts
from util.data.index import make_segments, sampled_hours, split_hours


def largest_batch(config: RunConfig, machine: Machine, below: int | None = None) -> int:
    """放得下的最大的 train.batch_size；一个窗口也放不下时是 0。

    Args:
        below: 只在比它小的里面找（它已经试过了，放不下）；没有给时至多一轮的窗口数。

    Raises:
        ValueError: 见 estimate。
    """
    least, room = least_batch(config), MARGIN * machine.size
    most = (epoch_windows(config) if below is None else below - 1) // least
    fits, fails, n = 0, most + 1, 1
    tried: list[tuple[int, int]] = []
    while fails - fits > 1:
        total = estimate(changed(config, batch_size=n * least), machine).total
        fits, fails = (n, fails) if total <= room else (fits, n)
        tried.append((n, total))
        (a, less), (b, more) = tried[-2:] if len(tried) > 1 else ((0, 0), tried[0])
        step = max(1, (more - less) // (b - a))  # 每多一个窗口
        n = min(max(b + int(room - more) // step, fits + 1), fails - 1)
    return fits * least


def epoch_windows(config: RunConfig) -> int:
    """一轮至多几个窗口：照划分的日期，没有空缺时。"""
    data = config.data
    segments = make_segments(sampled_hours(split_hours(data)["train"], *data.sampling), data)
    return epoch_starts(segments, data.frames_in + data.frames_out, data.windows, config.run.seed, epoch=0).size
