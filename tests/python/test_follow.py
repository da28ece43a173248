"""Config(mlp="follow"): feed-forwards whose rows are forecast where the attention's are cached."""

from __future__ import annotations

import pytest
import test_family_cogvideox as cogvideox
import test_family_kandinsky5 as kandinsky5
import test_family_pixart as pixart
import test_family_sd3 as sd3
import torch
from family_checks import ROUNDING, check_forecast_rows, check_rows_left_out, config, error
from flux_models import draw as draw_flux
from flux_models import tiny_pipeline
from graph_stand_in import StandIn

import flashomni
from flashomni.policies import Policy, protect

# (pipeline, draw, a feed-forward, where its rows begin in the joint sequence)
MODELS = {
    "text first": (tiny_pipeline, draw_flux, "transformer_blocks.0.ff", 16),
    "text last": (sd3.pipeline, sd3.draw, "transformer_blocks.0.ff", 0),
    "one for both": (cogvideox.pipeline, cogvideox.draw, "transformer_blocks.0.ff", 0),
    "no text": (pixart.pixart, pixart.draw, "transformer_blocks.0.ff", 0),
    "of another make": (kandinsky5.pipeline, kandinsky5.draw, "visual_transformer_blocks.0.feed_forward", 0),
}


class OddRows(Policy):
    """Caches every second row block, in all heads; every third in one head alone, unless `whole`."""

    capturable = True

    def __init__(self, whole: bool = False):
        self.whole = whole

    def select(self, step, layout, stats, state, choice) -> None:
        s = choice.symbols
        cache = torch.ones(layout.batch, layout.heads, s.q_blocks, dtype=torch.bool)
        skip = torch.ones(*cache.shape, s.kv_blocks, dtype=torch.bool)
        cache[:, :, 1::2] = False
        cache[:, 0, ::3] &= self.whole
        protect(cache, skip, layout)
        choice.write(cache, skip)


@pytest.mark.parametrize("name", MODELS)
def test_with_all_rows_active_it_is_dense(name: str) -> None:
    make, draw, _, _ = MODELS[name]
    pipe = make()
    want = draw(pipe, 8)
    flashomni.enable(pipe, config(policy="dense", mlp="follow", strict=True))
    assert error(draw(pipe, 8), want) < ROUNDING


@pytest.mark.parametrize(
    "name, order, cache_dtype",
    [(name, order, "model") for name in MODELS for order in (0, 1, 2)] + [("no text", 1, "float8_e4m3")],
)
def test_cached_rows_are_forecast_and_others_computed(name: str, order: int, cache_dtype: str) -> None:
    make, draw, feed_forward, start = MODELS[name]
    pipe = make()
    settings = {"max_order": order, "mlp": "follow", "cache_dtype": cache_dtype}
    engine = flashomni.enable(pipe, config(disable_cache_before_step=3, **settings), policy=OddRows())
    module = pipe.transformer.get_submodule(feed_forward)
    ours, steps = module.forward, []

    def watched(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        out = ours(x, *args, **kwargs)
        steps.append((engine.plan, type(module).forward(module, x).double(), out.double()))
        return out

    module.forward = watched
    draw(pipe, 11)
    cache, _ = engine.contexts.get(engine.context, 0).symbols.masks()
    tokens = steps[0][1].shape[1]
    active = cache.any(1)[:, (torch.arange(tokens) + start) // 64].unsqueeze(-1)
    assert 0 < int(active.sum()) < active.numel()
    tolerance = 1e-5 if cache_dtype == "model" else 0.1
    check_forecast_rows(steps, active, order, tolerance)


@pytest.mark.parametrize("cache_dtype", ["model", "float8_e4m3"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_are_computed_are_not_forecast(name: str, cache_dtype: str, monkeypatch) -> None:
    make, draw, _, _ = MODELS[name]
    pipe, settings = make(), config(mlp="follow", cache_dtype=cache_dtype)

    def run() -> torch.Tensor:
        flashomni.enable(pipe, settings, policy=OddRows())
        latents = draw(pipe, 9)
        flashomni.disable(pipe)
        return latents

    check_rows_left_out(monkeypatch, run)


def test_memory() -> None:
    for name in ("text last", "one for both", "no text", "of another make"):
        make, draw, _, _ = MODELS[name]
        for cache_dtype in ("model", "float8_e4m3"):
            pipe, settings = make(), config(policy="drift", mlp="follow", cache_dtype=cache_dtype)
            said = flashomni.memory(settings, pipe, image_tokens=168, text_tokens=20)
            flashomni.enable(pipe, settings)
            draw(pipe, 9)
            assert said.by_kind == flashomni.stats(pipe).bytes_held
            alone = config(policy="drift", cache_dtype=cache_dtype)
            assert said.total > flashomni.memory(alone, pipe, image_tokens=168, text_tokens=20).total


def test_runs_of_other_lengths_and_shapes_need_nothing() -> None:
    pipe = sd3.pipeline()
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    want = sd3.draw(pipe, 8), sd3.draw(pipe, 5, batch=2, guided=True)
    assert torch.equal(sd3.draw(pipe, 8), want[0])
    assert torch.equal(sd3.draw(pipe, 5, batch=2, guided=True), want[1])


def test_replayed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sd3.pipeline()
    flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    want = sd3.draw(pipe, 11)
    flashomni.disable(pipe)
    engine = flashomni.enable(pipe, config(mlp="follow", cuda_graphs=True), policy=OddRows())
    stand_in = StandIn(monkeypatch, engine)
    for _ in range(2):
        assert torch.equal(sd3.draw(pipe, 11), want)
    assert stand_in.replays > stand_in.captures > 2


def test_other_rows_than_the_attentions_are_computed() -> None:
    """A feed-forward that is called in chunks."""
    pipe = sd3.pipeline()
    engine = flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(4, dim=1)
    sd3.draw(pipe, 8)
    assert not any(state.followed for state in engine.contexts.states())
    flashomni.disable(pipe)
    engine = flashomni.enable(pipe, config(mlp="follow"), policy=OddRows())
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(None)
    sd3.draw(pipe, 8)
    assert any(state.followed for state in engine.contexts.states())


def test_explain() -> None:
    pipe = sd3.pipeline()
    answer = flashomni.explain(pipe, config(mlp="follow"))
    assert [row.mlp for row in answer.rows] == ["follow", "dense", "follow"]
    assert "rows cached in all heads are forecast in 2 of 3 layers" in str(answer)
    assert "Feed-forward: dense in every step" in str(flashomni.explain(pipe))
    with pytest.raises(ValueError, match="mlp: expected one of"):
        config(mlp="sometimes")


def test_a_model_without_memory_will_do() -> None:
    """flashomni.memory() of a model on the meta device, whose feed-forwards follow all the same."""
    pipe, shape = sd3.pipeline(), {"image_tokens": 168, "text_tokens": 20}
    want = flashomni.memory(config(mlp="follow"), pipe, **shape)
    pipe.transformer.to("meta")
    assert flashomni.memory(config(mlp="follow"), pipe, **shape) == want
