"""The table of what full-size models hold."""

from __future__ import annotations

import pytest
import torch

import flashomni
from flashomni import Config
from flashomni.bench import memory, models


def test_rows_are_memorys_own_and_fp8_halves_them() -> None:
    rows = memory.run([("flux-dev", ""), ("wan-14b", "")], tiny=True)
    assert len(rows) == 2 * len(memory.SETTINGS)
    by_setting = {row["case"]["setting"]: row["bytes"] for row in rows[: len(memory.SETTINGS)]}
    model = models.model_of("flux-dev")
    feature = model.tokens(model.tiny_size, model.text) * 2 * 64 * 2  # two heads of 64 in bfloat16
    assert by_setting["D = 1"]["cached"] == 2 * 2 * feature  # two layers
    assert by_setting["D = 1"]["history"] == 2 * feature == by_setting["D = 1, host"]["host_history"]
    assert by_setting["D = 1, fp8"]["cached"] == (1 + 4 / 128) / 2 * by_setting["D = 1"]["cached"]
    assert memory.tables(rows)
    wan = models.model_of("wan-14b")  # keeps some small tensors in float32
    tokens, model = wan.tokens(wan.tiny_size, 0), models.build(wan, "meta", torch.bfloat16, tiny=True)
    found = flashomni.memory(Config(policy="drift"), model, image_tokens=tokens, text_tokens=0)
    assert found.by_kind["cached"] == 2 * 2 * (tokens * 2 * 64 * 2)
    assert rows[len(memory.SETTINGS) + 1]["bytes"]["cached"] == 0  # the default policy caches by text


@pytest.mark.parametrize("name", ["flux-dev", "wan-14b"])
def test_the_cases_are_models_of_the_benchmark(name: str) -> None:
    """Tokens of the sizes that the table names."""
    model = models.model_of(name)
    tokens = {
        model.tokens(models.parse_size(size, model.size), model.text)
        for case, size in memory.CASES
        if case == name
    }
    assert tokens == ({4608, 16896} if name == "flux-dev" else {32760, 75600})
