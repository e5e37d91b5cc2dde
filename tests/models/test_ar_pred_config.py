"""AR_pred 写错的配置：一行说清键、值和规矩。"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.small import small_spec, tiny_model

TUBES = {"order": "h w t", "size": 4}  # 每个地方四个时刻是一个区块


def test_the_requirements_own_spelling_of_mask_ratio() -> None:
    assert tiny_model(small_spec(), mask_radio=0.25).config.mask_ratio == 0.25
    assert tiny_model(small_spec()).config.mask_ratio == 0.8
    with pytest.raises(ValueError, match="two spellings of one key"):
        tiny_model(small_spec(), mask_radio=0.25, mask_ratio=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "model.heads = 3: does not divide model.dim = 16; heads that work: [1, 2, 4, 8]"),
        ({"dim": 20, "heads": 12}, "model.heads = 12: does not divide model.dim = 20"),
        ({"decoder_heads": 3}, "model.decoder_heads = 3: does not divide model.decoder_width = 8"),
        ({"mask_ratio": 1.5}, "model.mask_ratio = 1.5: input should be less than or equal to 1"),
        ({"mask_radio": -0.1}, "model.mask_ratio = -0.1: input should be greater than or equal to 0"),
        (
            {"token_size": [3, 4]},
            "[3, 4] does not divide the grid 8 x 16 in latitude: 8 / 3; sizes that work there: [1,",
        ),
        ({"token_size": [4, 5]}, "8 x 16 in longitude: 16 / 5; sizes that work there: [1, 2, 4, 8, 16]"),
        ({"grouping": {"order": "t h"}}, "model.grouping.order = 't h': must name t, h and w once each"),
        ({"grouping": {"size": 0}}, "model.grouping.size = 0: must be frame or a positive number of tokens"),
        (
            {"grouping": {"size": 5}},
            "32 tokens do not split into two or more groups of 5; sizes that work: [1, 2, 4, 8",
        ),
        ({"grouping": {"size": 32}}, "do not split into two or more groups of 32"),
        ({"predict": "tendency", "grouping": TUBES}, "tendency needs one group per frame"),
        ({"attention": "flex"}, "needs groups of a multiple of 128 tokens (found 8), heads >= 16 wide (found 8)"),
        ({"mask_rati": 0.5}, "unknown key model.mask_rati = 0.5; nearest: model.mask_ratio"),
    ],
)
def test_a_wrong_setting_is_named_with_its_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  下一行逐字比对
        tiny_model(small_spec(), **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_more_than_one_frame_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match="data.frames_out = 2, must be 1"):
        tiny_model(small_spec(frames_out=2))


def test_flex_is_never_chosen_where_it_cannot_run() -> None:
    """CUDA 核要求每头至少 16 宽；auto 退回 sdpa，缩小的配置（--smoke）才不会在显卡上停下。"""
    spec, cuda = small_spec(channels=1), torch.device("cuda")
    sizes: list[dict[str, Any]] = [{}, {"dim": 32}, {"dim": 32, "dropout": 0.1}, {"dim": 32, "token_size": [2, 2]}]
    chosen = [tiny_model(spec, **{"token_size": [1, 1], **options})._use_flex(cuda) for options in sizes]
    assert chosen == [False, True, False, False]
    assert not tiny_model(spec, token_size=[1, 1], dim=32)._use_flex(torch.device("cpu"))
