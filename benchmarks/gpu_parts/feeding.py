"""数据到设备：各种 residency 等数据的份额；异步搬运有几成藏在计算后面。"""

from __future__ import annotations

import shutil
import statistics

import torch

from benchmarks.gpu_parts.scene import Found, Scene
from benchmarks.step.imagined import imagined_data
from benchmarks.step.reference import AR_PRED
from benchmarks.step.sources import compare_steps
from util.batch import DataSpec, Wire
from util.data.batches import all_starts, split_batches
from util.data.dataset import open_data
from util.data.feed import SHARED, feed, send_ahead
from util.packing.pack import pack

BATCHES = 8
WORKERS = 4
ROOM = 4e9  # 字节；共享内存不够时由主进程读，表里写着


def residencies(scene: Scene) -> Found:
    """步/秒与留在设备上反复用的同一批之比，等数据的份额；树与存档都在页缓存里。"""
    workers = WORKERS if shutil.disk_usage(SHARED).free > ROOM else 0
    config = scene.config(AR_PRED, "train.precision=bf16-mixed", "train.batch_size=16", f"data.workers={workers}")
    steps, rounds = (1, 1) if scene.small else (10, 3)
    with imagined_data(config.data) as tree:
        store = scene.folder / "store"
        pack(tree, store, "float32", 1, "python -m benchmarks.gpu")
        here = tree.model_copy(update={"store": str(store)})
        found = compare_steps(config.model_copy(update={"data": here}), steps, rounds)
    values: Found = {"reading processes": config.data.workers}
    for name, several in found.items():
        pairs = zip(found["synthetic"], several, strict=True)
        values[f"{name}: steps/s against synthetic"] = statistics.median(a.seconds / b.seconds for a, b in pairs)
        values[f"{name}: waiting share"] = statistics.median(r.waited / r.seconds for r in several)
    return values


def transfer(scene: Scene) -> Found:
    """送到的与 WindowDataset 的逐位相同；显卡上再量搬运有几成与计算同时进行。

    Raises:
        ValueError: 送到的不同。
    """
    config = scene.config(AR_PRED)
    with imagined_data(config.data) as tree:
        data = open_data(tree.model_copy(update={"residency": "disk"}))
        starts = all_starts(data.segments["train"], data.spec.window)
        batches = split_batches(starts, scene.batch_size(8))[:BATCHES]
        for batch, mine in zip(feed(data, batches, scene.device), batches, strict=True):
            for one, other in zip(batch.tensors, data.windows.__getitems__(mine).tensors, strict=True):
                if not torch.equal(one.cpu(), other):
                    raise ValueError("a batch changed on its way to the device")
        found: Found = {"batches equal bit by bit": len(batches)}
        if scene.device.type == "cuda":
            wires = [Wire(*(part.pin_memory() for part in data.windows.wire(mine))) for mine in batches]
            found |= overlap(scene, wires * BATCHES, data.spec, data.windows.reader.wire().raw)
    return found


def overlap(scene: Scene, wires: list[Wire], spec: DataSpec, raw: bool) -> Found:
    """只搬、只算（矩阵乘，与搬运差不多久）、边搬边算，各几秒；藏起来的是两者较短的那个的几成。"""
    side = torch.randn(4096, 4096, device=scene.device)
    out = torch.empty_like(side)

    def walk(moves: bool, works: int) -> None:
        for _ in send_ahead(iter(wires), spec, raw, scene.device) if moves else wires:
            for _ in range(works):
                torch.mm(side, side, out=out)

    moving, one = scene.seconds(lambda: walk(True, 0)), scene.seconds(lambda: walk(False, 1))
    works = max(1, round(moving / one))
    working, both = scene.seconds(lambda: walk(False, works)), scene.seconds(lambda: walk(True, works))
    size = sum(part.nbytes for wire in wires for part in wire)
    return {
        "transfer alone, GB/s": size / moving / 1e9,
        "transfer hidden behind the arithmetic": (moving + working - both) / min(moving, working),
    }
