"""What the engine will hold on full-size models, by setting: counted from shapes, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flashomni.bench import models
from flashomni.config import Config
from flashomni.engine.memory import KINDS, LayerShape, Memory, predict

CASES: tuple[tuple[str, str], ...] = (
    ("flux-dev", "1024x1024"),
    ("flux-dev", "2048x2048"),
    ("hunyuanvideo", ""),
    ("wan-14b", ""),
    ("wan-14b", "1280x720x81"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "D = 0": {"max_order": 0},
    "D = 1": {"max_order": 1},
    "D = 2": {"max_order": 2},
    "D = 1, fp8": {"max_order": 1, "cache_dtype": "float8_e4m3"},
    "D = 1, host": {"max_order": 1, "history": "host"},
    "D = 1, fp8, host": {"max_order": 1, "cache_dtype": "float8_e4m3", "history": "host"},
}


def run(cases: Sequence[tuple[str, str]] = CASES, *, tiny: bool = False) -> list[dict]:
    """A row a case and setting, in bytes; bfloat16, batch 1, one pass a step."""
    rows = []
    for name, resolution in cases:
        model = models.model_of(name)
        size = models.parse_size(resolution, model.tiny_size if tiny else model.size)
        transformer = models.build(model, "meta", torch.bfloat16, tiny=tiny)
        for setting, changes in SETTINGS.items():
            found = memory_of(Config(**changes), transformer, model, size)
            rows.append(
                {
                    "suite": "memory",
                    "case": {
                        "model": name,
                        "resolution": str(size),
                        "tokens": model.tokens(size, model.text),
                        "layers": len(found.layers),
                        "setting": setting,
                    },
                    "bytes": found.by_kind,
                }
            )
    return rows


def memory_of(config: Config, transformer: nn.Module, model: models.Model, size: models.Size) -> Memory:
    """flashomni.memory(), or from shapes where the engine does not serve the model yet."""
    import flashomni

    image, text = model.image_tokens(size), model.text if model.joint else 0
    try:
        return flashomni.memory(config, transformer, image_tokens=image, text_tokens=text)
    except NotImplementedError:
        if model.joint:
            raise
    c = transformer.config  # blocks with one attention over the image alone
    width = c.num_attention_heads * c.attention_head_dim
    shape = LayerShape(
        name="block",
        heads=c.num_attention_heads,
        head_dim=c.attention_head_dim,
        tokens=image,
        outputs=((image, width),),
        scratch=(("o", image * width),),
    )
    return predict(config, [shape] * c.num_layers)


def tables(rows: Sequence[dict]) -> list:
    """For a terminal, in GiB."""
    from rich.table import Table

    table = Table("model", "tokens", "setting", title="GiB held")
    for column in ("between steps", "scratch", "on the host"):
        table.add_column(column, justify="right")
    for row in rows:
        case, sizes = row["case"], row["bytes"]
        kept = sum(sizes[kind] for kind in KINDS)
        cells = [f"{size / 2**30:.2f}" for size in (kept, sizes["buffers"], sizes["host_history"])]
        table.add_row(case["model"], f"{case['tokens']:,}", case["setting"], *cells)
        if case["setting"] == list(SETTINGS)[-1]:
            table.add_section()
    return [table]
