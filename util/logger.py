"""一次运行的三种记录：train.log 的文字、metrics.csv 的数字、W&B。"""

from __future__ import annotations

import csv
import importlib
import logging
import netrc
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from util.atomic import replacing
from util.cli import one_line
from util.signals import Interrupted
from util.training_config import WandbConfig

INIT_SECONDS = 15  # W&B 连不上时最多等这么久（秒）
FINISH_SECONDS = 60  # 结束时上传最多等这么久；没传完的留在盘上，可用 wandb sync 补传
PATIENCE_SECONDS = 30  # 它不守这个时限时，再等这么久
WANDB_MODES = ("auto", "online", "offline", "disabled")


class _BarSafeStream:
    """经 tqdm.write 写到 stderr：先擦掉进度条，写完再画回来。"""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def is_gone(file: TextIOWrapper, path: Path) -> bool:
    """打开着的 file 已经不在 path：文件夹被删去、移走了。"""
    try:
        return not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return True


def restored(file: TextIOWrapper, path: Path) -> TextIOWrapper:
    """已经不在 path 的 file：写过的抄进那里的新文件（文件夹也重建），以后接着写它。"""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as new:
        file.seek(0)
        shutil.copyfileobj(file, new)
    file.close()
    return path.open("a+", encoding="utf-8", newline="")


class _LogFile(logging.FileHandler):
    """写不下（盘满了）时说一次，训练照常；缺省是每一行日志印一段 traceback。被删去的，下一行之前重建。"""

    told = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream and is_gone(self.stream, Path(self.baseFilename)):
                self.stream = restored(self.stream, Path(self.baseFilename))
        except OSError:
            self.handleError(record)
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            _BarSafeStream().write(f"{self.baseFilename} cannot be written, the run goes on: {one_line(error)}\n")

    def close(self) -> None:
        with suppress(OSError):  # 没写完的一行也关不进去
            super().close()


def setup_logging(path: Path | None, quiet: bool = False) -> logging.Logger:
    """配置名为 ar_pred 的 logger：文件（追加）加控制台；再次调用会换掉旧的 handler。

    Args:
        path: 日志文件；None 时只有控制台。文件以追加方式打开，数据进程可同时写它。
        quiet: 控制台只出错误；多进程训练里零号以外的进程用，同样的话不说两遍。
    """
    logger = logging.getLogger("ar_pred")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(_BarSafeStream())]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(path, mode="a+", encoding="utf-8"))
    handlers[0].setLevel(logging.ERROR if quiet else logging.INFO)  # DEBUG 只进文件：整份配置、停下的原因
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    if not logging.getLogger().handlers:  # 别的库往根 logger 说一句话就会装上默认输出，我们的每一行便成了两行
        logging.getLogger().addHandler(logging.NullHandler())
    return logger


class MetricRow(NamedTuple):
    """metrics.csv 的一行：一个数。"""

    step: int
    epoch: int
    split: str
    name: str
    value: float


def read_metrics(path: Path) -> list[MetricRow]:
    """读 metrics.csv；没有换行结尾的最后一行是被杀时写了一半的，不要。

    Raises:
        ValueError: 其余的行不是 step,epoch,split,name,value。
    """
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        whole = (line for line in file if line.endswith("\n"))
        for number, cells in enumerate(csv.reader(whole), 1):
            if number == 1 and tuple(cells) == MetricRow._fields:
                continue
            try:
                step, epoch, split, name, value = cells
                rows.append(MetricRow(int(step), int(epoch), split, name, float(value)))
            except ValueError:
                header = ",".join(MetricRow._fields)
                raise ValueError(f"{path} line {number}: {','.join(cells)!r} is not {header}") from None
    return rows


class MetricsLog:
    """metrics.csv：每个数一行，写完即落盘。"""

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """打开 path。

        Args:
            path: CSV 文件，文件夹不在时建立。
            resume_step: 续训时检查点的步数，其后的旧行先删去，免得重走的步有两份；None 是新的运行，从空文件开始。
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if resume_step is not None and path.is_file():
            kept = [r for r in read_metrics(path) if r.step <= resume_step and r.split != "test"]  # 测试成绩会重记
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([MetricRow._fields, *kept])
        self.path = path
        self._open(path.open("a+", encoding="utf-8", newline=""))

    def _open(self, file: TextIOWrapper) -> None:
        self._file, self._writer = file, csv.writer(file, lineterminator="\n")

    @property
    def gone(self) -> bool:
        """文件夹在训练当中被删去、移走了；restore 重建它。"""
        return is_gone(self._file, self.path)

    def restore(self) -> None:
        self._open(restored(self._file, self.path))

    def log(self, step: int, epoch: int, split: str, values: Mapping[str, float]) -> None:
        """写下一组数，每个占一行。

        Raises:
            OSError: 写不下，说出是哪个文件。
        """
        try:
            self._writer.writerows(MetricRow(step, epoch, split, name, float(value)) for name, value in values.items())
            self._file.flush()
        except OSError as error:
            reason = f"{error.strerror}; make room, then go on with --resume auto"
            raise OSError(error.errno, reason, str(self.path)) from None

    def rows(self) -> list[MetricRow]:
        """读回全部的行。"""
        return read_metrics(self.path)

    def close(self) -> None:
        with suppress(OSError):  # 盘满了，没写完的一行也关不进去；写的时候已经说了
            self._file.close()


@contextmanager
def optional(what: str, logger: logging.Logger) -> Iterator[None]:
    """可有可无的一件（图、报告）：不论出什么错，只是少了它，训练照常。"""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  不知道会是哪个库的哪一种
        go_without(what, error, logger)


def go_without(what: str, error: Exception, logger: logging.Logger) -> None:
    """一行警告，说少了什么；原委进日志文件。"""
    logger.warning("%s failed, the run goes on without it: %s: %s", what, type(error).__name__, one_line(error))
    logger.debug("%s:", what, exc_info=error)


class WandbRun:
    """一个 W&B 运行；run 为 None 时什么也不做。W&B 出错只警告一次，训练照常。"""

    def __init__(self, run: Any, logger: logging.Logger) -> None:
        self._run = run
        self._logger = logger
        self._warned = False
        self._opening: threading.Thread | None = None

    def open_aside(self, opening: Callable[[], Any]) -> None:
        """另一个线程去开：一秒多，大半在等它的后台进程。"""

        def run() -> None:
            self._run = opening()

        self._opening = threading.Thread(target=run, daemon=True)
        self._opening.start()

    def wait(self) -> None:
        """等它开好；用到时自己会等，起读取进程（fork）之前也要等。"""
        if self._opening is not None:
            self._opening.join()
            self._opening = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """记一组数；W&B 要求 step 不减，续训时重走的步它自己会丢掉。"""
        self._try(lambda run: run.log(dict(values), step=step))

    def images(self, step: int, name: str, paths: Sequence[Path]) -> None:
        """上传 PNG。"""

        def send(run: Any) -> None:
            image = importlib.import_module("wandb").Image
            run.log({name: [image(str(path), caption=path.stem) for path in paths]}, step=step)

        self._try(send)

    def finish(self) -> None:
        """结束运行；之后的调用什么也不做。它自己有时限；连时限也不守的，不再等它。"""
        self.wait()
        thread = threading.Thread(target=self._try, args=(lambda run: run.finish(),), daemon=True)
        thread.start()
        thread.join(FINISH_SECONDS + PATIENCE_SECONDS)
        if thread.is_alive():
            self._logger.warning("W&B does not end, not waiting for it; what is missing there: wandb sync")
        self._run = None

    def _try(self, action: Callable[[Any], None]) -> None:
        self.wait()
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001  网断了、它的后台进程死了、它自己的毛病：哪一种训练都不该停
            if not self._warned:
                go_without("W&B", error, self._logger)
            self._warned = True


def open_wandb(config: WandbConfig, run_name: str, run_config: dict[str, Any], logger: logging.Logger) -> WandbRun:
    """开一个 W&B 运行；无论缺包、缺密钥还是连不上，都不询问、不报错，降级并记一行日志。

    环境变量 WANDB_MODE 盖过 config.mode。auto：有 API 密钥（WANDB_API_KEY 或 netrc）才联网，否则离线。
    运行的 id 由 run_name 得来，续训接着写同一个运行。文件在 `<config.dir>/wandb/`。不等它开好（WandbRun.wait）。
    """
    opened, mode = WandbRun(None, logger), _wandb_mode(config, logger)
    if mode != "disabled":
        opened.open_aside(lambda: _open(mode, config, run_name, run_config, logger))
    return opened


def _open(mode: str, config: WandbConfig, run_name: str, run_config: dict[str, Any], logger: logging.Logger) -> Any:
    """W&B 自己的运行；开不成是 None。"""
    try:
        wandb: Any = importlib.import_module("wandb")
        if not hasattr(wandb, "init"):  # 没装 wandb 时，根目录的 wandb/ 会被当成空的命名空间包
            raise ImportError("only an empty folder of that name")
    except Exception as error:  # noqa: BLE001  装坏了的包什么都抛得出
        logger.warning("W&B is off: the package wandb cannot be used (%s); pip install wandb", error)
        return None
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            run = _start(wandb, attempt, config, run_name, run_config)
        except Exception as error:  # noqa: BLE001  连不上、读不懂的环境变量、盘满了
            logger.warning("W&B could not start %s: %s: %s", attempt, type(error).__name__, one_line(error))
            with optional("ending W&B after that", logger):
                wandb.teardown()  # 否则失败的那次仍占着这个 id，离线重开时报 run ID in use
            continue
        place = run.url if attempt == "online" else f"upload later with: wandb sync {Path(run.dir).parent}"
        logger.info("W&B %s; %s", attempt, place)
        return run
    logger.warning("W&B is off for this run")
    return None


def _start(wandb: Any, mode: str, config: WandbConfig, run_name: str, run_config: dict[str, Any]) -> Any:
    Path(config.dir).mkdir(parents=True, exist_ok=True)
    return wandb.init(
        mode=mode,
        project=config.project,
        entity=config.entity,
        dir=config.dir,
        name=run_name,
        id=re.sub(r"[^A-Za-z0-9_.-]", "-", run_name)[:128],
        resume="allow" if mode == "online" else None,  # 离线时 resume 无效，只会多一行警告
        config=run_config,
        settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, console="off", silent=True),
    )


def _wandb_mode(config: WandbConfig, logger: logging.Logger) -> str:
    """定下 online、offline 或 disabled：没有密钥时绝不联网，因为 wandb 会停下来询问。"""
    mode = os.environ.get("WANDB_MODE") or config.mode
    if mode not in WANDB_MODES:
        logger.warning("WANDB_MODE=%s is none of %s; using %s", mode, ", ".join(WANDB_MODES), config.mode)
        mode = config.mode
    if mode in ("auto", "online") and not _has_api_key():
        say = logger.warning if mode == "online" else logger.info
        say("W&B goes offline: no API key (set WANDB_API_KEY, or run wandb login)")
        return "offline"
    return "online" if mode == "auto" else mode


def _has_api_key() -> bool:
    """WANDB_API_KEY，或 netrc 里 W&B 服务器的一条。"""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    places = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in (Path(place).expanduser() for place in places):
        try:
            if path.is_file() and netrc.netrc(path).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue  # 读不懂的 netrc 当作没有密钥，wandb 自己也是如此
    return False
