"""flashomni.memory() against what runs hold."""

from __future__ import annotations

import pytest
import torch
from flux_models import draw, tiny_pipeline
from torch import nn

import flashomni
from flashomni import Config
from flashomni.engine.memory import LayerShape, predict

CONFIG = {"cache_interval": 3, "disable_cache_before_step": 2, "block_q": 64, "block_kv": 64, "tau_q": 0.3}


def held(pipe, config: Config, **options) -> dict[str, int]:
    flashomni.enable(pipe, config)
    try:
        draw(pipe, **options)
        return flashomni.stats(pipe).bytes_held
    finally:
        flashomni.disable(pipe)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_a_run_holds(order: int, dtype: torch.dtype) -> None:
    pipe, config = tiny_pipeline(dtype=dtype), Config(max_order=order, **CONFIG)
    said = flashomni.memory(config, pipe, image_tokens=323, text_tokens=16)
    found = held(pipe, config)
    assert said.by_kind == found
    assert said.total == sum(found.values())


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize(
    "cache_dtype,history", [("float8_e4m3", "device"), ("model", "host"), ("float8_e4m3", "host")]
)
def test_it_is_what_is_held_wherever_it_is_kept(order: int, cache_dtype: str, history: str) -> None:
    config = Config(max_order=order, cache_dtype=cache_dtype, history=history, **CONFIG)
    pipe = tiny_pipeline(dtype=torch.bfloat16)
    said = flashomni.memory(config, pipe, image_tokens=323, text_tokens=16)
    assert said.by_kind == held(pipe, config)
    plain = flashomni.memory(Config(max_order=order, **CONFIG), pipe, image_tokens=323, text_tokens=16)
    if cache_dtype != "model":
        assert said.by_kind["cached"] == (128 + 4) / 256 * plain.by_kind["cached"]
    if history == "host":
        assert said.by_kind["history"] == 0 and said.host * (order == 0) == 0
        assert cache_dtype != "model" or said.host == plain.by_kind["history"]


def test_guidance_and_batches_multiply_it() -> None:
    pipe, config = tiny_pipeline(), Config(**CONFIG)
    said = flashomni.memory(config, pipe, image_tokens=323, text_tokens=16, batch=2, contexts=2)
    assert said.by_kind == held(pipe, config, batch=2, guided=True)


def test_dense_layers_hold_no_caches() -> None:
    pipe, config = tiny_pipeline(), Config(dense_layers=(1,), **CONFIG)
    said = flashomni.memory(config, pipe, image_tokens=323, text_tokens=16)
    assert said.by_kind == held(pipe, config)
    assert [layer.cached > 0 for layer in said.layers] == [True, False, True]


def test_a_projection_that_is_no_plain_linear_layer_keeps_o() -> None:
    class Wrapped(nn.Linear):
        pass

    pipe, config = tiny_pipeline(), Config(**CONFIG)
    attention = pipe.transformer.transformer_blocks[0].attn
    wrapped = Wrapped(attention.to_out[0].in_features, attention.to_out[0].out_features)
    wrapped.load_state_dict(attention.to_out[0].state_dict())
    attention.to_out[0] = wrapped
    said = flashomni.memory(config, pipe, image_tokens=323, text_tokens=16)
    assert said.by_kind == held(pipe, config)
    assert said.layers[0].cached == 0 and said.layers[0].history > said.layers[1].history


def test_a_model_without_memory_will_do() -> None:
    pipe = tiny_pipeline()
    want = flashomni.memory("flux", pipe, image_tokens=1000, text_tokens=77)
    meta = pipe.transformer.to("meta")
    assert flashomni.memory("flux", meta, image_tokens=1000, text_tokens=77) == want
    half = flashomni.memory("flux", meta, image_tokens=1000, text_tokens=77, dtype=torch.bfloat16)
    assert half.by_kind["cached"] * 2 == want.by_kind["cached"]
    assert "all layers" in str(want) and len(str(want).splitlines()) == len(want.layers) + 4


def test_the_papers_own_number() -> None:
    """HunyuanVideo at 33K tokens: a tensor of one layer's O is 204 MB in bfloat16."""
    shape = LayerShape("one", 24, 128, 33280, ((33280, 3072),))
    said = predict(Config(max_order=1), [shape])
    assert said.layers[0].history == 33280 * 3072 * 2
    assert said.layers[0].cached == 2 * said.layers[0].history
    assert predict(Config(max_order=0), [shape]).layers[0].history == 0


@pytest.mark.parametrize(
    "wrong,error,message",
    [
        ({"image_tokens": 0}, ValueError, "image_tokens: expected at least 1, got 0"),
        ({"text_tokens": -1}, ValueError, "text_tokens: expected at least 0, got -1"),
        ({"batch": 1.5}, TypeError, "batch: expected an integer, got 1.5"),
        ({"contexts": True}, TypeError, "contexts: expected an integer, got True"),
    ],
)
def test_wrong_sizes_are_named(wrong: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        flashomni.memory(None, tiny_pipeline(), **({"image_tokens": 10, "text_tokens": 1} | wrong))
