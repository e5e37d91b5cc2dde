"""每个键都有说明；说的默认值就是默认值；config/ 里写着的键都在；说明页不过时。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from engine.commands import train_command
from engine.reference.configs import listed
from engine.reference.keys import PAGE, REQUIRED, Key, config_keys, model_keys, page
from models import config_class, model_names
from util.strict import parse_yaml, read_mapping
from util.training_config import TrainConfig
from util.variables import FORCINGS

RUNS = [path for folder in (".", "published", "wb2") for path in listed(folder)]


@pytest.fixture(scope="module")
def keys() -> list[Key]:
    return [*config_keys(), *model_keys()]


def test_the_page_is_of_these_keys(keys):
    assert PAGE.read_text(encoding="utf-8") == page(keys), "run python -m engine.reference.write --texts"


def test_every_key_says_what_it_does(keys):
    assert not [key.name for key in keys if not (key.text and key.text.isascii() and key.values)]
    assert len({(key.model, key.name) for key in keys}) == len(keys)
    (forcings,) = (key.text for key in keys if key.name == "data.forcings")
    assert all(name in forcings for name in FORCINGS)


def written(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from written(value, f"{prefix}{name}.")


def test_every_key_in_config_is_explained(keys):
    """variables 之类的下面是用户的名字。"""
    free = tuple(f"{key.name}." for key in keys if "name ->" in key.values or "mapping" in key.values)[1:]
    known = {(key.model, key.name) for key in keys}
    for path in RUNS:
        values = read_mapping(path)
        for name in written(values):
            assert known & {("", name), (values["model"]["name"], name)} or name.startswith(free), (path.name, name)


def parsed(keys: list[Key], prefix: str, model: str = "") -> dict[str, Any]:
    """一段里印着的默认值，照 YAML 读回来；没有印的（一段、必填）不在。"""
    ours = {k.name.removeprefix(prefix): k.default for k in keys if k.model == model and k.name.startswith(prefix)}
    said = {name: text for name, text in ours.items() if "." not in name and text not in ("", REQUIRED)}
    return {name: parse_yaml(text, name) for name, text in said.items()}


def test_the_defaults_are_the_defaults(keys):
    needed = {"epochs": 1, "batch_size": 1}
    assert TrainConfig.model_validate({**parsed(keys, "train."), **needed}) == TrainConfig.model_validate(needed)
    needs = {"dit": {"size": "S"}, "latent_unet": {"first_stage": "a"}, "linear_regression": {"max_frames": 1}}
    needs |= {"sd_vae": {"weights": "a"}, "var": {"first_stage": "a"}}
    for name in model_names():
        needed = needs.get(name, {})
        default = dict(config_class(name).model_validate(needed))
        assert {**default, **parsed(keys, "model.", name), **needed} == default, name


def test_the_command(capsys):
    assert train_command(["--explain", "train.clip_norm"]) == 0
    said = "train.clip_norm: number > 0 | null; default null\n    longest gradient; null: any\n"
    assert capsys.readouterr().out == said
    assert train_command(["--explain", "train.schedule"], "config/quickstart.yaml") == 0
    assert capsys.readouterr().out.count("\ntrain.schedule.") == 5


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("train.lrr", "nearest: train.lr"),
        ("train.rollout.steps", "nearest: train.objective.rollout.steps"),
        ("frames", "nearest: model.history.frames"),
        ("cnnn", "nearest: cnn"),
        ("zzzz", "python train.py --explain lists all"),
    ],
)
def test_an_unknown_key_names_the_nearest(wanted, nearest):
    with pytest.raises(ValueError, match=f"--explain {wanted}: no such key; ") as error:
        train_command(["--explain", wanted])
    assert str(error.value).endswith(nearest)


def test_a_training_needs_a_config():
    with pytest.raises(ValueError, match="give --config"):
        train_command([])
