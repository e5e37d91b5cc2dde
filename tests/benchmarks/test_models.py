"""benchmarks.models：一行一个模型，训练的一步也量到；量不了的说明原因，别的照量。"""

from __future__ import annotations

import runpy

import pytest

from engine.imagined import imagined_spec
from models import build_model
from util.config import load_config

TINY = ["data.variables={t2m: single}", "data.latitude.count=8", "data.longitude.count=16", "train.batch_size=2"]


def test_sizes_and_steps(monkeypatch, capsys) -> None:
    paths = ["config/quickstart.yaml", "config/cnn.yaml", "config/latent_unet.yaml", "config/persistence.yaml"]
    monkeypatch.setattr("sys.argv", ["models", "--steps", "1", *paths, *TINY])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks.models", run_name="__main__")
    out, err = capsys.readouterr()
    head, _, *rows = out.splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| `quickstart`", "| `cnn`"]  # 有自己目标的，目标在引擎的
    found = dict(zip(head.split(" | "), rows[0].split(" | "), strict=True))
    config = load_config(paths[0], TINY)
    model = build_model(config.model, imagined_spec(config.data))
    expected = sum(weight.numel() for weight in model.parameters())
    assert (found["| YAML"], found["grid"], found["batch"]) == ("| `quickstart`", "8 × 16", "2")
    assert int(found["parameters"].replace(",", "")) == expected
    assert float(found["windows/s"]) > 0
    assert 0 < float(found["utilisation"]) < 2
    assert "config/persistence.yaml left out: persistence takes no gradient steps" in err
    assert "config/latent_unet.yaml left out: model.first_stage" in err
