"""没有数据也能量：一棵临时的小树，通道、网格、间隔照配置，数是随机的。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from benchmarks.random_tree import write_tree
from engine.imagined import imagined_spec
from util.calendar import parse_time, time_text
from util.config import DataConfig, Splits
from util.data.index import SPLITS, sampled_hours

FIRST_DAY = "2000-01-01"
WINDOWS = 3  # 每个划分有几个窗口那么长；同样的几个时刻反复用


@contextmanager
def imagined_data(config: DataConfig) -> Iterator[DataConfig]:
    """data 段，指着那棵树；留在设备上，所以没有数据可等。"""
    spec = imagined_spec(config)
    days = -(-spec.window * WINDOWS * spec.interval_hours // 24)
    first = parse_time(FIRST_DAY)
    spans = {name: range(first + 24 * days * i, first + 24 * days * (i + 1)) for i, name in enumerate(SPLITS)}
    splits = Splits(**{name: [time_text(hour)[:10] for hour in (span[0], span[-1])] for name, span in spans.items()})
    whole = range(first, first + 24 * days * len(SPLITS))
    with TemporaryDirectory() as folder:
        hours = sampled_hours(whole, *config.sampling)
        write_tree(folder, spec.channels, (spec.height, spec.width), hours.tolist())
        place = {"root": folder, "source": "tree", "parts": {}, "statistics": None, "cache_dir": folder}
        yield config.model_copy(update={**place, "splits": splits, "standardize": "yes", "residency": "device"})
