"""日志、metrics.csv、W&B 的各种降级；W&B 一律离线或由替身代替，不连网。"""

from __future__ import annotations

import csv
import io
import logging
import math
import shutil
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from util import logger as logger_module
from util.logger import MetricRow, MetricsLog, open_wandb, read_metrics, setup_logging
from util.training_config import WandbConfig

LOGGER = logging.getLogger("ar_pred")


@pytest.fixture(autouse=True)
def clean_handlers() -> Iterator[None]:
    yield
    for handler in list(LOGGER.handlers):
        LOGGER.removeHandler(handler)
        handler.close()


# ---- 文字日志 ----


def test_log_goes_to_file_and_console_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run" / "train.log"
    setup_logging(path).info("first 一")
    logger = setup_logging(path)  # 再次配置：不重复，旧内容还在
    logger.warning("second")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO first 一", "WARNING second"]
    assert len(logger.handlers) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == lines
    setup_logging(None).info("console only")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert "console only" in capsys.readouterr().err


def test_a_log_line_does_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    logger = setup_logging(None)
    with tqdm(total=2, file=screen, mininterval=0, miniters=1, ncols=60) as bar:
        bar.update()
        logger.info("between")
        bar.update()
    pieces = screen.getvalue().replace("\n", "\r").split("\r")
    (line,) = [piece for piece in pieces if "between" in piece]
    assert "it/s" not in line  # 进度条先擦掉了，日志独占一行
    assert line.endswith("INFO between")


# ---- metrics.csv ----


def test_metrics_are_tidy_rows(tmp_path: Path):
    path = tmp_path / "run" / "metrics.csv"
    log = MetricsLog(path, None)
    log.log(10, 0, "train", {"loss": 0.1, "lr": 1e-4})
    log.log(20, 1, "val", {"loss": math.nan})
    assert path.read_text().splitlines() == [
        "step,epoch,split,name,value",
        "10,0,train,loss,0.1",
        "10,0,train,lr,0.0001",
        "20,1,val,loss,nan",
    ]
    assert log.rows()[:2] == [MetricRow(10, 0, "train", "loss", 0.1), MetricRow(10, 0, "train", "lr", 1e-4)]
    assert math.isnan(log.rows()[2].value)
    log.close()


def test_metrics_resume_drops_later_rows(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    log = MetricsLog(path, None)
    value = 0.1 + 0.2  # 17 位有效数字原样来回
    for step in (1, 2, 3, 4):
        log.log(step, 0, "train", {"loss": step * value})
    log.close()
    with path.open("a") as file:
        file.write("5,0,train,loss,0.12")  # 被杀时写了一半：0.1234 只剩 0.12
    log = MetricsLog(path, resume_step=2)
    log.log(3, 0, "train", {"loss": 9.0})
    assert [(row.step, row.value) for row in log.rows()] == [(1, value), (2, 2 * value), (3, 9.0)]
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    MetricsLog(path, None).close()  # 新的运行从空文件开始
    assert read_metrics(path) == []


@pytest.mark.parametrize("tail", ["", "7", "7,0,tra", "7,0,train,loss,", "7,0,train,loss,0.5"])
def test_metrics_half_written_last_line(tmp_path: Path, tail: str):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,split,name,value\n6,0,train,loss,1.5\n" + tail)
    assert read_metrics(path) == [MetricRow(6, 0, "train", "loss", 1.5)]
    MetricsLog(path, 100).close()
    assert path.read_text() == "step,epoch,split,name,value\n6,0,train,loss,1.5\n"


def test_metrics_damage_elsewhere_is_reported(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,split,name,value\n6,0,tra\n7,0,train,loss,1.5\n")
    with pytest.raises(ValueError, match=r"metrics\.csv line 2: '6,0,tra' is not step,epoch,split,name,value"):
        read_metrics(path)


def test_metrics_resume_without_a_file(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.csv", resume_step=5)
    assert log.rows() == []
    log.close()


FULL = Path("/dev/full")
full_disk = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@full_disk
def test_metrics_on_a_full_disk_name_the_file(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.csv", None)
    log.close()
    log._file = FULL.open("a", encoding="utf-8")
    log._writer = csv.writer(log._file)
    with pytest.raises(
        OSError, match=r"No space left on device; make room, then go on with --resume auto: '.*metrics.csv'"
    ):
        log.log(1, 0, "train", {"loss": 1.0})
    log.close()


@full_disk
def test_a_log_on_a_full_disk_says_so_once(capsys: pytest.CaptureFixture[str]):
    logger = setup_logging(FULL)
    for number in range(3):
        logger.info("line %d", number)
    said = capsys.readouterr().err
    assert said.count("/dev/full cannot be written, the run goes on: [Errno 28] No space left on device") == 1
    assert "line 2" in said and "Traceback" not in said


# ---- W&B ----


class FakeError(Exception):
    """替身的 wandb.Error。"""


class FakeRun:
    url = "https://example.invalid/run"
    dir = "wandb/offline-run-x/files"

    def __init__(self, fails: type[Exception] | None = None) -> None:
        self.fails = fails
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.fails:
            raise self.fails("connection lost")
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True
        if self.fails:
            raise self.fails("connection lost")


class FakeWandb(types.ModuleType):
    """替身：记下 init 的参数；failing 里的 mode 抛 Error。"""

    Error = FakeError

    def __init__(self, failing: tuple[str, ...] = (), run: FakeRun | None = None) -> None:
        super().__init__("wandb")
        self.failing, self.run = failing, run or FakeRun()
        self.calls: list[dict[str, Any]] = []
        self.teardowns = 0

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def init(self, **arguments: Any) -> FakeRun:
        self.calls.append(arguments)
        if arguments["mode"] in self.failing:
            raise FakeError("timed out\nConsider increasing the timeout")
        return self.run

    def teardown(self) -> None:
        self.teardowns += 1

    def Image(self, path: str, caption: str) -> str:
        return f"image {caption}"


@pytest.fixture
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """清掉 W&B 的环境变量；netrc 指向空处。"""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, no_environment: None):
    def install(*failing: str, run: FakeRun | None = None) -> FakeWandb:
        module = FakeWandb(failing, run)
        monkeypatch.setitem(sys.modules, "wandb", module)
        for name in ("mailbox", "mailbox_handle"):
            monkeypatch.setitem(sys.modules, f"wandb.sdk.mailbox.{name}", types.ModuleType(name))
        return module

    return install


def start(tmp_path: Path, mode: Any = "auto", name: str = "run"):
    run = open_wandb(WandbConfig(mode=mode, dir=str(tmp_path / "out")), name, {"train": {"lr": 1e-4}}, LOGGER)
    run.wait()
    return run


def test_auto_is_offline_without_a_key(fake, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    module = fake()
    with caplog.at_level(logging.INFO):
        run = start(tmp_path, name="a/b: c")
    (call,) = module.calls
    assert (call["mode"], call["id"], call["name"]) == ("offline", "a-b--c", "a/b: c")
    assert call["settings"]["init_timeout"] <= 20
    assert call["config"] == {"train": {"lr": 1e-4}}
    assert "no API key" in caplog.text
    assert "wandb sync wandb/offline-run-x" in caplog.text
    run.log(3, {"loss": 0.5})
    run.images(4, "test", [Path("a/one.png"), Path("two.png")])
    run.finish()
    run.log(5, {"loss": 0.5})
    assert module.run.logged == [({"loss": 0.5}, 3), ({"test": ["image one", "image two"]}, 4)]
    assert module.run.finished


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_unreachable_server_falls_back_to_offline(fake, tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    module = fake("online")
    run = start(tmp_path, mode)
    assert [(call["mode"], call["resume"]) for call in module.calls] == [("online", "allow"), ("offline", None)]
    assert module.teardowns == 1
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "W&B could not start online: FakeError: timed out Consider increasing the timeout"
    ]
    run.log(1, {"loss": 1.0})
    assert module.run.logged == [({"loss": 1.0}, 1)]


def test_online_without_a_key_never_prompts(fake, tmp_path, caplog):
    module = fake()
    start(tmp_path, "online")
    assert [call["mode"] for call in module.calls] == ["offline"]
    assert "no API key" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("machine api.wandb.ai login user password secret\n", "online"),
        ("machine example.com login user password secret\n", "offline"),
        ("nonsense here\n", "offline"),
    ],
)
def test_key_from_netrc(fake, tmp_path, text, expected):
    (tmp_path / "netrc").write_text(text)
    module = fake()
    start(tmp_path)
    assert [call["mode"] for call in module.calls] == [expected]


def test_neither_online_nor_offline(fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    fake("online", "offline")
    run = start(tmp_path)
    assert "W&B is off for this run" in caplog.text
    run.log(1, {"loss": 1.0})
    run.images(1, "test", [])
    run.finish()


@pytest.mark.parametrize("error", [FakeError, ConnectionResetError])
def test_a_broken_connection_is_reported_once(fake, tmp_path, caplog, error):
    module = fake(run=FakeRun(error))
    run = start(tmp_path)
    caplog.clear()
    for step in range(3):
        run.log(step, {"loss": 1.0})
    run.images(3, "test", [Path("one.png")])
    run.finish()
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.DEBUG] == [
        f"W&B failed, the run goes on without it: {error.__name__}: connection lost"
    ]
    assert module.run.finished


def test_any_other_error_is_a_warning_with_its_traceback_in_the_log(fake, tmp_path):
    """W&B 可有可无：它的、我们的毛病都不该停下训练；原委在日志文件里。"""
    fake(run=FakeRun(KeyError))
    run = start(tmp_path)
    setup_logging(tmp_path / "train.log")
    run.log(1, {"loss": 1.0})
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert "WARNING W&B failed, the run goes on without it: KeyError: 'connection lost'" in lines[0]
    assert "Traceback (most recent call last):" in lines and lines[-1] == "KeyError: 'connection lost'"


def test_a_run_that_does_not_end_is_left(fake, tmp_path, monkeypatch, caplog):
    run = FakeRun()
    monkeypatch.setattr(run, "finish", lambda: time.sleep(5), raising=False)
    monkeypatch.setattr(logger_module, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(logger_module, "PATIENCE_SECONDS", 0)
    fake(run=run)
    begin = time.monotonic()
    start(tmp_path).finish()
    assert time.monotonic() - begin < 4
    assert "W&B does not end, not waiting for it; what is missing there: wandb sync" in caplog.text


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_package_that_cannot_start(fake, tmp_path, monkeypatch, caplog, error):
    """装坏了的 wandb 抛得出任何错。"""
    module = fake()

    def init(**_: Any) -> None:
        raise error("broken installation")

    monkeypatch.setattr(module, "init", init)
    start(tmp_path).log(1, {"loss": 1.0})
    assert f"W&B could not start offline: {error.__name__}: broken installation" in caplog.text
    assert "W&B is off for this run" in caplog.text


def test_environment_disables(fake, tmp_path, monkeypatch, caplog):
    module = fake()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = start(tmp_path, "online")
    run.log(1, {"loss": 1.0})
    run.finish()
    assert module.calls == []
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    start(tmp_path, "disabled")
    assert module.calls == []
    assert "WANDB_MODE=nonsense is none of auto, online, offline, disabled; using disabled" in caplog.text


def test_package_missing(no_environment, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import 时抛 ImportError
    start(tmp_path).log(1, {"loss": 1.0})
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "W&B is off: the package wandb cannot be used (import of wandb halted; None in sys.modules); pip install wandb"
    ]


def test_only_an_empty_namespace_package(no_environment, tmp_path, monkeypatch, caplog):
    """根目录有 wandb/ 文件夹而没装包：import 成功，却什么也没有。"""
    (tmp_path / "wandb").mkdir()
    for name in [name for name in sys.modules if name == "wandb" or name.startswith("wandb.")]:
        monkeypatch.delitem(sys.modules, name)
    site = [path for path in sys.path if not (Path(path) / "wandb" / "__init__.py").is_file()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *site])
    try:
        start(tmp_path).log(1, {"loss": 1.0})
        assert str(tmp_path / "wandb") in list(sys.modules["wandb"].__path__)
    finally:
        sys.modules.pop("wandb", None)  # 真的那个（若导入过）由 monkeypatch 放回
    assert "only an empty folder of that name" in caplog.text


def test_real_offline_run(no_environment, tmp_path, caplog):
    """真的 wandb，离线：文件落在 <dir>/wandb/ 下；续训是同一个 id。"""
    wandb = pytest.importorskip("wandb")
    picture = tmp_path / "map.png"
    from matplotlib.figure import Figure

    Figure().savefig(picture)
    try:
        for first in (1, 3):
            run = start(tmp_path, "offline", "quickstart-1")
            run.log(first, {"train/loss": 0.5})
            run.log(first + 1, {"train/loss": 0.25})
            run.images(first + 1, "samples/test", [picture])
            run.finish()
    finally:
        wandb.teardown()
    folders = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith("-quickstart-1") for folder in folders)
    assert all(list(folder.glob("run-quickstart-1.wandb")) for folder in folders)
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/files/media/images/samples/*.png"))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("mode", ["", "of"])
def test_an_environment_that_wandb_cannot_read(no_environment, tmp_path, monkeypatch, caplog, mode):
    """容器里留空的、拼错的 WANDB_MODE：真的 wandb 用 pydantic 报错，我们只警告。"""
    monkeypatch.setenv("WANDB_MODE", mode)
    open_wandb(WandbConfig(mode="offline", dir=str(tmp_path)), "run", {}, LOGGER).finish()
    lines = [record.getMessage() for record in caplog.records]
    assert any("W&B could not start offline: ValidationError" in line for line in lines), lines
    assert lines[-1] == "W&B is off for this run"
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize("how", ["removed", "moved"])
def test_a_folder_removed_meanwhile_is_made_again(tmp_path: Path, how: str):
    """写过的都在，以后的接着写；移走的也另起一份。"""
    folder = tmp_path / "run"
    logger, metrics = setup_logging(folder / "train.log"), MetricsLog(folder / "metrics.csv", None)
    logger.info("before")
    metrics.log(1, 0, "train", {"loss": 0.5})
    assert not metrics.gone
    shutil.rmtree(folder) if how == "removed" else folder.rename(tmp_path / "elsewhere")
    assert metrics.gone
    metrics.restore()
    logger.info("after")
    for step in (2, 3):
        assert not metrics.gone
        metrics.log(step, 0, "train", {"loss": 0.25})
    assert [(row.step, row.value) for row in metrics.rows()] == [(1, 0.5), (2, 0.25), (3, 0.25)]
    lines = (folder / "train.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["before", "after"]
    metrics.close()
