"""The engine computes the method: against a slow float64 implementation, over whole runs of FLUX."""

from __future__ import annotations

import pytest
import torch
from flux_models import double, error, passes, tiny_transformer
from slow_method import RecordingPolicy, SlowRun, step_kind

import flashomni
from flashomni import Config
from flashomni.policies import FlashOmniPolicy, Policy, RandomPolicy

# float32 against float64: products of length up to 640 over 3 layers and 10 steps. Rounding gives about 1e-6;
# what the sparsity changes is above 1e-2 (asserted).
TOLERANCE = 1e-5


class ReuseSomeLayers(Policy):
    """Random symbols, but S_c all zero in the layers given."""

    def __init__(self, layers: set[int]):
        self.layers, self.random = layers, RandomPolicy(0.5, 0.5, seed=5)

    def select(self, step, layout, stats, state, choice) -> None:
        self.random.select(step, layout, stats, state, choice)
        if step.layer in self.layers:
            choice.symbols.cache.zero_()


def compare(config: Config, policy: Policy, steps: int, text: int, batch: int) -> flashomni.engine.RunStats:
    model = tiny_transformer()
    dense = passes(model, steps, text, batch)
    reference = double(model)
    recording = RecordingPolicy(policy)
    engine = flashomni.enable(model, config, policy=recording)
    engine.begin(steps)
    got = passes(model, steps, text, batch, engine.step)
    stats = flashomni.stats(model)
    slow = SlowRun(reference, recording, config, steps)
    want = passes(reference, steps, text, batch, slow.next)
    kinds = [
        step_kind(i, steps, config.cache_interval, config.disable_cache_before_step, config.cooldown_steps)[0]
        for i in range(steps)
    ]
    assert stats.step_kinds == kinds
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < TOLERANCE, f"step {i} ({kinds[i]})"
    changed = [error(b, c) for b, c, kind in zip(want, dense, kinds, strict=True) if kind == "dispatch"]
    assert max(changed) > 1e-2, "the symbols change nothing: the comparison would show nothing"
    return stats


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (64, 64)])
def test_runs_of_every_order_and_block_size(order, blocks):
    config = Config(
        cache_interval=3,
        max_order=order,
        disable_cache_before_step=2,
        block_q=blocks[0],
        block_kv=blocks[1],
    )
    stats = compare(config, RandomPolicy(0.4, 0.5, seed=order), steps=10, text=77, batch=1)
    assert stats.steps == {"full": 4, "update": 2, "dispatch": 4}


@pytest.mark.parametrize("text", [16, 226, 512])
def test_text_of_any_length(text):
    config = Config(cache_interval=3, disable_cache_before_step=1, block_q=64, block_kv=64)
    compare(config, RandomPolicy(0.4, 0.5), steps=6, text=text, batch=1)


def test_batches():
    config = Config(cache_interval=4, disable_cache_before_step=1, block_q=64, block_kv=64, max_order=2)
    compare(config, RandomPolicy(0.4, 0.5), steps=10, text=77, batch=2)


def test_the_paper_s_policy():
    config = Config(cache_interval=3, disable_cache_before_step=2, block_q=64, block_kv=64)
    stats = compare(config, FlashOmniPolicy(0.6, 0.3), steps=9, text=77, batch=2)
    assert 0.2 < stats.density < 0.95


@pytest.mark.parametrize("layers", [{0}, {1}, {0, 1, 2}])
def test_layers_that_reuse_everything_do_so_at_order_zero(layers):
    config = Config(cache_interval=4, disable_cache_before_step=2, block_q=64, block_kv=64, max_order=2)
    compare(config, ReuseSomeLayers(layers), steps=9, text=77, batch=1)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("block", [64, 128])
def test_mlps_that_follow(order, block):
    """Behind the attention (double blocks) and beside it (single blocks); heads cached together and apart."""
    config = Config(
        cache_interval=3,
        max_order=order,
        disable_cache_before_step=2,
        block_q=block,
        block_kv=64,
        mlp="follow",
    )
    compare(config, RandomPolicy(0.6, 0.5, seed=order), steps=10, text=77, batch=2)


@pytest.mark.parametrize("layers", [{1}, {0, 1, 2}])
def test_mlps_that_follow_layers_that_are_reused_whole(layers):
    config = Config(
        cache_interval=4,
        disable_cache_before_step=2,
        block_q=64,
        block_kv=64,
        max_order=2,
        mlp="follow",
    )
    compare(config, ReuseSomeLayers(layers), steps=9, text=77, batch=1)


def test_no_warmup_and_no_cooldown():
    config = Config(cache_interval=4, disable_cache_before_step=0, cooldown_steps=0, block_q=64, block_kv=64)
    compare(config, RandomPolicy(0.4, 0.5), steps=8, text=16, batch=1)


@pytest.mark.parametrize("order", [0, 1])
def test_linears_that_are_no_plain_linears_are_called_and_o_is_forecast(order):
    class Wrapped(torch.nn.Linear):
        """Stands for LoRA and quantised layers."""

    model = tiny_transformer()
    config = Config(cache_interval=3, disable_cache_before_step=2, block_q=64, block_kv=64, max_order=order)
    recording = RecordingPolicy(RandomPolicy(0.4, 0.5))
    reference = double(model)
    for block in model.single_transformer_blocks:
        block.proj_out.__class__ = Wrapped
    attention = model.transformer_blocks[0].attn
    for module in (attention.to_q, attention.to_add_out, attention.add_k_proj):
        module.__class__ = Wrapped
    text = str(flashomni.explain(model, config))
    assert "to_q is Wrapped, not torch.nn.Linear: called as a module" in text
    assert "O is forecast instead of its projection" in text
    engine = flashomni.enable(model, config, policy=recording)
    engine.begin(9)
    got = passes(model, 9, 77, 1, engine.step)
    slow = SlowRun(reference, recording, config, 9)
    want = passes(reference, 9, 77, 1, slow.next)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < TOLERANCE
