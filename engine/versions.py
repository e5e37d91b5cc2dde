"""复现要用的版本。不在 loading 里：预报用不到 Fabric，不必等它引入。"""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from lightning_fabric.__version__ import version as fabric_version

from util import VERSION


def versions() -> dict[str, str]:
    """自己与各库 → 版本；Fabric 的由它自己说：装的是 lightning-fabric 还是整个 lightning 都一样。"""
    named = {name: version(name) for name in ("torch", "numpy", "xarray", "pydantic", "einops")}
    with suppress(PackageNotFoundError):  # 没有它，只是不记到 W&B
        named["wandb"] = version("wandb")
    return {"ar_pred": VERSION, "python": platform.python_version(), "lightning_fabric": fabric_version, **named}
