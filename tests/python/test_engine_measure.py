"""What a policy is told of q and k at an Update, and the self-similarity guard through the engine."""

from __future__ import annotations

import pytest
import reference
import torch
from flux_models import draw, tiny_pipeline

import flashomni
from flashomni import Config, SparseSymbols, ops
from flashomni.engine.measure import Measures
from flashomni.policies import DensePolicy

CONFIG = Config(
    cache_interval=3, disable_cache_before_step=2, block_q=128, block_kv=64, tau_kv=0.6, tau_q=0.3
)


class Spy(DensePolicy):
    needs = frozenset({"q_mean", "k_mean", "k_similarity"})

    def __init__(self) -> None:
        self.attended, self.seen = None, []

    def select(self, step, layout, stats, state, choice) -> None:
        super().select(step, layout, stats, state, choice)
        self.seen.append((stats, self.attended))


@pytest.mark.parametrize("text", [128, 16], ids=["whole blocks", "a block of two streams"])
def test_stats_are_of_what_attention_sees(monkeypatch, text: int) -> None:
    """Where a stream is whole blocks its norm measures it; else the joint sequence is read once more."""
    pipe, spy = tiny_pipeline(), Spy()
    flashomni.enable(pipe, CONFIG, policy=spy)
    separate = []
    attention, mean = ops.sparse_attention, ops.block_mean

    def watch(q, k, *args, **kwargs):
        spy.attended = q.clone(), k.clone()
        return attention(q, k, *args, **kwargs)

    monkeypatch.setattr(ops, "sparse_attention", watch)
    monkeypatch.setattr(ops, "block_mean", lambda *args: (separate.append(1), mean(*args))[1])
    draw(pipe, text=text)
    layers = flashomni.stats(pipe).steps["update"] * 3
    assert len(spy.seen) == layers
    for stats, (q, k) in spy.seen:
        for got, x, block in ((stats.q_mean, q, 128), (stats.k_mean, k, 64)):
            reference.assert_close(got[0], reference.block_mean(x[0], block), torch.float32)
        reference.assert_close(stats.k_similarity[0], reference.self_similarity(k[0], 64), torch.float32)
    # One block in three of the model keeps text and image apart; q and k.
    assert len(separate) == (0 if text == 128 else 2 * layers // 3)


@pytest.mark.parametrize("rope", [False, True])
def test_norms_over_all_heads_come_before_the_means(rope: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 200, 3, 64), torch.randn(2, 200, 3, 64)
    norms = [torch.nn.RMSNorm(192, eps=1e-3).requires_grad_(False) for _ in "qk"]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    tables = (torch.randn(200, 64), torch.randn(200, 64)) if rope else None
    wanted = [
        torch.stack(
            [
                reference.norm_rope(one, norm.weight, *(tables or (None, None)), None, 1e-3, 128, 0)
                for one in x
            ]
        )
        for x, norm in zip((q, k), norms, strict=True)
    ]
    measures = Measures(frozenset({"q_mean"}), q, k, SparseSymbols.ones(2, 3, 200, 200, 128, 64))
    measures.norm_and_rope(tuple(norms), 0, 200, tables, across_heads=True)
    for got, want in zip((q, k), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)
    means = torch.stack([reference.block_mean(x, 128) for x in q])
    reference.assert_close(measures.stats().q_mean, means, torch.float32)


def test_only_what_is_needed_is_measured() -> None:
    pipe, spy = tiny_pipeline(), Spy()
    spy.needs = frozenset({"k_similarity"})
    flashomni.enable(pipe, CONFIG, policy=spy)
    draw(pipe)
    stats, _ = spy.seen[0]
    assert stats.q_mean is None and stats.k_mean is None and stats.k_similarity.shape == (1, 6, 2)


def test_the_guard_keeps_blocks() -> None:
    densities = {}
    for threshold in (0.0, 0.2, 1.0):
        pipe = tiny_pipeline()
        flashomni.enable(pipe, Config(**(CONFIG.__dict__ | {"self_similarity": threshold, "tau_q": 0.0})))
        draw(pipe)
        densities[threshold] = flashomni.stats(pipe).density
    assert densities[1.0] == 1.0 and densities[0.0] < densities[1.0]
    assert densities[0.0] <= densities[0.2] <= densities[1.0]
