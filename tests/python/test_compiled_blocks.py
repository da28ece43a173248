"""torch.compile by repeated blocks: the bits of eager steps, and no compilation after the first step."""

from __future__ import annotations

import importlib

import pytest
import torch
from flux_models import draw, tiny_pipeline
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import flashomni
from flashomni import Config
from flashomni.diffusers.blocks import compiled

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
    after = graphs()
    assert after - before == 2, "a graph a kind of block, not a layer"
    for _ in range(2):
        assert torch.equal(draw(pipe, steps=STEPS), want)
        found = flashomni.stats(pipe)
        assert found.steps == stats.steps and found.density_by_step == stats.density_by_step
        assert not found.notes
    assert graphs() == after, "steps of other kinds and other runs compile nothing"
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


def operators(graph: torch.fx.GraphModule) -> list[str]:
    """What a graph of torch's operators calls, by name."""
    names = [node.target.name() for node in graph.graph.nodes if hasattr(node.target, "_schema")]
    return [name.partition("::")[2].partition(".")[0] for name in names]


def test_only_the_branches_of_a_parallel_block_are_opaque() -> None:
    """Torch sees modulation and residual, and is given one tensor, of which it makes no copy."""
    pipe, found = tiny_pipeline(doubles=2, singles=2), []
    flashomni.enable(pipe, CONFIG)

    def record(graph: torch.fx.GraphModule, inputs: list) -> torch.nn.Module:
        found.append(operators(graph))
        return graph

    backend = aot_autograd(fw_compiler=record)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    draw(pipe, steps=1)
    (single,) = [names for names in found if "addcmul" in names]
    assert single.count("layer") == 1
    after = single[single.index("layer") + 1 :]
    assert "native_layer_norm" not in single
    assert after == ["unsqueeze", "addcmul", "split_with_sizes", "clone", "clone"], "two outputs, no more"
    assert len(found) == 2, "a graph a kind of block"


def test_results_of_the_operator_are_not_copied(monkeypatch) -> None:
    given, returned = [], []

    def apart(results: list[torch.Tensor]) -> list[torch.Tensor]:
        given.extend(results)
        returned.extend(own(results))
        return returned[-len(results) :]

    own = compiled._apart
    monkeypatch.setattr(compiled, "_apart", apart)
    pipe = tiny_pipeline(doubles=1, singles=2)
    flashomni.enable(pipe, CONFIG)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    draw(pipe, steps=5)
    assert given and all(a is b for a, b in zip(given, returned, strict=True))


OTHERS = {
    "chroma": {},
    "flux2": {},
    "hunyuan_video": {},
    "kandinsky5": {},
    "ltx": {},
    "qwen_image": {},
    "wan": {},
    "z_image": {},
    "hunyuan_video, tokens replaced": {"image_condition_type": "token_replace"},
}


@pytest.mark.parametrize("family", OTHERS)
def test_the_other_shapes_of_block(family: str) -> None:
    module = importlib.import_module(f"test_family_{family.partition(',')[0]}")
    pipe = module.pipeline(**OTHERS[family])
    flashomni.enable(pipe, CONFIG)
    want = module.draw(pipe, 6)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(module.draw(pipe, 6), want)
    made = graphs()
    assert torch.equal(module.draw(pipe, 6), want) and graphs() == made > 0
