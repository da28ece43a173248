"""Policies: their names, what they may decide, and what protects text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flashomni import Config, SparseSymbols, ops, policies
from flashomni.policies import (
    Choice,
    DensePolicy,
    FlashOmniPolicy,
    Layout,
    Policy,
    RandomPolicy,
    Segment,
    Stats,
    Step,
)


def layout(text: int = 77, tokens: int = 400, batch: int = 2, block: int = 64) -> Layout:
    segments = (Segment("text", 0, text), Segment("image", text, tokens - text))
    return Layout(batch, 3, 64, tokens, segments, block_q=block, block_kv=block)


def choice(where: Layout) -> Choice:
    return Choice(
        SparseSymbols.zeros(
            where.batch, where.heads, where.tokens, where.tokens, where.block_q, where.block_kv
        )
    )


def step(index: int = 3, context: object = "cond", layer: int = 1, ramp: float = 1.0) -> Step:
    return Step(index, 10, ramp, context, layer, 5)


def test_text_blocks_hold_any_text_token():
    assert layout(77).text_blocks(64) == slice(0, 2)
    assert layout(64).text_blocks(64) == slice(0, 1)
    last = Layout(1, 1, 64, 400, (Segment("image", 0, 300), Segment("text", 300, 100)))
    assert last.text_blocks(128) == slice(2, 4)
    none = Layout(1, 1, 64, 400, (Segment("image", 0, 400),))
    assert none.text_blocks(128) == slice(0, 0)


def test_dense_sets_every_bit():
    made = choice(layout())
    DensePolicy().select(step(), layout(), Stats(), {}, made)
    assert all(mask.all() for mask in made.symbols.masks())


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_random_is_repeatable_and_protects_text(density):
    where = layout()
    made = [choice(where) for _ in range(3)]
    policy = RandomPolicy(density, density, seed=3)
    policy.select(step(), where, Stats(), {}, made[0])
    policy.select(step(), where, Stats(), {}, made[1])
    policy.select(step(layer=2), where, Stats(), {}, made[2])
    (cache, skip), again, other = (m.symbols.masks() for m in made)
    assert torch.equal(cache, again[0]) and torch.equal(skip, again[1])
    if 0 < density < 1:
        assert not torch.equal(skip, other[1])
    assert cache[:, :, :2].all() and skip[:, :, :2].all() and skip[:, :, :, :2].all()
    assert abs(cache[:, :, 2:].float().mean() - density) < 0.2
    assert abs(skip[:, :, 2:, 2:].float().mean() - density) < 0.1


def test_a_row_keeps_a_block_where_there_is_no_text():
    where = Layout(1, 2, 64, 400, (Segment("image", 0, 400),), 64, 64)
    made = choice(where)
    RandomPolicy(1.0, 0.0).select(step(), where, Stats(), {}, made)
    assert (made.symbols.masks()[1].sum(-1) == 1).all()


def test_the_paper_s_policy_scales_its_thresholds_with_the_ramp(monkeypatch):
    seen = {}
    monkeypatch.setattr(ops, "select_flashomni", lambda *args, **kwargs: seen.update(kwargs))
    FlashOmniPolicy(0.5, 0.2, 0.3).select(step(ramp=0.25), layout(), Stats(), {}, choice(layout()))
    text = {"text_start": 0, "text_length": 77, "k_similarity": None, "self_similarity": 0.0}
    assert seen == text | {"tau_q": 0.125, "tau_kv": 0.05, "s_q": 0.3, "ramp": None}
    ramp = torch.tensor([0.25])  # where a GPU reads it: the thresholds go as they are
    there = dataclasses.replace(step(ramp=0.25), ramp_on_device=ramp)
    FlashOmniPolicy(0.5, 0.2, 0.3).select(there, layout(), Stats(), {}, choice(layout()))
    assert seen == text | {"tau_q": 0.5, "tau_kv": 0.2, "s_q": 0.3, "ramp": ramp}


def test_the_paper_s_policy_never_caches_text_and_caches_more_at_larger_thresholds():
    torch.manual_seed(0)
    where = layout()
    means = Stats(*(2 * torch.randn(2, 7, 3, 64) for _ in range(2)))
    shares = []
    for tau in (0.1, 0.4, 0.8):
        made = choice(where)
        FlashOmniPolicy(tau, tau).select(step(), where, means, {}, made)
        cache, skip = made.symbols.masks()
        assert cache[:, :, :2].all() and skip[:, :, :2].all()
        assert skip[cache][..., :2].all()
        shares.append(made.symbols.density())
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_names():
    assert {"flashomni", "dense", "random"} <= set(policies.policy_names())
    made = policies.make_policy("flashomni", Config(tau_q=0.25, tau_kv=0.125, s_q=0.5))
    assert (made.tau_q, made.tau_kv, made.s_q) == (0.25, 0.125, 0.5)
    with pytest.raises(ValueError, match="policy: expected one of dense, drift, flashomni"):
        policies.make_policy("no such policy", Config())


def test_registering(monkeypatch):
    monkeypatch.setattr(policies.registry, "_FACTORIES", dict(policies.registry._FACTORIES))

    def factory(config):
        return RandomPolicy(config.tau_q)

    policies.register_policy("mine", factory)
    assert policies.make_policy("mine", Config(tau_q=0.75)).cache_density == 0.75
    with pytest.raises(ValueError, match="'mine', which is registered"):
        policies.register_policy("mine", lambda config: DensePolicy())
    with pytest.raises(TypeError, match="factory: expected a callable"):
        policies.register_policy("other", None)
    with pytest.raises(ValueError, match="name: expected a non-empty string"):
        policies.register_policy("", factory)


def test_entry_points(monkeypatch):
    class Entry:
        name = "from a package"

        @staticmethod
        def load():
            return lambda config: DensePolicy()

    monkeypatch.setattr(policies.registry, "entry_points", lambda group: [Entry])
    assert "from a package" in policies.policy_names()
    assert isinstance(policies.make_policy("from a package", Config()), DensePolicy)


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="policy: expected an object with a select"):
        policies.check_policy(object())

    class Greedy(Policy):
        needs = frozenset({"v_sum"})

    with pytest.raises(ValueError, match="v_sum"):
        policies.check_policy(Greedy())
    with pytest.raises(ValueError, match="cache_density: expected a number in"):
        RandomPolicy(cache_density=1.5)
