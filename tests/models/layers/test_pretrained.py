"""预训练权重的读法：小的随机模型存进文件夹，经真的路径读回；缺文件、缺张量、没有网络都是一行错误。"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from models.layers.pretrained import load_pretrained
from tests.models.small import SMALL_VAE

VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16,
    "decoder_num_attention_heads": 2,
}  # fmt: skip
# 存的人、读的类、权重文件
KINDS: dict[str, tuple[Callable[[], Any], type[Any], str]] = {
    "vae": (lambda: AutoencoderKL(**SMALL_VAE), AutoencoderKL, "diffusion_pytorch_model.safetensors"),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**VIT)), Dinov2Model, "model.safetensors"),
    "mae": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**VIT, **DECODER)), ViTMAEModel, "model.safetensors"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[Path, Any, type[Any], str]]:
    """把一种小模型存进文件夹；返回文件夹、存的模型、读的类、权重文件的名字。"""

    def write(kind: str, **options: Any) -> tuple[Path, Any, type[Any], str]:
        make, cls, file = KINDS[kind]
        torch.manual_seed(0)
        model = make()
        model.save_pretrained(tmp_path / kind, **options)
        return tmp_path / kind, model, cls, file

    return write


@every_kind
def test_what_was_saved_is_read(kind: str, save: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder, model, cls, _ = save(kind)
    torch.manual_seed(1)
    read = load_pretrained(cls, str(folder))
    saved = (model.vit if kind == "mae" else model).state_dict()  # 编码器的类读得了整个模型的文件
    assert not read.training and saved.keys() == read.state_dict().keys()
    assert all(torch.equal(value, saved[name]) for name, value in read.state_dict().items())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_shards_and_half_precision_are_read(save: Any) -> None:
    folder, model, cls, file = save("dinov2", max_shard_size="50KB")
    assert not (folder / file).exists() and (folder / f"{file}.index.json").exists()
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in load_pretrained(cls, str(folder)).state_dict().items()
    )
    model.half().save_pretrained(folder)
    assert {p.dtype for p in load_pretrained(cls, str(folder)).parameters()} == {torch.float32}


def test_the_older_names_of_the_published_vae_are_read(save: Any) -> None:
    """stabilityai/sd-vae-ft-mse 的注意力存的是从前的名字。"""
    folder, model, cls, file = save("vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(folder / file)
    renamed = {}
    for name, value in weights.items():
        new = next((name.replace(f".{now}.", f".{then}.") for now, then in older.items() if f".{now}." in name), name)
        renamed[new] = value
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / file, metadata={"format": "pt"})
    read = load_pretrained(cls, str(folder)).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())


@every_kind
def test_missing_files_are_named(kind: str, save: Any, tmp_path: Path) -> None:
    folder, _, cls, file = save(kind)
    (folder / file).rename(folder / "other.safetensors")
    there = "there: config.json, other.safetensors"
    with pytest.raises(ValueError, match=rf"^model.weights = {re.escape(str(folder))}: no {file}; {there}$"):
        load_pretrained(cls, str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"no config.json and no {file}; there: other.safetensors$"):
        load_pretrained(cls, str(folder))
    with pytest.raises(
        ValueError, match=rf"^model.encoder = .*: no such folder; wanted there: config.json and {file}$"
    ):
        load_pretrained(cls, str(tmp_path / "nowhere"), key="model.encoder")


def test_a_mistyped_local_folder_is_not_asked_of_the_hub(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """weights/NAME 与 id 写法相同；weights/ 在这里，就是写错了名字。"""
    save("vae")
    monkeypatch.chdir(tmp_path.parent)
    asked = f"{tmp_path.name}/vea"
    monkeypatch.setattr("models.layers.pretrained.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=rf"^model.weights = {asked}: no such folder; in {tmp_path.name}: vae; .*$"):
        load_pretrained(AutoencoderKL, asked)


@every_kind
def test_missing_or_misshapen_weights_are_an_error(kind: str, save: Any) -> None:
    """库会给它们随机的值，只警告一句。"""
    folder, _, cls, file = save(kind)
    weights = load_file(folder / file)
    name = min(n for n in weights if "decoder" not in n or kind == "vae")  # 读的类要的一个
    lacking = {n: value for n, value in weights.items() if n != name}
    save_file(lacking, folder / file, metadata={"format": "pt"})
    short = name.removeprefix("vit.")
    with pytest.raises(
        ValueError, match=rf": 1 of the weights of {cls.__name__} are missing in {file}, e.g. {short}; "
    ):
        load_pretrained(cls, str(folder))
    save_file({**lacking, name: torch.zeros(3)}, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf": 1 of the weights of {cls.__name__} have other shapes in {file}, e.g. "):
        load_pretrained(cls, str(folder))


@every_kind
def test_damaged_files_are_an_error(kind: str, save: Any) -> None:
    folder, _, cls, file = save(kind)
    (folder / file).write_bytes(b"nothing" * 9)
    with pytest.raises(ValueError, match=rf"^model.weights = .*: {cls.__name__} cannot be read \(.+Error: [^\n]+\)$"):
        load_pretrained(cls, str(folder))


@every_kind
def test_without_network_the_files_and_the_way_are_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    _, cls, file = KINDS[kind]
    way = f"hf download some/one config.json {file} --local-dir FOLDER; bring FOLDER here and give model.weights=FOLDER"
    with pytest.raises(ValueError, match=rf"^model.weights = some/one: no such folder, and .*{way}$"):
        load_pretrained(cls, "some/one")


def test_the_hub_cache_is_read_without_network(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """从前取过的：缓存里的文件夹就够了。"""
    folder, model, cls, _ = save("vae")
    kept = tmp_path / "models--some--one"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots").mkdir()
    folder.rename(kept / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    read = load_pretrained(cls, "some/one").state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
