"""乱改的字节：`python -m tests.fuzz npy --minutes 10`，由 atheris（libFuzzer）照着走到的代码改 fuzz_targets.py 的例子。

走到新地方的留在 tmp/fuzz-TARGET/corpus/，下一次从那里接着；弄坏的那一份是 tmp/fuzz-TARGET/crash-…，退出码 77。
久测里各十分钟（test_fuzz.py）；套件里另有 hypothesis 改的，不要 atheris。
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from util.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("npy", "yaml", "checkpoint", "time")  # fuzz_targets 要在 atheris 之后引入


def fuzz(name: str, seconds: float, seed: int) -> None:
    """不返回：libFuzzer 自己结束进程。"""
    import atheris

    with atheris.instrument_imports(include=["util"]):  # pyright: ignore[reportAttributeAccessIssue]  包里没有写类型
        from tests.fuzz_targets import LONGEST, TARGETS, WORDS, verdict

    logging.getLogger("ar_pred").setLevel(logging.ERROR)
    target, folder = TARGETS[name], ROOT / "tmp" / f"fuzz-{name}"
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in words), encoding="ascii")

    def one(content: bytes) -> None:
        problem = verdict(target.read, content, folder / "x")
        assert problem is None, problem

    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={LONGEST}", f"-dict={folder}/words"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description="Feed changed bytes to a reader, guided by the code they reach.")
    parser.add_argument("target", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    fuzz(args.target, 60 * args.minutes, args.seed)
    return 0


if __name__ == "__main__":
    run_command(main)
