"""同时活着的张量：假的张量（只有形状、类型）走过一步，数着哪些存储还有人用；不分配，也不计算。"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["parameters", "gradients", "optimizer", "average", "activations", "batch", "temporary"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGE = 32 * 2**20  # 字节；glibc 从这里起总是向系统单要一块，还了就还了，不留下空隙


@dataclass
class Storage:
    """一块存储：几字节，拿来做什么。"""

    size: int
    kind: Kind


class LiveTensors(TorchDispatchMode):
    """`with FakeTensorMode(), LiveTensors() as live:`；一块存储只数一次，视图不另数，没有人用了就减去。

    peak: reset 以来最满的一刻，(拿来做什么, 是不是 LARGE 以上) → 字节。
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakKeyDictionary[torch.UntypedStorage, Storage] = weakref.WeakKeyDictionary()
        self.sizes: Counter[tuple[Kind, bool]] = Counter()
        self.peak: Counter[tuple[Kind, bool]] = Counter()
        self.most = 0

    def reset(self) -> None:
        """从这里起重新找最满的一刻。"""
        self.most, self.peak = self.sizes.total(), self.sizes.copy()

    def mark(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """说明它们拿来做什么；没有说过的是 temporary。"""
        for tensor in tensors:
            self._rename(self._storage(tensor), kind)

    def saved(self, tensor: Tensor) -> Tensor:
        """给 saved_tensors_hooks：反向要用的；参数、输入本来就在，不改说法。"""
        self._keep(self._storage(tensor))
        return tensor

    def forward_done(self) -> None:
        """前向走完了还活着的都是反向要用的：丢弃激活的块自己留着输入，不经过 saved。"""
        for storage in list(self.storages.values()):
            self._keep(storage)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return _unknown(args[0].dtype)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._storage(leaf)
        return out

    def _storage(self, tensor: Tensor) -> Storage:
        key = tensor.untyped_storage()
        if key not in self.storages:
            self.storages[key] = storage = Storage(key.nbytes(), "temporary")
            weakref.finalize(key, self._count, storage, -1)
            self._count(storage, 1)
            total = self.sizes.total()
            if total > self.most:
                self.most, self.peak = total, self.sizes.copy()
        return self.storages[key]

    def _keep(self, storage: Storage) -> None:
        if storage.kind == "temporary":
            self._rename(storage, "activations")

    def _rename(self, storage: Storage, kind: Kind) -> None:
        self._count(storage, -1)
        storage.kind = kind
        self._count(storage, 1)

    def _count(self, storage: Storage, sign: int) -> None:
        self.sizes[storage.kind, storage.size >= LARGE] += sign * storage.size


def _unknown(dtype: torch.dtype) -> bool | int | float:
    """没有算，值不知道：等某个条件不再成立的循环（截断正态的重抽）就此结束，概率取在当中。"""
    if dtype == torch.bool:
        return False
    return 0.5 if dtype.is_floating_point else 1
