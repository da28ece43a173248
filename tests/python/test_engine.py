"""The engine without a model: forecasts, what a Dispatch leaves out, the clock, memory and statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashomni import Config, ops
from flashomni.engine import Attention, Engine, Output, Stream
from flashomni.engine.buffers import Buffers
from flashomni.policies import DensePolicy, Policy, RandomPolicy, Segment

HEADS, HEAD_DIM, TEXT, TOKENS = 2, 64, 30, 300
WIDTH = HEADS * HEAD_DIM


class ReuseEverything(Policy):
    def select(self, step, layout, stats, state, choice) -> None:
        choice.symbols.cache.zero_()


class Toy:
    """One attention layer over a joint sequence of text and image, with one output projection."""

    def __init__(self, config: Config, policy: Policy, layers: int = 1, dtype: torch.dtype = torch.float32):
        self.engine = Engine(config, layers, policy)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH).to(dtype) for _ in range(4))
        self.layers = layers

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        self.engine.start_pass()
        for layer in range(self.layers):
            attention = Attention(
                layer=layer,
                heads=HEADS,
                head_dim=HEAD_DIM,
                text=Segment("text", 0, TEXT),
                streams=[Stream(x, 0, self.q, self.k, self.v)],
                outputs=[Output(self.out, 0, x.shape[1])],
                o=self.engine.buffers.take("o", tuple(x.shape), x),
            )
            (y,) = self.engine.attend(attention)
        self.engine.end_pass(True)
        return y

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).flatten(2))

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.engine.begin(len(inputs))
        outputs = []
        for x in inputs:
            outputs.append(self.attend(x))
            self.engine.step()
        return outputs


def config(**changes) -> Config:
    settings = {
        "cache_interval": 4,
        "disable_cache_before_step": 2,
        "cooldown_steps": 0,
        "block_q": 64,
        "block_kv": 64,
        "max_order": 1,
    }
    return Config(**(settings | changes))


def inputs(steps: int, batch: int = 1, tokens: int = TOKENS) -> list[torch.Tensor]:
    return list(torch.randn(steps, batch, tokens, WIDTH))


def linear_feature(order: int) -> tuple[Toy, torch.Tensor, torch.Tensor]:
    """(toy, a, b): q and k read columns of x = a + b s in which b is 0, so that O is linear in s."""
    toy = Toy(config(max_order=order), RandomPolicy(0.0, 1.0))
    toy.q.weight[:, 64:] = 0
    toy.k.weight[:, 64:] = 0
    a, b = torch.randn(2, 1, TOKENS, WIDTH)
    b = b + 1  # a mean over keys does not make it small
    b[..., :64] = 0
    return toy, a, b


@pytest.mark.parametrize(("order", "power"), [(1, 1), (2, 1), (2, 0), (0, 0)])
def test_a_feature_linear_in_t_is_forecast_exactly(order, power):
    """O(t) = a + b t^power, all image tiles cached: from order `power` on, Dispatch equals dense."""
    toy, a, b = linear_feature(order)
    steps = [a + b * t**power for t in range(10)]
    for t, (x, got) in enumerate(zip(steps, toy.run(steps), strict=True)):
        # Differences of order 2 of rounded numbers are not 0, and are multiplied by k^2 / 2 <= 4.5.
        torch.testing.assert_close(
            got, toy.dense(x), rtol=1e-5, atol=2e-5, msg=lambda m, t=t: f"step {t}: {m}"
        )


def test_plain_reuse_of_a_linear_feature_is_off():
    """The test above could fail: with D = 0 the same feature is not what dense gives."""
    toy, a, b = linear_feature(0)
    steps = [a + b * t for t in range(6)]
    outputs = toy.run(steps)
    assert (outputs[3] - toy.dense(steps[3])).abs().max() > 0.1
    image = slice(128, None)  # past the blocks that hold text
    torch.testing.assert_close(outputs[3][:, image], outputs[2][:, image], rtol=1e-5, atol=1e-6)


def test_a_layer_that_reuses_everything_computes_nothing(monkeypatch):
    toy = Toy(config(), ReuseEverything())
    steps = inputs(6)
    toy.engine.begin(6)
    outputs = []
    for t, x in enumerate(steps):
        if toy.engine.plan.kind == "dispatch":
            for name in ("gemm_q", "sparse_attention", "norm_rope"):
                monkeypatch.setattr(ops, name, lambda *a, n=name, **k: pytest.fail(f"{n} in a reused layer"))
        outputs.append(toy.attend(x))
        toy.engine.step()
        assert toy.engine.contexts.get(0, 0).reuse_all == (t >= 2)
    for t in (3, 4, 5):
        torch.testing.assert_close(outputs[t], outputs[2], rtol=1e-6, atol=1e-6)


def test_dispatch_passes_the_symbols_to_every_operator(monkeypatch):
    toy = Toy(config(), RandomPolicy(0.5, 0.5))
    symbols = []
    for name in ("gemm_q", "sparse_attention"):
        original = getattr(ops, name)

        def spy(*args, original=original, name=name, **kwargs):
            given = args[3] if len(args) > 3 else None
            symbols.append((toy.engine.plan.kind, name, given is not None))
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    toy.run(inputs(4))
    assert [s for s in symbols if s[0] == "dispatch"] == [
        ("dispatch", "gemm_q", True),  # q
        ("dispatch", "gemm_q", False),  # k and v: text rows look at every key
        ("dispatch", "gemm_q", False),
        ("dispatch", "sparse_attention", True),
    ]
    assert not any(given for kind, _, given in symbols if kind != "dispatch")


def test_dispatch_ignores_what_cached_tiles_hold():
    """Scratch buffers poisoned with NaN before every Dispatch: none of it reaches the output."""
    toy = Toy(config(max_order=2), RandomPolicy(0.3, 0.5))
    toy.engine.begin(6)
    for x in inputs(6):
        if toy.engine.plan.kind == "dispatch":
            for tensor in toy.engine.buffers.tensors():
                tensor.fill_(float("nan"))
        assert toy.attend(x).isfinite().all()
        toy.engine.step()


def test_dense_symbols_give_the_dense_result():
    toy = Toy(config(max_order=2), DensePolicy())
    steps = inputs(7, batch=2)
    for x, got in zip(steps, toy.run(steps), strict=True):
        torch.testing.assert_close(got, toy.dense(x), rtol=1e-5, atol=1e-5)


def test_dense_layers_stay_dense():
    toy = Toy(config(dense_layers=(0,)), RandomPolicy(0.0, 0.0))
    steps = inputs(5)
    for x, got in zip(steps, toy.run(steps), strict=True):
        torch.testing.assert_close(got, toy.dense(x), rtol=1e-5, atol=1e-5)
    stats = toy.engine.run_stats()
    assert stats.density == 1.0 and stats.bytes_held["cached"] == 0 and stats.bytes_held["history"] == 0


def test_passes_of_one_name_in_one_step_are_kept_apart():
    toy = Toy(config(), RandomPolicy(0.5, 0.5))
    engine = toy.engine
    engine.begin(2)
    for _ in range(2):
        names = []
        for name in ("window", "window", "other"):
            engine.start_pass(name)
            names.append(engine.context)
            engine.end_pass(True)
        assert names == ["window", ("window", 1), "other"]
        engine.step()
    engine.begin(1)
    for completed in (False, True):
        engine.start_pass("window")
        engine.end_pass(completed)
        assert engine.context == "window"


def test_a_context_that_was_not_there_at_the_update_runs_dense_until_the_next():
    toy = Toy(config(), RandomPolicy(0.0, 0.5))
    toy.engine.begin(7)
    for t, x in enumerate(inputs(7)):
        toy.attend(x)
        if t >= 4:
            y = toy.attend(x)  # a second pass in the step: guidance that begins late
            if t < 6:
                assert toy.engine.plan.kind == "dispatch"
                torch.testing.assert_close(y, toy.dense(x), rtol=1e-5, atol=1e-5)
        toy.engine.step()
    assert toy.engine.run_stats().notes == {"dispatch without an update: dense": 2}


def test_a_pass_that_failed_can_be_tried_again():
    toy = Toy(config(), RandomPolicy(0.0, 0.5))
    toy.engine.begin(6)
    outputs = []
    for t, x in enumerate(inputs(6)):
        if t in (1, 2, 3):
            toy.attend(x)
            toy.engine.end_pass(False)  # once more, in the same context
        outputs.append(toy.attend(x))
        assert toy.engine.context == 0
        toy.engine.step()
    assert all(y.isfinite().all() for y in outputs)


def test_the_clock_must_be_started_and_ends():
    toy = Toy(config(), DensePolicy())
    with pytest.raises(RuntimeError, match="no run has begun"):
        toy.attend(inputs(1)[0])
    toy.run(inputs(3))
    with pytest.raises(RuntimeError, match="the run of 3 steps is over"):
        toy.attend(inputs(1)[0])
    with pytest.raises(ValueError):
        toy.engine.begin(0)


def test_runs_do_not_see_each_other():
    toy = Toy(config(max_order=2), RandomPolicy(0.3, 0.5))
    first, second = inputs(9), inputs(6)
    want = toy.run(second)
    toy.run(first)
    for a, b in zip(toy.run(second), want, strict=True):
        assert torch.equal(a, b)


def test_a_run_of_another_shape_after_one_that_broke_off():
    toy = Toy(config(), RandomPolicy(0.3, 0.5))
    toy.engine.begin(9)
    for x in inputs(4):
        toy.attend(x)
        toy.engine.step()
    steps = inputs(6, batch=2, tokens=200)
    fresh = Toy(config(), RandomPolicy(0.3, 0.5))
    fresh.q, fresh.k, fresh.v, fresh.out = toy.q, toy.k, toy.v, toy.out
    for a, b in zip(toy.run(steps), fresh.run(steps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_memory_is_counted_and_freed(order):
    toy = Toy(config(max_order=order), RandomPolicy(0.5, 0.5), layers=2)
    toy.run(inputs(8))
    held = toy.engine.run_stats().bytes_held
    feature = TOKENS * WIDTH * 4
    assert held["cached"] == 2 * (order + 1) * feature
    assert held["history"] == 2 * order * feature
    blocks = -(-TOKENS // 64)
    assert held["symbols"] == 2 * (-(-blocks * HEADS // 8) + -(-blocks * blocks * HEADS // 8))
    assert held["buffers"] == (4 + (order > 0)) * feature  # q, k, v, o and the last difference
    toy.engine.release()
    assert sum(toy.engine.bytes_held().values()) == 0


def test_statistics_add_up():
    toy = Toy(config(), RandomPolicy(0.5, 0.5), layers=2)
    toy.engine.ledger.enabled = True
    toy.run(inputs(8))
    stats = toy.engine.run_stats()
    assert stats.step_kinds == ["full", "full", "update", *["dispatch"] * 3, "update", "dispatch"]
    assert stats.steps == {"full": 2, "update": 2, "dispatch": 4}
    assert (stats.num_steps, stats.steps_done, stats.passes) == (8, 8, 8)
    assert stats.density == pytest.approx(sum(stats.density_by_step) / 8)
    assert stats.density == pytest.approx(sum(stats.density_by_layer) / 2)
    assert [d == 1.0 for d in stats.density_by_step] == [kind != "dispatch" for kind in stats.step_kinds]
    for layer in range(2):
        heads = stats.density_by_head[layer]
        assert len(heads) == HEADS
        assert stats.density_by_layer[layer] == pytest.approx((4 + 4 * sum(heads) / HEADS) / 8)
        assert stats.symbols[0, layer].density() == pytest.approx(stats.density_by_step[-1], abs=0.2)
    assert set(stats.seconds) == {
        *("model", "gemm_q", "gemm_kv", "norm_rope", "attention", "gemm_o", "select", "forecast")
    }
    assert sum(s for name, s in stats.seconds.items() if name != "model") <= stats.seconds["model"]
    assert "8 of 8: 2 full, 2 update, 4 dispatch; 8 passes" in str(stats)
    assert stats.as_dict()["density"] == stats.density and "symbols" not in stats.as_dict()


def test_inference_mode_and_no_grad_may_alternate():
    toy = Toy(config(), RandomPolicy(0.3, 0.5))
    steps = inputs(8)
    want = toy.run(steps)
    with torch.inference_mode():
        inside = toy.run(steps)
    assert all(torch.equal(a, b) for a, b in zip(inside, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(toy.run(steps), want, strict=True))


def test_rows_of_scratch_are_views_of_what_is_taken():
    buffers, like, shape = Buffers(), torch.zeros(1), (2, 10, 3, 4)
    with torch.inference_mode():
        rows = buffers.rows("qk", shape, like, 2, 5)
    for name, (part, flat) in zip("qk", rows, strict=True):
        whole = buffers.take(name, shape, like)
        whole.copy_(torch.arange(whole.numel()).view(shape))
        assert torch.equal(part, whole[:, 2:7]) and torch.equal(flat, whole[:, 2:7].flatten(2))
        flat.zero_()  # outside of inference mode too
        assert not whole[:, 2:7].any()
    assert buffers.rows("qk", shape, like, 2, 5) is rows
    buffers.drop_unused()
    buffers.drop_unused()  # nothing was taken since
    (part, _), _ = buffers.rows("qk", shape, like, 2, 5)
    part.fill_(1.0)
    assert buffers.take("q", shape, like)[:, 2:7].eq(1.0).all()


def test_the_step_s_coefficients_are_the_first_of_its_row():
    toy = Toy(config(max_order=2), DensePolicy())
    engine, cpu = toy.engine, torch.device("cpu")
    for steps in (6, 9):  # a run of another length has other rows
        engine.begin(steps)
        for _ in range(steps):
            for count in (1, 3):
                row = engine.scalars.row(engine, cpu)
                first = engine.scalars.first(engine, cpu, count)
                assert torch.equal(first, row[:count]) and engine.scalars.first(engine, cpu, count) is first
            engine.scalars.follow(engine, cpu)
            engine.scalars.fixed(True)
            assert torch.equal(engine.scalars.first(engine, cpu, 3), row[:3])
            engine.scalars.fixed(False)
            engine.step()
