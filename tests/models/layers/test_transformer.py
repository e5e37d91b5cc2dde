"""标准的块等于 torch.nn 的同名层；位置编码等于写开的公式。"""

from __future__ import annotations

import math

import pytest
import torch

from models.layers.transformer import DecoderLayer, EncoderLayer, sinusoid
from tests.models.layers.torch_layers import randomize, torch_decoder, torch_encoder


@pytest.mark.parametrize("heads", [1, 3])
def test_encoder_layer_equals_torch(heads: int) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(12, heads, 20, 0.0).double()
    randomize(layer)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch_encoder(layer)(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_decoder_layer_equals_torch(heads: int) -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(12, heads, 20, 0.0).double()
    randomize(layer)
    query, memory = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(query, memory), torch_decoder(layer)(query, memory), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 7, 8])
def test_sinusoid_is_the_formula_and_does_not_depend_on_the_length(dim: int) -> None:
    codes = sinusoid(20, dim)
    for t in range(20):
        for i in range(dim):
            angle = t / 10_000 ** ((i - i % 2) / dim)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert codes[t, i].item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(sinusoid(12, dim), codes[:12])
    assert codes.unique(dim=0).shape[0] == 20


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    encoder, decoder = EncoderLayer(8, 2, 16, 0.5), DecoderLayer(8, 2, 16, 0.5)
    x = torch.randn(1, 5, 8)
    assert not torch.equal(encoder(x), encoder(x)) and not torch.equal(decoder(x, x), decoder(x, x))
    encoder.eval()
    decoder.eval()
    assert torch.equal(encoder(x), encoder(x)) and torch.equal(decoder(x, x), decoder(x, x))
