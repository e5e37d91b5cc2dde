"""环境查一遍：`make audit`。不联网。

各包的版本与 requirements-lock-*.txt 的相同；装着的文件与各自 RECORD 里的 sha256 相同（装好之后有没有人改过）；
列出每一个包为什么在：直接要的写在 requirements*.txt，其余的是谁要的。已知漏洞的库在网上，这里查不了。
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from util.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
PINNED = ("requirements.txt", "requirements-dev.txt")
SEPARATE = ("torch",)  # 先单独装：处理器的、各版 CUDA 的轮子不同，校验和也不同；不进锁
OURS = {"pip", "setuptools", "wheel"}  # 造虚拟环境的


def lock_file(version: str) -> Path:
    return ROOT / f"requirements-lock-{version}.txt"


def read_lock(text: str) -> dict[str, tuple[str, list[str]]]:
    """名字 → (版本, 各个 sha256)。"""
    found = {}
    for block in re.split(r"\n(?=\S)", re.sub(r"(?m)^\s*#.*\n", "", text)):
        line, *hashes = re.split(r"\s*\\?\s*--hash=", block.strip())
        if line:
            wanted = Requirement(line)
            (pin,) = wanted.specifier
            found[canonicalize_name(wanted.name)] = (pin.version, [each.split()[0] for each in hashes])
    return found


def requirements(name: str) -> dict[str, tuple[Requirement, str]]:
    """requirements 文件里在这个 Python 上要的：名字 → (写的, 后面的话)。"""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        written, _, why = line.partition("#")
        if written.strip():
            wanted = Requirement(written)
            if wanted.marker is None or wanted.marker.evaluate():
                found[canonicalize_name(wanted.name)] = (wanted, why.strip())
    return found


def needed_by(installed: Mapping[Any, Distribution]) -> dict[str, list[str]]:
    """包 → 谁要它（在这台机器上，不算 extra）。"""
    found: dict[str, list[str]] = {}
    for name, one in installed.items():
        for text in one.requires or ():
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                found.setdefault(canonicalize_name(wanted.name), []).append(name)
    return found


def changed_files(one: Distribution) -> list[str]:
    """与 RECORD 不同的、不在了的文件；没有写校验和的（RECORD 自己、.pyc）不算。"""
    found = []
    for file in one.files or ():
        if file.hash is None:
            continue
        path = Path(str(file.locate()))
        digest = hashlib.new(file.hash.mode, path.read_bytes()).digest() if path.is_file() else b""
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            found.append(str(file))
    return found


def differences(installed: Mapping[Any, str], locked: Mapping[str, tuple[str, list[str]]]) -> Iterable[str]:
    """装着的与锁里的不同之处；torch 的 +cpu 之类不算。"""
    for name, version in installed.items():
        if name in OURS or name in SEPARATE:
            continue
        if name not in locked:
            yield f"{name} {version} is installed, the lock does not have it"
        elif locked[name][0] != version:
            yield f"{name} {version} is installed, the lock has {locked[name][0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the environment with the lock and with what was installed.")
    parser.add_argument("--list", action="store_true", help="also list every package and why it is there")
    args = parser.parse_args()
    lock = lock_file(f"{sys.version_info.major}.{sys.version_info.minor}")
    installed = {canonicalize_name(one.metadata["Name"]): one for one in distributions()}
    versions = {name: one.version for name, one in installed.items()}
    problems = list(differences(versions, read_lock(lock.read_text(encoding="utf-8"))))
    for name, one in sorted(installed.items()):
        if wrong := changed_files(one):
            problems.append(f"{name} {one.version}: {len(wrong)} files are not what was installed, first {wrong[0]}")
    if args.list:
        direct, others = {k: v for name in PINNED for k, v in requirements(name).items()}, needed_by(installed)
        rows = []
        for name in sorted(installed):
            why = "asked for" + (f": {direct[name][1]}" if direct[name][1] else "") if name in direct else ""
            rows.append((name, versions[name], why or "by " + ", ".join(sorted(others.get(name, ["nothing"])))))
        print(*(f"{name} {version}  {why}" for name, version, why in rows), sep="\n")
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{len(installed)} packages looked at beside {lock.name}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    run_command(main)
