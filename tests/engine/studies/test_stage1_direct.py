"""engine.studies.stage1_direct：成绩与 evaluate.py 的相同，图与半精度的权重在；主干从本地文件夹读来。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine.studies.stage1_direct import main, write_half
from tests.engine.runs import train_here, write_run
from tests.models.small import make_model, small_spec
from util.checkpoint import load_checkpoint, save_checkpoint

BACKBONE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_the_command_on_a_checkpoint(make_tree, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", ("t2m",), (8, 16), "2000-01-01", "2000-02-20")
    transformers.Dinov2Model(transformers.Dinov2Config(**BACKBONE)).save_pretrained(tmp_path / "dinov2")
    config = write_run(tmp_path, tree, train={"epochs": 1}, data={**tree.data, "frames_in": 3, "frames_out": 2})
    options = {
        "name": "rae_direct", "encoder_cls": "Dinov2withNorm", "encoder_config_path": str(tmp_path / "dinov2"),
        "encoder_input_size": 16, "decoder_config_path": DECODER, "decoder_patch_size": 8,
    }  # fmt: skip
    train_here(config, f"model={json.dumps(options)}", "run.name=direct")
    path, out = str(tmp_path / "checkpoints/direct/best.ckpt"), tmp_path / "out"
    assert main(["--checkpoint", path, "--out", str(out), "--stride", "5"]) == 0

    found = json.loads((out / "metrics_stage1_direct.json").read_text())
    scores = json.loads((out / "metrics.json").read_text())["scores"]
    assert found["lead_hours"] == [6, 12] and found["units"] == {"t2m": "K"} and found["stride"] == 5
    assert {"rae_direct", "persistence", "climatology"} <= found["scores"].keys()
    for name, channels in found["scores"].items():
        assert channels["t2m"] == {key: scores[name]["t2m"][key] for key in ("rmse", "mae")}
    assert (out / "spatial_examples_stage1.png").read_bytes().startswith(b"\x89PNG")

    weights = load_checkpoint(path)["model"]
    for part, file in (("decoder", "decoder_fp16"), ("in_adapter", "encoder_in_adapter_fp16")):
        held = load_file(out / f"{file}.safetensors")
        own = {n.removeprefix(f"{part}."): v for n, v in weights.items() if n.startswith(f"{part}.")}
        assert held.keys() == own.keys() and all(torch.equal(held[n], v.half()) for n, v in own.items())

    codec = make_model(
        {**options, "name": "rae", "decoder_weights": str(out / "decoder_fp16.safetensors")}, small_spec()
    )
    assert torch.equal(codec.rae.decoder.embed.weight, weights["decoder.embed.weight"].half().float())

    content = load_checkpoint(path)
    content["config"]["model"] = {"name": "cnn"}
    save_checkpoint(tmp_path / "other.ckpt", content)
    with pytest.raises(ValueError, match=r"holds cnn, not rae_direct; config/rae_direct\.yaml trains one"):
        main(["--checkpoint", str(tmp_path / "other.ckpt"), "--out", str(out)])
    with pytest.raises(ValueError, match="--stride 0: must be at least 1"):
        main(["--checkpoint", path, "--out", str(out), "--stride", "0"])


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.bias, 1e6)
    with pytest.raises(ValueError, match=r"x\.safetensors: bias does not fit float16 \(at most 65504\)"):
        write_half(layer, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
