"""VAR 的采样：top-k、top-p、抽取与 NumPy 写法相比；Gumbel 软化；引导；缓存；种子；教师强制的输入与采样的相同。"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from models.layers import var_sampling
from models.layers.members import sample_generators
from models.layers.multiscale import MultiScaleQuantizer
from models.layers.var_blocks import ScaleTransformer
from models.layers.var_condition import HistoryCondition, LabelCondition
from models.layers.var_sampling import (
    Sampling,
    draw,
    guided,
    keep_likely,
    sample,
    smooth_codes,
)
from tests.models.layers.numpy_layers import values

SCALES = ((1, 1), (2, 3), (4, 6))
PLAIN = Sampling(cfg=0, top_k=None, top_p=1)
GUIDED = Sampling(cfg=2, top_k=None, top_p=1)


def parts(seed: int = 0) -> tuple[ScaleTransformer, MultiScaleQuantizer, LabelCondition]:
    """权重放大过：各码的概率相差得开。"""
    torch.manual_seed(seed)
    quantizer = MultiScaleQuantizer(12, 4, SCALES, phi=2)
    net = ScaleTransformer(quantizer.lengths, 4, 12, 16, 2, 2)
    label = LabelCondition(3, 16)
    for module in (net, quantizer.codebook, label):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return net.eval(), quantizer.eval(), label.eval()


def made(options: Sampling, seeds: list[int], labels: Tensor | None = None, cached: bool = True) -> Tensor:
    net, quantizer, label = parts()
    labels = torch.arange(len(seeds)) % 3 if labels is None else labels
    generators = [Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad():
        return sample(net, quantizer, label, labels, options, generators, cached)


def likely_by_hand(row: np.ndarray, top_k: int | None, top_p: float) -> np.ndarray:
    """一个 token 的 logits，逐步写开。"""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    kept = order[:top_k]
    chances = np.exp(row[kept] - row[kept].max())
    chances /= chances.sum()
    mass, chosen = 0.0, []
    for index, chance in zip(kept, chances, strict=True):
        chosen.append(index)
        mass += chance
        if mass >= top_p:
            break
    out = np.full_like(row, -np.inf)
    out[chosen] = row[chosen]
    return out


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 1), (3, 1), (None, 0.7), (5, 0.6), (1, 1), (100, 1e-9), (None, 0.99)]
)
def test_likely_codes_are_the_ones_picked_by_hand(top_k: int | None, top_p: float) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 5, 9, dtype=torch.float64)
    logits[0, 0, :] = 1.0  # 全相同：留下头几个
    found = values(keep_likely(logits.clone(), top_k, top_p))
    expected = np.apply_along_axis(likely_by_hand, -1, values(logits), top_k, top_p)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).any(-1).all()


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(1, 2, 5)
    before = logits.clone()
    keep_likely(logits, 2, 0.5)
    assert torch.equal(logits, before)


def test_draw_walks_the_cumulative_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 300, 6)
    logits[..., 0], logits[..., 5] = -torch.inf, -torch.inf  # 两端的码不许抽到
    found = values(draw(logits, [Generator().manual_seed(s) for s in (3, 4)]))
    chances = np.exp(values(logits).astype(np.float64))
    chances /= chances.sum(-1, keepdims=True)
    for n, seed in enumerate((3, 4)):
        uniform = torch.rand(300, 1, generator=Generator().manual_seed(seed)).numpy()[:, 0]
        for token in range(300):
            mass = np.cumsum(chances[n, token])
            assert found[n, token] == min(i for i in range(6) if mass[i] > uniform[token])
    assert set(found.flatten()) == {1, 2, 3, 4}


def test_draw_follows_the_probabilities() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1, 20_000, 3)
    found = draw(logits, [Generator().manual_seed(0)])
    assert found[0].bincount().div(20_000).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)


def test_guidance_formula() -> None:
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert guided(one, other, 0.5).tolist() == pytest.approx([1.5 - 0.25, 3.0 - 1.5])
    assert torch.equal(guided(one, other, 0.0), one)


def test_smooth_codes_are_gumbel_softmax_mixtures() -> None:
    torch.manual_seed(0)
    logits, codes = torch.randn(2, 3, 5), torch.randn(5, 4)
    for ratio, temperature in ((0.0, 0.27), (0.5, 0.27 * (1 - 0.475)), (1.0, 0.27 * 0.05)):
        found = smooth_codes(logits, ratio, codes, [Generator().manual_seed(s) for s in (1, 2)])
        for n, seed in enumerate((1, 2)):
            gumbel = -np.log(torch.empty(3, 5).exponential_(generator=Generator().manual_seed(seed)).numpy())
            score = (values(logits)[n] * (1 + ratio) + gumbel) / temperature
            weights = np.exp(score - score.max(-1, keepdims=True))
            expected = weights / weights.sum(-1, keepdims=True) @ values(codes)
            np.testing.assert_allclose(values(found)[n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [PLAIN, GUIDED, Sampling(cfg=1, top_k=4, top_p=0.9), Sampling(smooth=True)])
def test_cache_changes_nothing(options: Sampling) -> None:
    found = [made(options, [0, 1, 2], cached=cached) for cached in (True, False)]
    assert found[0].shape == (3, 4, 4, 6)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_seeds_make_the_members() -> None:
    """同样的种子同样的样本，不同的种子不同；与旁边有谁无关。"""
    labels = torch.tensor([1, 1, 1])
    found = made(GUIDED, [5, 6, 5], labels)
    assert torch.equal(found[0], found[2]) and not torch.isclose(found[0], found[1]).all()
    torch.testing.assert_close(made(GUIDED, [6], labels[:1])[0], found[1])


def test_no_guidance_is_the_conditional_branch_alone() -> None:
    """强度 0 不算无条件的一支；强度小到舍入看不见，两支都算，结果相同。"""
    tiny = Sampling(cfg=1e-30, top_k=None, top_p=1)
    torch.testing.assert_close(made(PLAIN, [0, 1, 2]), made(tiny, [0, 1, 2]))
    assert not torch.isclose(made(PLAIN, [0, 1, 2]), made(Sampling(cfg=5, top_k=None, top_p=1), [0, 1, 2])).all()


def test_guidance_grows_with_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def noting(one: Tensor, other: Tensor, strength: float) -> Tensor:
        seen.append(strength)
        return guided(one, other, strength)

    monkeypatch.setattr(var_sampling, "guided", noting)
    made(GUIDED, [0])
    assert seen == pytest.approx([0, 1, 2])


def test_the_most_likely_code_alone_needs_no_chance() -> None:
    best = Sampling(cfg=1.5, top_k=1, top_p=1)
    labels = torch.tensor([2])
    assert torch.equal(made(best, [0], labels), made(best, [1], labels))
    assert not torch.isclose(made(GUIDED, [0], labels), made(GUIDED, [1], labels)).all()


def test_teacher_forcing_gives_the_inputs_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """把编号喂给采样器：它逐个尺度造的输入就是训练的输入，末了的 f̂ 就是编号的重建，它的 logits 就是训练的。"""
    net, quantizer, label = parts()
    torch.manual_seed(1)
    indices = [torch.randint(12, (2, n)) for n in quantizer.lengths]
    fed = iter(indices)
    inputs: list[Tensor] = []
    logits: list[Tensor] = []

    def feed(given: Tensor, _generators: Any) -> Tensor:
        logits.append(given)
        return next(fed)

    monkeypatch.setattr(var_sampling, "draw", feed)
    handle = net.embed.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        f_hat = sample(net, quantizer, label, labels, PLAIN, sample_generators(2, None))
        handle.remove()
        forced = quantizer.teacher_inputs(indices)
        assert torch.equal(torch.cat(inputs, 1), forced)
        assert torch.equal(f_hat, quantizer.reconstruct(indices))
        expected = net(label(labels, torch.ones(2, dtype=torch.bool)), forced)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


def test_guidance_takes_both_branches_of_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """四路条件都在：引导拿到的两支，各与教师强制地单独走一遍的相同。"""
    net, quantizer, _ = parts()
    torch.manual_seed(1)
    condition = HistoryCondition(2, (3, 4, 6), SCALES, 16, True, True, True, True)
    for parameter in condition.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    given = torch.randn(2, 2, 3, 4, 6)
    indices = [torch.randint(12, (2, n)) for n in quantizer.lengths]
    fed, branches = iter(indices), []

    def noting(one: Tensor, other: Tensor, strength: float) -> Tensor:
        branches.append((one, other))
        return guided(one, other, strength)

    monkeypatch.setattr(var_sampling, "draw", lambda _logits, _generators: next(fed))
    monkeypatch.setattr(var_sampling, "guided", noting)
    with torch.no_grad():
        sample(net, quantizer, condition, given, GUIDED, sample_generators(2, None))
        forced = quantizer.teacher_inputs(indices)
        for found, keep in zip(zip(*branches, strict=True), (True, False), strict=True):
            expected = net(condition(given, torch.full((2,), keep)), forced)
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_generators_do_not_depend_on_how_many_are_asked_at_once() -> None:
    source, again = Generator().manual_seed(0), Generator().manual_seed(0)
    whole = [g.initial_seed() for g in sample_generators(6, source)]
    pieces = [g.initial_seed() for n in (4, 2) for g in sample_generators(n, again)]
    assert whole == pieces and len(set(whole)) == 6
    given = [Generator() for _ in range(6)]  # 引擎给的，一个样本一个
    assert sample_generators(6, given) is given
    with pytest.raises(AssertionError, match="6 generators for 4 samples"):
        sample_generators(4, given)
