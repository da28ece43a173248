"""What every model family has to pass, through diffusers' own pipelines with tiny random models.

A test of a family brings `run(pipe, steps)`, which draws with fixed noise and embeddings and returns latents.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

import flashomni
from flashomni import Config
from flashomni.engine.kept import forecast
from flashomni.policies import Policy, RandomPolicy

# Dense against dense in float32: another order of summation in a few layers, fed back through the steps.
ROUNDING = 2e-5

Run = Callable[..., torch.Tensor]


def config(**changes) -> Config:
    settings = {"cache_interval": 3, "disable_cache_before_step": 2, "block_q": 64, "block_kv": 64}
    return Config(**(settings | changes))


def lively(model: nn.Module) -> nn.Module:
    """Modulation and projections scaled up, for attention to matter in a random model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm1", "norm.linear", "img_mod", "txt_mod")) and (
                name.endswith("weight") and parameter.ndim == 2
            ):
                parameter.mul_(8)
            elif any(part in name for part in ("to_v", "add_v", "to_out", "to_add_out", "proj_out")):
                parameter.mul_(3)
            elif ".norm_q" in name or ".norm_k" in name or "norm_added" in name:
                parameter.copy_(1.5 + 0.5 * torch.rand_like(parameter))
    return model.eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_rows_left_out(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor]) -> None:
    """run()'s bits are those of forecasts of all rows, whatever is in the rows that forecasts leave out."""
    shares: list[float] = []

    def all_rows(kept, coefficients, out, symbols=None, **which) -> torch.Tensor:
        return forecast(kept, coefficients, out)

    def some_rows(kept, coefficients, out, symbols=None, **which) -> torch.Tensor:
        out.fill_(float("nan"))
        forecast(kept, coefficients, out, symbols, **which)
        if symbols is not None:
            active = symbols.masks()[0][:, 0].repeat_interleave(symbols.block_q, 1)
            active = active[:, which["row_offset"] :][:, : out.shape[1]]
            forecast_rows = active if which["rows"] == "active" else ~active
            assert torch.equal(~out.isnan().all(-1), forecast_rows)
            shares.append(float(forecast_rows.float().mean()))
        return out

    results = []
    for replacement in (all_rows, some_rows):
        with monkeypatch.context() as patch:
            for name in ("follow", "layer"):  # one is a function's name too
                patch.setattr(import_module(f"flashomni.engine.{name}"), "forecast", replacement)
            results.append(run())
    assert torch.equal(*results)
    assert any(0 < share < 1 for share in shares)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_nothing_reused_is_dense(pipe, run: Run, *, steps: int = 6) -> None:
    """All symbols one, by policy and by thresholds of 0, give diffusers' own latents; disable() all of it."""
    want = run(pipe, steps)
    for settings in ({"policy": "dense"}, {"tau_q": 0.0, "tau_kv": 0.0}):
        flashomni.enable(pipe, config(strict=True, **settings))
        assert error(run(pipe, steps), want) < ROUNDING
        stats = flashomni.stats(pipe)
        assert stats.steps == {"full": 3, "update": 1, "dispatch": 2} and stats.density == 1.0
        flashomni.disable(pipe)
    assert torch.equal(run(pipe, steps), want)


def denoise(model: nn.Module, x: torch.Tensor, inputs: dict, steps: int, engine=None) -> list[torch.Tensor]:
    """A loop by hand, for models whose pipelines need more than a transformer: the output of every step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, device=x.device)
    if engine is not None:
        engine.begin(steps)
    outputs = []
    for t in scheduler.timesteps:
        y = model(hidden_states=x, timestep=t.expand(len(x)), return_dict=False, **inputs)[0]
        outputs.append(y)
        x = scheduler.step(y, t, x, return_dict=False)[0]
        if engine is not None:
            engine.step()
    return outputs


def check_passes(model: nn.Module, x: torch.Tensor, inputs: dict) -> flashomni.stats:
    """The same as check_nothing_reused_is_dense and check_sparse_runs for a bare transformer."""
    want = denoise(model, x, inputs, 6)
    for settings in ({"policy": "dense"}, {"tau_q": 0.0, "tau_kv": 0.0}):
        engine = flashomni.enable(model, config(strict=True, **settings))
        for a, b in zip(denoise(model, x, inputs, 6, engine), want, strict=True):
            assert error(a, b) < ROUNDING
        assert engine.run_stats().steps == {"full": 3, "update": 1, "dispatch": 2}
        flashomni.disable(model)
    engine = flashomni.enable(model, config(), policy=RandomPolicy(0.6, 0.6))
    first = denoise(model, x, inputs, 6, engine)[-1]
    assert first.isfinite().all() and error(first, want[-1]) > 1e-4
    assert torch.equal(denoise(model, x, inputs, 6, engine)[-1], first)
    stats = engine.run_stats()
    assert stats.density < 1 and not stats.notes
    flashomni.disable(model)
    return stats


def check_sparse_runs(pipe, run: Run, *, steps: int = 8, **settings) -> flashomni.stats:
    """Random symbols change the latents, and the same way again; returns the statistics."""
    want = run(pipe, steps)
    flashomni.enable(pipe, config(**settings), policy=RandomPolicy(0.6, 0.6))
    first = run(pipe, steps)
    assert first.isfinite().all() and error(first, want) > 1e-4
    assert torch.equal(run(pipe, steps), first)
    stats = flashomni.stats(pipe)
    assert stats.steps["dispatch"] > 0 and stats.density < 1 and not stats.notes
    flashomni.disable(pipe)
    return stats


def check_text_is_never_cached(pipe, run: Run) -> None:
    """The paper's policy caches row blocks of the image, none of the text, which every active tile sees."""
    flashomni.enable(pipe, config(tau_q=0.9, tau_kv=0.5, ramp_power=0))
    run(pipe, 8)
    for symbols in flashomni.stats(pipe).symbols.values():
        cache, skip = symbols.masks()
        assert bool(cache[:, :, 0].all()) and not bool(cache.all())
        assert bool(skip[..., 0][cache].all())


def check_memory(pipe, run: Run, *, text_tokens: int, **settings) -> None:
    """memory() says beforehand what a run of 168 tokens beside the text's then holds."""
    said = flashomni.memory(config(**settings), pipe, image_tokens=168, text_tokens=text_tokens)
    flashomni.enable(pipe, config(**settings))
    run(pipe, 8)
    assert said.by_kind == flashomni.stats(pipe).bytes_held


def check_compiled_blocks(pipe, run: Run, *lists: str) -> None:
    """Blocks of the transformer's ModuleLists, compiled one by one without a break, give the same bits."""
    flashomni.enable(pipe, config(tau_kv=0.3))
    want = run(pipe, 6)
    for name in lists:
        for block in getattr(pipe.transformer, name):
            block.compile(fullgraph=True, backend="eager")
    assert torch.equal(run(pipe, 6), want)
    torch.compiler.reset()


def check_drift_follows(pipe, run: Run, *, tau_q: float = 0.8, batch: int = 1) -> None:
    """`drift` reuses row blocks of 168 tokens, attention and feed-forward, near dense; memory() knows it."""
    want = run(pipe, 8)
    settings = config(policy="drift", tau_q=tau_q, tau_kv=0.0, ramp_power=0, mlp="follow", strict=True)
    said = flashomni.memory(settings, pipe, image_tokens=168, text_tokens=0, batch=batch)
    flashomni.enable(pipe, settings)
    assert 1e-5 < error(run(pipe, 8), want) < 0.5
    stats = flashomni.stats(pipe)
    assert stats.cache_density < 1 and stats.bytes_held == said.by_kind


def check_forecast_rows(
    steps: list[tuple], active: torch.Tensor, order: int, tolerance: float, rounding: float = 1e-5
) -> None:
    """Of what follows an attention over 11 steps: (plan, the model's own result, ours) of each. Cached rows
    are forecast from the model's own results at recorded steps, all others are the model's own.

    tolerance: at Dispatch steps; rounding: at the others, which are dense.
    """
    differences: list[torch.Tensor] = []
    recorded = dispatches = 0
    for index, (plan, exact, out) in enumerate(steps):
        if plan.kind == "dispatch":
            forecast = sum(d * plan.since_update**i / (1, 1, 2)[i] for i, d in enumerate(differences))
            assert error(out, torch.where(active, exact, forecast)) < tolerance
            dispatches += 1
            continue
        assert error(out, exact) < rounding
        if plan.record or plan.kind == "update":
            new = [exact]
            for old in differences[:order]:
                new.append((new[-1] - old) / (index - recorded))
            differences, recorded = new[: order + 1], index
    assert dispatches == 4


class OddRows(Policy):
    """Caches every second row block, in all heads."""

    def select(self, step, layout, stats, state, choice) -> None:
        s = choice.symbols
        cache = torch.ones(layout.batch, layout.heads, s.q_blocks, dtype=torch.bool)
        cache[:, :, 1::2] = False
        choice.write(cache, torch.ones(*cache.shape, s.kv_blocks, dtype=torch.bool))


def check_cross_attention_follows(
    pipe, run: Run, cross: nn.Module, order: int, cache_dtype: str = "model"
) -> None:
    """Cached rows are forecast from the model's own results at recorded steps, the others computed anew.

    cross: the cross-attention of the first layer.
    """
    settings = {"cross_attention": "follow", "max_order": order, "cache_dtype": cache_dtype}
    engine = flashomni.enable(pipe, config(disable_cache_before_step=3, **settings), policy=OddRows())
    ours, steps = cross.processor, []
    own = type(ours.original)()

    def watched(*args, **kwargs) -> torch.Tensor:
        out = ours(*args, **kwargs)
        steps.append((engine.plan, own(*args, **kwargs).double(), out.double()))
        return out

    cross.processor = watched
    run(pipe, 11)
    cache, _ = engine.contexts.get(engine.context, 0).symbols.masks()
    active = cache.any(1)[:, torch.arange(steps[0][1].shape[1]) // 64].unsqueeze(-1)
    assert 0 < int(active.sum()) < active.numel()
    for plan, exact, out in steps:
        if plan.kind != "dispatch":
            torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    check_forecast_rows(steps, active, order, 1e-5 if cache_dtype == "model" else 0.1)
