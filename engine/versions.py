"""复现要用的版本：库、这份代码的提交、机器。不在 loading 里：预报用不到 Fabric，不必等它引入。"""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_fabric.__version__ import version as fabric_version

from util import VERSION

ROOT = Path(__file__).resolve().parent.parent


@cache
def versions() -> dict[str, str]:
    """自己、各库、机器、这份代码的提交 → 版本，头一次问时的。

    Fabric 的由它自己说：装的是 lightning-fabric 还是整个 lightning 都一样。
    """
    named = {name: version(name) for name in ("torch", "numpy", "xarray", "pydantic", "einops")}
    with suppress(PackageNotFoundError):  # 没有它，只是不记到 W&B
        named["wandb"] = version("wandb")
    libraries = {"ar_pred": VERSION, "python": platform.python_version(), "lightning_fabric": fabric_version, **named}
    return {**libraries, "platform": platform.platform(), **commit_of(ROOT)}


def commit_of(folder: Path) -> dict[str, str]:
    """folder 的提交；dirty: 代码与配置有没有提交之后的改动，新的文件也算。不是 git 的仓库、没有 git 时是空的。"""
    command = ["git", "-C", str(folder), "status", "--porcelain=v2", "--branch", "--", "*.py", "*.yaml"]
    if not (folder / ".git").exists():
        return {}
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid "))
    return {"commit": commit, "dirty": "yes" if any(not line.startswith("#") for line in lines) else "no"}
