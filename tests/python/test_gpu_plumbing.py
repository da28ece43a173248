"""A GPU as torch's user meets it: streams, graphs, threads, compile, devices, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch

import flashomni
from flashomni import SparseSymbols, sparse_attention

pytestmark = pytest.mark.gpu

TOKENS, HEADS, DIM = 1000, 4, 64


def inputs(seed: int, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = (3, 1, TOKENS, HEADS, DIM)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).unbind(0)


def symbols(seed: int, device: str = "cuda") -> SparseSymbols:
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-TOKENS // 128)
    cache = torch.rand(1, HEADS, blocks, generator=generator) < 0.8
    skip = torch.rand(1, HEADS, blocks, blocks, generator=generator) < 0.5
    return SparseSymbols.from_masks(cache.to(device), skip.to(device), q_tokens=TOKENS, kv_tokens=TOKENS)


def test_warmup_and_doctor_agree() -> None:
    from flashomni import _native, doctor

    flashomni.warmup()
    assert _native.cuda_backend(torch.cuda.current_device()) == "cuda_sm90"
    found = doctor.cuda()
    assert found["driver"] and [row["served"] for row in found["gpus"]].count("yes") >= 1


def test_close_to_torch() -> None:
    q, k, v = inputs(0)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(sparse_attention(q, k, v), expected.transpose(1, 2), atol=2e-2, rtol=2e-2)


def test_streams_do_not_disturb_each_other() -> None:
    """Each call has its own workspace, on its own stream."""
    problems = [(*inputs(seed), symbols(seed)) for seed in range(4)]
    expected = [sparse_attention(*problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for problem, stream in zip(problems, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(sparse_attention(*problem))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_current_stream_is_obeyed() -> None:
    q, k, v = inputs(1)
    expected = sparse_attention(q, k, v)
    late = torch.full_like(q, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        got = sparse_attention(late, k, v)
    stream.synchronize()
    assert torch.equal(got, expected)


def test_a_graph_obeys_symbols_changed_in_place() -> None:
    q, k, v = inputs(2)
    s, other = symbols(2), symbols(3)
    out = torch.zeros_like(q)
    expected = [sparse_attention(q, k, v, each) for each in (s, other)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        sparse_attention(q, k, v, s, out=out)
    graph.replay()
    assert torch.equal(out, expected[0])
    s.cache.copy_(other.cache)
    s.skip.copy_(other.skip)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected[1])


def test_threads() -> None:
    problems = [(*inputs(seed), symbols(seed)) for seed in range(4)]
    expected = [sparse_attention(*problem) for problem in problems]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(
                step for step in range(20) if not torch.equal(sparse_attention(*problems[i]), expected[i])
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_is_the_same() -> None:
    q, k, v = inputs(4)
    s = symbols(4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, s: sparse_attention(q, k, v, s) + 1, fullgraph=True)
    assert torch.equal(compiled(q, k, v, s), sparse_attention(q, k, v, s) + 1)


def test_the_tensors_device_is_used_and_the_current_one_kept() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    here = sparse_attention(*inputs(5, "cuda:0"), symbols(5, "cuda:0"))
    q, k, v = (x.to("cuda:1") for x in inputs(5, "cuda:0"))
    assert torch.cuda.current_device() == 0
    there = sparse_attention(q, k, v, symbols(5, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert torch.equal(there.cpu(), here.cpu())


def test_tensors_of_two_devices_are_refused() -> None:
    q, k, v = inputs(6)
    with pytest.raises(ValueError, match="k: expected a tensor on cuda"):
        sparse_attention(q, k.cpu(), v)
    with pytest.raises(ValueError, match="symbols.cache: expected a tensor on cuda"):
        sparse_attention(q, k, v, symbols(6, "cpu"))


def test_float32_is_refused() -> None:
    q, k, v = (x.float() for x in inputs(7))
    with pytest.raises(TypeError, match="q: expected float16 or bfloat16"):
        sparse_attention(q, k, v)
