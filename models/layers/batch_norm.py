"""BatchNorm：几个进程一起训练时，平均与方差是各进程合在一起的小批的，与一个进程走整个小批相同。

PyTorch 自己的 SyncBatchNorm 只在显卡上；这里处理器上也一样。参数、buffer 的名字与 nn.BatchNorm2d 的相同。
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.ranks import mean_of_ranks, several_ranks


class BatchNorm2d(nn.BatchNorm2d):
    """一个进程、评测时就是 nn.BatchNorm2d。各进程的小批同样大小。"""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) → 同形、同精度；统计量在 float32 里算。"""
        if not (self.training and several_ranks()):
            return super().forward(input)
        fields = input.float()
        var, mean = torch.var_mean(fields, (0, 2, 3), correction=0)  # (C,)
        centre = mean_of_ranks(mean)
        var = mean_of_ranks(var + (mean - centre).square())
        self._follow(centre.detach(), var.detach(), torch.distributed.get_world_size() * input.numel() // len(mean))
        scale = self.weight / (var + self.eps).sqrt()
        return torch.addcmul(_to_grid(self.bias), fields - _to_grid(centre), _to_grid(scale)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor, count: int) -> None:
        """滑动平均走一步；方差是无偏的，与 nn.BatchNorm2d 相同。"""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1


def _to_grid(values: Tensor) -> Tensor:
    """(C,) → (C, 1, 1)。"""
    return values[:, None, None]
