"""场的缓冲区。"""

from __future__ import annotations

import pytest
import torch

from util.batch import empty_fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_is_used_again_once_nothing_looks_at_it(dtype: torch.dtype) -> None:
    shape = (3, 5)
    first = empty_fields(shape, dtype)
    place, view = first.data_ptr(), first[:, :2]
    del first
    second = empty_fields(shape, dtype)
    assert second.data_ptr() != place  # 一角还看着它
    seen = view.numpy() if dtype == torch.float32 else view.view(torch.uint16).numpy()
    del view, second
    assert empty_fields(shape, dtype).data_ptr() != place  # numpy 的也算
    del seen
    assert place in {empty_fields(shape, dtype).data_ptr() for _ in range(3)}
    held = [empty_fields(shape, dtype) for _ in range(5)]
    assert len({one.data_ptr() for one in held}) == 5
    assert empty_fields((5, 3), dtype).shape == (5, 3)
