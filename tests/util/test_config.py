"""严格的配置：每一种写错都是一行，带键、值和最近的正确写法；合并与覆盖的次序；存进检查点再读回不变。"""

from __future__ import annotations

import json
import math
import re
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from engine.reference.configs import listed
from models import build_config
from util.config import Axis, RunConfig, apply_overrides, load_config, read_mapping
from util.strict import Strict, dump_yaml, nearest, parse_yaml, validate

DATA_SET = """
root: tree
variables: {t2m: single, z: [level_00]}
latitude: {first: 87.5, step: -5.0, count: 36}
longitude: {first: 0.0, step: 5.0, count: 72}
pressure_hpa: [50, 1000]
splits:
  train: [1979, 2013]
  val: [2015-01-01, 2015-12-31]
  test: [2014, 2014]
"""
RUN = """
data: {set: %s, frames_in: 7, splits: {val: [2016, 2016]}}
model: {name: persistence}
train: {epochs: 2, batch_size: 8, lr: 1e-4}
smoke: [train.epochs=1, data.frames_in=2]
"""


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    """一份引用数据集文件的运行 YAML。"""
    data_set, path = tmp_path / "set.yaml", tmp_path / "run.yaml"
    data_set.write_text(DATA_SET, encoding="utf-8")
    path.write_text(RUN % data_set, encoding="utf-8")
    return path


def message(path: Path, *overrides: str, smoke: bool = False) -> str:
    """load_config 的报错；必须是一行。"""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        load_config(path, overrides, smoke)
    assert type(caught.value) is ValueError
    return str(caught.value)


def test_set_is_merged_under_the_run(run_yaml: Path):
    config = load_config(run_yaml)
    assert config.data.root == "tree"
    assert config.data.variables == {"t2m": "single", "z": ["level_00"]}
    assert config.data.splits.train == ["1979", "2013"]  # 取自数据集文件
    assert config.data.splits.val == ["2016", "2016"]  # 运行文件盖过它
    assert config.data.splits.test == ["2014", "2014"]
    assert config.train.lr == 1e-4
    assert (config.run.seed, config.train.optimizer, config.data.interval_hours) == (42, "adam", 6)


def test_overrides_beat_smoke_beats_the_file(run_yaml: Path):
    assert load_config(run_yaml).train.epochs == 2
    assert load_config(run_yaml, smoke=True).train.epochs == 1
    both = load_config(run_yaml, ["train.epochs=5"], smoke=True)
    assert (both.train.epochs, both.data.frames_in) == (5, 2)


def test_override_of_one_variable_keeps_the_others_of_the_set(run_yaml: Path):
    config = load_config(run_yaml, ["data.variables.z=all"])
    assert config.data.variables == {"t2m": "single", "z": "all"}
    config = load_config(run_yaml, ["data.variables={u10: single}"])
    assert config.data.variables == {"u10": "single"}


def test_run_file_replaces_the_variables_of_the_set(run_yaml: Path):
    text = run_yaml.read_text().replace("frames_in: 7", "frames_in: 7, variables: {tp: single}")
    run_yaml.write_text(text)
    assert load_config(run_yaml).data.variables == {"tp": "single"}


def test_shuffle_is_another_word_for_windows(run_yaml: Path):
    assert load_config(run_yaml).data.windows == "random"
    assert load_config(run_yaml, ["data.shuffle=true"]).data.windows == "random"
    config = load_config(run_yaml, ["data.shuffle=false"])
    assert config.data.windows == "apart"
    assert RunConfig(**config.model_dump()) == config  # 检查点里的读得回来，从前的也是
    both = message(run_yaml, "data.windows=all", "data.shuffle=false")
    assert "data: windows = all and shuffle = False say the same thing; remove shuffle" in both


def test_override_chooses_another_set(run_yaml: Path, tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text(DATA_SET.replace("root: tree", "root: elsewhere"), encoding="utf-8")
    config = load_config(run_yaml, ["data.root=third", f"data.set={other}"])
    assert config.data.root == "third"
    assert load_config(run_yaml, [f"data.set={other}"]).data.root == "elsewhere"


def test_the_files_own_values_are_untouched_by_overrides():
    values = {"a": {"b": 1}, "c": [1]}
    assert apply_overrides(values, ["a.b=2", "a.d.e=[3, x]"]) == {"a": {"b": 2, "d": {"e": [3, "x"]}}, "c": [1]}
    assert values == {"a": {"b": 1}, "c": [1]}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        # 拼错、放错了段、什么都不像
        ("train.epoch=3", ["unknown key train.epoch = 3", "nearest: train.epochs"]),
        ("data.latitude.frist=3", ["unknown key data.latitude.frist = 3", "nearest: data.latitude.first"]),
        ("modle.depth=3", ["unknown key modle", "nearest: model"]),
        ("data.batch_size=4", ["unknown key data.batch_size = 4", "nearest: train.batch_size"]),
        ("epochs=4", ["unknown key epochs = 4", "nearest: train.epochs"]),
        ("log.wandb.moed=online", ["unknown key log.wandb.moed", "nearest: log.wandb.mode"]),
        ("checkpoint.qqqqqq=1", ["unknown key checkpoint.qqqqqq = 1", "checkpoint.dir, checkpoint.every_epochs"]),
        # 类型不对：不转换
        ("train.epochs=ten", ["train.epochs = 'ten'", "valid integer"]),
        ("train.epochs=2.0", ["train.epochs = 2.0", "integer"]),
        ("train.epochs=true", ["train.epochs = True", "integer"]),
        ("train.batch_size='4'", ["train.batch_size = '4'", "integer of 1 to 1000000, or auto"]),
        ("train.batch_size=0", ["train.batch_size = 0", "integer of 1 to 1000000, or auto"]),
        ("train.lr=fast", ["train.lr = 'fast'", "number"]),
        ("train.lr=.inf", ["train.lr = inf", "finite"]),
        ("data.shuffle=1", ["data: shuffle = 1: write true or false, or windows: random | apart | all"]),
        ("data.windows=false", ["data.windows = False", "'random', 'apart' or 'all'"]),
        ("data.root=3", ["data.root = 3", "string"]),
        ("train.schedule=cosine", ["train.schedule = 'cosine'", "mapping"]),
        ("data.variables=[t2m]", ["data.variables = ['t2m']", "mapping"]),
        ("train.betas=[0.9]", ["train.betas = [0.9]", "at least 2"]),
        ("train.betas=[0.9, x]", ["train.betas[1] = 'x'", "number"]),
        # 范围
        ("data.frames_in=0", ["data.frames_in = 0", "greater than or equal to 1"]),
        ("data.max_missing=1.5", ["data.max_missing = 1.5", "less than or equal to 1"]),
        ("run.seed=-1", ["run.seed = -1", "greater than or equal to 0"]),
        ("data.interval_hours=0", ["data.interval_hours = 0", "greater than or equal to 1"]),
        ("data.first_hour=6", ["first_hour = 6 is not the first of every 6 h; write 0"]),
        ("data.latitude.step=0", ["data.latitude", "step must not be 0"]),
        ("data.latitude.count=37", ["data.latitude: runs from 87.5 to -92.5, outside -90 to 90"]),
        ("data.longitude.count=73", ["data.longitude: covers more than 360 degrees (73 steps of 5 from 0)", "--cols"]),
        # 大得分配不了
        ("data.frames_in=1000000000", ["data.frames_in = 1000000000", "less than or equal to 10000"]),
        ("data.latitude.count=1000000000", ["data.latitude.count = 1000000000", "less than or equal to 100000"]),
        ("train.batch_size=1000000000", ["train.batch_size = 1000000000", "integer of 1 to 1000000, or auto"]),
        ("data.workers=100000", ["data.workers = 100000", "less than or equal to 1024"]),
        ("run.devices=100000", ["run.devices = 100000", "less than or equal to 1024"]),
        # 一组词里的一个
        ("train.optimizer=adamm", ["train.optimizer = 'adamm'", "'adam' or 'adamw'", "nearest: adam"]),
        ("data.standardize=maybe", ["data.standardize = 'maybe'", "'auto', 'yes' or 'no'"]),
        # 层
        ("data.variables.z=[3]", ["data.variables.z = [3]", "single, all, or a list of levels like [level_00"]),
        ("data.variables.z=level_00", ["data.variables.z = 'level_00'", "single, all, or a list"]),
        ("data.variables.z=[]", ["data.variables.z = []", "single, all, or a list"]),
        # 外强迫与角色
        ("data.forcings=[sollar]", ["'sollar' is no forcing; nearest: solar"]),
        ("data.forcings=[static/]", ["'static/' is no forcing; nearest: static/NAME"]),
        ("data.forcings=[solar, solar]", ["a forcing is listed twice"]),
        ("data.roles={t2m: forced}", ["data.roles.t2m = 'forced'", "'prognostic' or 'diagnostic'"]),
        # 日期
        ("data.splits.train=[1979-13-01, 1980]", ["data.splits.train[0] = '1979-13-01'", "month", "1979-01-31"]),
        ("data.splits.train=[1979, 1981-02-29]", ["data.splits.train[1] = '1981-02-29'", "day"]),
        ("data.splits.val=[1979, 19800101]", ["data.splits.val[1] = 19800101", "YYYY-MM-DD"]),
        ("data.splits.val=[79, 1980]", ["data.splits.val[0] = 79", "a year like 1979"]),
        ("data.splits.val=[1979]", ["data.splits.val = [1979]", "at least 2"]),
        ("data.splits.val=1979", ["data.splits.val = 1979", "list"]),
        # 整段不在
        ("data=3", ["data = 3", "mapping"]),
        ("data.set=3", ["data.set = 3", "path of a YAML file"]),
        ("data.set=none.yaml", ["no file none.yaml"]),
        ("train=", ["train = None", "mapping"]),
        # 写法本身
        ("train.epochs", ["override 'train.epochs' is not key=value"]),
        ("=3", ["is not key=value"]),
        ("train.epochs.more=1", ["train.epochs has no keys below it"]),
        ("train.betas=[1, 2", ["override 'train.betas=[1, 2'", "not valid YAML"]),
    ],
)
def test_mistakes_are_named(run_yaml: Path, override: str, parts: list[str]):
    said = message(run_yaml, override)
    for part in parts:
        assert part in said, said


def test_missing_key_and_misspelt_key_reports_the_misspelt_one(run_yaml: Path):
    text = run_yaml.read_text()
    run_yaml.write_text(text.replace("batch_size: 8", "batchsize: 8"))
    assert "unknown key train.batchsize = 8; nearest: train.batch_size" in message(run_yaml)
    run_yaml.write_text(text.replace("batch_size: 8, ", ""))
    assert "missing key train.batch_size" in message(run_yaml)


def test_mistakes_in_the_set_name_the_set(run_yaml: Path, tmp_path: Path):
    (tmp_path / "set.yaml").write_text(DATA_SET.replace("latitude:", "lattitude:"), encoding="utf-8")
    said = message(run_yaml)
    assert "set.yaml" in said
    assert "nearest: data.latitude" in said


def test_set_refers_no_further(run_yaml: Path, tmp_path: Path):
    (tmp_path / "set.yaml").write_text(f"set: x.yaml\n{DATA_SET}", encoding="utf-8")
    assert "unknown key data.set" in message(run_yaml)


def test_file_not_there_names_the_nearest_beside_it(run_yaml: Path):
    said = message(run_yaml.with_name("rnu.yaml"))
    assert "rnu.yaml" in said
    assert "nearest: run.yaml" in said


def test_files_that_are_not_a_mapping_or_not_yaml(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="expected a mapping at the top, found list"):
        read_mapping(path)
    path.write_text("a: 1\nb: [1, 2\n")
    with pytest.raises(ValueError, match=r"x\.yaml line 3, column 1: not valid YAML"):
        read_mapping(path)
    path.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ValueError, match=r"line 3, column 1: not valid YAML \(key 'a' is given twice\)"):
        read_mapping(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1E+3", -1000.0),
        ("1.5e-3", 1.5e-3),
        (".5e2", 50.0),
        ("5", 5),
        ("0.5", 0.5),
        ("1e-4x", "1e-4x"),
        ("1979-01-01", "1979-01-01"),  # 日期留作文本
        ("012", 12),  # 以下照 YAML 1.2 core
        ("0o14", 12),
        ("0xC", 12),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("+1.", 1.0),
        ("-.inf", -math.inf),
        ("2000-01-01 00:00:00", "2000-01-01 00:00:00"),
        ("=", "="),
        ("!!str 012", "012"),
        ("yes", True),
        ("[1e-4, 2]", [1e-4, 2]),
    ],
)
def test_yaml_scalars(text: str, value: object):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


BOMB = "a0: &a0 {k: [x, x, x, x]}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)
)
DEEP_ALIASES = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("a: 1\n? [b, c]\n: 2", "line 2, column 3", "a key must be plain text"),
        ("{a: {b: 1}: 2}", "line 1, column 1", "expected"),
        ("? {a: 1}\n: 2", "line 1, column 3", "a key must be plain text"),
        ("a: &a [*a]", "line 1, column 8", "*a stands inside itself"),
        ("a: &a {b: *a}", "line 1, column 11", "*a stands inside itself"),
        ("a: *b", "line 1, column 4", "found undefined alias 'b'"),
        ("a: 1\nb: !!bool abc", "line 2, column 4", "tag tag:yaml.org,2002:bool: tags other than !!str are not read"),
        ("!!python/object:os.system {}", "line 1, column 1", "tags other than !!str"),
        ("a: " + "9" * 5000, "line 1, column 4", "an integer beyond 64 bits"),
        ("a: 0xffffffffffffffff", "line 1, column 4", "an integer beyond 64 bits"),
        ("[" * 100_000, "line 1, column 51", "or 50 levels"),
        ("{a: " * 1000, "line 1, column 198", "or 50 levels"),
        ("\n".join(" " * i + "a:" for i in range(300)), "line 50, column 50", "or 50 levels"),
        ("- " * 10_000, "line 1, column 101", "or 50 levels"),
        (BOMB, "line 5, column 32", "more than 20000 values, aliases counted in full"),
        (MERGED, "line 23, column 14", "more than 20000 values, aliases counted in full"),
        (DEEP_ALIASES, "line 49, column 12", "or 50 levels"),
        ("[" + "1," * 30_000 + "]", "line 1, column 40000", "more than 20000 values"),
        ("a: 1\nb: x\0y", "line 2, column 5", "special characters are not allowed"),
        ("<<: 1", "line 1, column 5", "expected a mapping or list of mappings for merging"),
        ("a: 1\n--- \nb: 2", "line 2, column 1", "but found another document"),
    ],
)
def test_hostile_yaml_is_one_line(text: str, place: str, said: str):
    """哪一处、什么毛病；不造出对象，所以当场就回。"""
    began = time.process_time()
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        parse_yaml(text, "x.yaml")
    assert str(caught.value).startswith(f"x.yaml {place}"), str(caught.value)
    assert said in str(caught.value)
    assert time.process_time() - began < 5


def test_too_much_yaml_is_not_read(tmp_path: Path):
    with pytest.raises(ValueError, match="here: 300000 characters of YAML, at most 262144"):
        parse_yaml("#" * 300_000, "here")
    path = tmp_path / "x.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"x.yaml: 1099511627776 bytes of YAML, at most 262144 characters"):
        read_mapping(path)
    path.write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=r"x.yaml: not text in UTF-8 \(byte 3\)"):
        read_mapping(path)


def test_what_is_written_is_read_back():
    """像数的文本加引号：名字是 1e5 的运行，照 config.yaml 接着训练得了。"""
    values = {"a": ["1e5", "012", "0o14", "1:30", "1_000", ".5", "yes", "2000-01-01", "运行", "", "*x"], "b": [1e-5, 3]}
    assert parse_yaml(dump_yaml(values), "here") == values


def test_the_loader_left_pyyaml_itself_alone():
    assert yaml.safe_load("1979-01-01") != "1979-01-01"
    assert yaml.safe_load("1e-4") == "1e-4"


@pytest.mark.parametrize(("word", "kept"), [("yes", "yes"), ("no", "no"), ("auto", "auto"), ("true", "yes")])
def test_standardize_takes_the_words_yaml_turns_into_booleans(run_yaml: Path, word: str, kept: str):
    assert load_config(run_yaml, [f"data.standardize={word}"]).data.standardize == kept


def test_dates_are_kept_as_text(run_yaml: Path):
    config = load_config(run_yaml, ["data.splits.train=[1979-01-01, 2013]"])
    assert config.data.splits.train == ["1979-01-01", "2013"]


NAMES = ["ridge", "运行 1", "été_2.0", "हिन्दी", "-x", "ж" * 60]
NO_NAMES = ["..", ".hidden", "a/../../y", "/etc/x", "a/b", "a\\b", "*", "a[1]", "a?", "a\n", "a\0b", " ", "", "ж" * 61]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_kept(run_yaml: Path, name: str):
    assert load_config(run_yaml, [f'run.name="{name}"']).run.name == name


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_is_that_of_one_folder(run_yaml: Path, name: str):
    """配置里写的、命令行里写的，守同样的规矩。"""
    quoted = json.dumps(name)
    assert "run.name = " in message(run_yaml, f"run.name={quoted}")
    run_yaml.write_text(f"{run_yaml.read_text()}\nrun: {{name: {quoted}}}\n", encoding="utf-8")
    assert "a name is that of one folder: letters, digits" in message(run_yaml)


def test_round_trip_through_plain_values(run_yaml: Path):
    """检查点里存的是 model_dump；读回、以及写成 YAML 再读，都得同一份配置。"""
    config = load_config(run_yaml, ["train.clip_norm=1.0", "train.schedule={name: cosine, warmup_steps: 3}"])
    assert validate(RunConfig, config.model_dump(), "checkpoint") == config
    text = yaml.safe_dump(config.model_dump(), allow_unicode=True)
    assert validate(RunConfig, parse_yaml(text, "text"), "text") == config


def test_config_cannot_be_changed(run_yaml: Path):
    config = load_config(run_yaml)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


def test_axis_values():
    assert Axis(first=90.0, step=-22.5, count=3).values() == (90.0, 67.5, 45.0)
    assert Axis(first=1.0, step=0.0, count=1).values() == (1.0,)


def test_nearest():
    assert nearest("t2n", ["t2m", "tp"]) == "nearest: t2m"
    assert nearest("qqq", ["t2m", "tp"], "there") == "there: t2m, tp"
    assert nearest("x", [], "there") == "there: none"


class Inner(Strict):
    size: int = 1


class Other(Strict):
    width: int = 1


class Outer(Strict):
    inner: Inner | None = None
    parts: list[Inner] = Field(default=[])
    width: int | str | None = None
    either: Inner | Other = Field(default=Inner())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"inner": {"siez": 2}}, "here: unknown key model.inner.siez = 2; nearest: model.inner.size"),
        ({"parts": [{}, {"siez": 2}]}, "here: unknown key model.parts[1].siez = 2; nearest: "),
        ({"parts": [{"size": "x"}]}, "here: model.parts[0].size = 'x': input should be a valid integer"),
        ({"width": [1]}, "here: model.width = [1]: input should be a valid integer or input should be a valid string"),
        ({"either": {"siez": 2}}, "here: unknown key model.either.siez = 2; nearest: model.either.size"),
        ({"wdth": 1}, "here: unknown key model.wdth = 1; nearest: model.width"),
        ({"inner": 3}, "here: model.inner = 3: must be a mapping, {key: value, ...}"),
    ],
)
def test_keys_below_unions_and_lists(values: dict, expected: str):
    """pydantic 在 loc 里夹的联合类型分支名不是键。"""
    with pytest.raises(ValueError, match=re.escape(expected)):
        validate(Outer, values, "here", "model")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"name": "ar_pred_video_vanila"}, ["model.name = 'ar_pred_video_vanila'", "nearest: ar_pred_video_vanilla"]),
        ({}, ["model.name = None"]),
        ({"name": "ar_pred_video_vanilla", "depht": 3}, ["unknown key model.depht = 3", "nearest: model.depth"]),
        ({"name": "ar_pred_video_vanilla", "mask_ratio": 1.2}, ["model.mask_ratio = 1.2", "less than or equal to 1"]),
        ({"name": "ar_pred_video_vanilla", "mask_radio": -1.0}, ["model.mask_ratio = -1.0", "greater than or equal"]),
        ({"name": "ar_pred_video_vanilla", "grouping": {"size": "frme"}}, ["model.grouping.size = 'frme'", "frame"]),
    ],
)
def test_model_section_names_full_keys(options: dict, parts: list[str]):
    with pytest.raises(ValueError, match=r"x\.yaml: ") as caught:
        build_config(options, "x.yaml")
    for part in parts:
        assert part in str(caught.value)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", listed("."), ids=lambda p: p.name)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_config_of_the_repository_loads(path: Path, smoke: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    config = load_config(path, smoke=smoke)
    build_config(config.model, str(path))


def test_empty_smoke_section_changes_nothing(tmp_path: Path, run_yaml: Path):
    run_yaml.write_text(re.sub("smoke:.*", "", run_yaml.read_text()))
    assert load_config(run_yaml, smoke=True) == load_config(run_yaml)
    run_yaml.write_text(run_yaml.read_text() + textwrap.dedent("\nsmoke: train.epochs=1\n"))
    assert "smoke = 'train.epochs=1'" in message(run_yaml)
