"""torch.compile by repeated blocks: the bits of eager steps, and no compilation after the first step."""

from __future__ import annotations

import importlib

import pytest
import torch
from flux_models import draw, tiny_pipeline
from torch._dynamo.utils import counters

import flashomni
from flashomni import Config

CONFIG = Config(
    cache_interval=3,
    disable_cache_before_step=2,
    block_q=64,
    block_kv=64,
    tau_q=0.6,
    tau_kv=0.3,
    ramp_power=0.0,
)
STEPS = 9


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compile_first", [False, True])
def test_compiled_blocks_give_the_bits_of_eager_steps(compile_first: bool) -> None:
    eager = tiny_pipeline(doubles=2, singles=3)
    flashomni.enable(eager, CONFIG)
    want, stats = draw(eager, steps=STEPS), flashomni.stats(eager)

    pipe = tiny_pipeline(doubles=2, singles=3)
    if compile_first:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
        draw(pipe, steps=1)
    flashomni.enable(pipe, CONFIG)
    if not compile_first:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    before = graphs()
    first = draw(pipe, steps=1)
    assert first.isfinite().all()
    compiled = graphs()
    assert 0 < compiled - before <= 3, "a graph a kind of block, not a layer"
    for _ in range(2):
        assert torch.equal(draw(pipe, steps=STEPS), want)
        found = flashomni.stats(pipe)
        assert found.steps == stats.steps and found.density_by_step == stats.density_by_step
        assert not found.notes
    assert graphs() == compiled, "steps of other kinds and other runs compile nothing"
    with flashomni.disabled(pipe):
        dense = draw(pipe, steps=2)
    flashomni.disable(pipe)
    assert torch.equal(draw(pipe, steps=2), dense)


def test_graphs_without_mutation() -> None:
    """Through AOTAutograd, as inductor gets them."""
    pipe = tiny_pipeline(doubles=1, singles=1)
    flashomni.enable(pipe, CONFIG)
    want = draw(pipe, steps=5)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert torch.equal(draw(pipe, steps=5), want)


@pytest.mark.parametrize("family", ["flux2", "hunyuan_video", "ltx", "qwen_image", "wan", "z_image"])
def test_the_other_shapes_of_block(family: str) -> None:
    module = importlib.import_module(f"test_family_{family}")
    pipe = module.pipeline()
    flashomni.enable(pipe, CONFIG)
    want = module.draw(pipe, 6)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(module.draw(pipe, 6), want)
    compiled = graphs()
    assert torch.equal(module.draw(pipe, 6), want) and graphs() == compiled > 0
