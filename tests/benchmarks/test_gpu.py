"""benchmarks.gpu：没有显卡也走得通，每一部分都有着落；只要少数几个库。"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu import MAIN, Part, run_part

ROOT = Path(__file__).resolve().parents[2]
ABSENT = (
    "aiohttp", "cfgrib", "dask", "diffusers", "distributed", "h5netcdf", "h5py", "huggingface_hub", "matplotlib",
    "netCDF4", "numcodecs", "plotly", "safetensors", "transformers", "wandb", "zarr",
)  # fmt: skip
CODE = f"""
import importlib.metadata, runpy, sys
version, absent = importlib.metadata.version, {ABSENT}
def asked(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
sys.modules.update(dict.fromkeys(absent))
importlib.metadata.version = asked
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""
ZOO = ["step of var", "step of sd_vae_small"]
NEED_DIFFUSERS = {"diffusion sampling", "step of sd_vae_small"}


def test_every_part_reports_with_few_libraries(tmp_path: Path) -> None:
    names = list({part.where: part.name for part in MAIN}.values())  # 每个函数走一次；别的只是大小、批、精度不同
    options = ["--small", "--out", str(tmp_path), "--only", *names, *ZOO]
    done = subprocess.run([sys.executable, "-c", CODE, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    status = {part["name"]: part["status"] for part in report["parts"]}
    assert list(status) == [*names, *ZOO]
    assert {name for name, said in status.items() if said != "done"} == NEED_DIFFUSERS, status
    assert all(status[name].startswith("left out: ") and "diffusers" in status[name] for name in NEED_DIFFUSERS)
    found = {part["name"]: part.get("found", {}) for part in report["parts"]}
    assert found["resuming AR_pred"]["weights equal bit by bit"] == "True"
    assert found["FlexAttention equals SDPA"]["equal within the tolerance"] == "yes"
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in table for name in status) and report["versions"]["torch"] in table
    assert "Traceback" in (tmp_path / "step-of-sd_vae_small.log").read_text()


def test_a_part_that_does_not_fit_is_named_as_skipped(tmp_path: Path) -> None:
    found = run_part(Part("long", "steps.ours", 60), torch.device("cuda"), tmp_path, left=12.4)
    assert found == {"status": "skipped: needs about 60 s, 12 s are left", "seconds": 0.0}
