"""Benchmarks: masks and FLOPs are what they say; a tiny run of each suite gives whole rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flashomni.bench import attention, gemm, harness, host, select
from flashomni.symbols import SparseSymbols

TINY = {"tokens": 300, "heads": 2, "head_dim": 64, "block": 64, "dtype": torch.float32, "rounds": 1}


@pytest.mark.parametrize("pattern", ["random", "clustered"])
@pytest.mark.parametrize("density,blocks", [(1.0, 7), (0.5, 33), (0.3, 33), (0.1, 33), (0.1, 3)])
def test_masks_have_one_count_in_every_row(pattern, density, blocks):
    mask = harness.skip_mask(pattern, density, 2, 5, blocks)
    assert mask.shape == (1, 2, 5, blocks)
    assert (mask.sum(-1) == max(1, round(density * blocks))).all()


def test_clustered_masks_are_runs_and_random_ones_are_seeded():
    clustered = harness.skip_mask("clustered", 0.3, 1, 20, 20)[0, 0]
    starts = (clustered[:, 1:] & ~clustered[:, :-1]).sum(1) + clustered[:, 0].long()
    assert (starts == 1).all()
    random = [harness.skip_mask("random", 0.3, 4, 20, 20, seed) for seed in (0, 0, 1)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    with pytest.raises(ValueError, match="expected random or clustered"):
        harness.skip_mask("diagonal", 0.3, 1, 2, 2)


@pytest.mark.parametrize("tokens,block", [(256, 64), (300, 64), (77, 128), (129, 128)])
def test_block_lengths_add_up(tokens, block):
    lengths = harness.block_lengths(tokens, block)
    assert lengths.sum() == tokens and lengths.min() >= 1 and lengths.max() <= block


def test_flops_count_selected_tokens_only():
    geometry = {"q_tokens": 130, "kv_tokens": 130, "block_q": 128, "block_kv": 128}
    dense = SparseSymbols.from_masks(None, torch.ones(1, 3, 2, 2, dtype=torch.bool), **geometry)
    assert harness.attention_flops(dense, 64) == 4 * 64 * 3 * 130 * 130
    skip = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    skip[..., 0, 1] = True  # a full query block against two keys
    assert (
        harness.attention_flops(SparseSymbols.from_masks(None, skip, **geometry), 64) == 4 * 64 * 3 * 128 * 2
    )
    cached = SparseSymbols.from_masks(torch.zeros(1, 3, 2, dtype=torch.bool), None, **geometry)
    assert harness.attention_flops(cached, 64) == 0


def test_row_has_the_ratio_beside_the_times():
    found = harness.row("attention", {"density": 0.5}, 2.0, 4e6, ("torch_sdpa", 6.0, 9e6))
    assert found["ratio"] == 3.0 and found["gflops"] == pytest.approx(2.0)
    assert found["baseline"] == {"name": "torch_sdpa", "ms": 6.0, "gflops": pytest.approx(1.5)}


def test_arms_take_turns():
    calls = []
    arms = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    ms = harness.interleave(arms, rounds=3)
    assert set(ms) == {"a", "b"} and all(value > 0 for value in ms.values())
    turns = [call for before, call in zip([None, *calls], calls, strict=False) if call != before]
    assert turns == ["a", "b"] * 4  # warm-up and three rounds


@pytest.mark.parametrize(
    "suite,module,patterns",
    [
        ({"attention"}, attention, {"random", "clustered", "tiles"}),
        ({"gemm_q", "gemm_o", "gemm_o_update", "gemm_o_window"}, gemm, {"random", "clustered"}),
        ({"select", "norm", "forecast"}, select, None),
    ],
)
def test_suites_give_whole_rows(suite, module, patterns):
    rows = module.run(**TINY)
    assert {row["suite"] for row in rows} == suite
    for row in rows:
        assert row["ms"] > 0 and math.isclose(row["ratio"], row["baseline"]["ms"] / row["ms"])
        assert row["case"]["seqlen"] == TINY["tokens"] and row["case"]["dtype"] == "float32"
    if patterns:
        assert {row["case"]["pattern"] for row in rows} == patterns
        assert {row["case"]["density"] for row in rows} >= {1.0}
    record = json.loads(json.dumps(harness.record(rows)))
    assert len(record["benchmarks"]) == len(rows) and record["machine"]["threads"] >= 1
    assert harness.rows_table(rows).row_count == len(rows)


def test_calls_of_a_dispatch_layer_are_taken():
    """What the host's time is measured of on a GPU, here on the CPU."""
    with torch.inference_mode():
        for name, call in host.dispatch_calls("cpu", torch.float32).items():
            result = call()
            assert result is None or bool(result.isfinite().all()), name
