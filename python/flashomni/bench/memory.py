"""What the engine will hold on full-size models, by setting: counted from shapes, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flashomni.bench import models
from flashomni.config import Config
from flashomni.engine.memory import KINDS

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
    import flashomni

    rows = []
    for name, resolution in cases:
        model = models.model_of(name)
        size = models.parse_size(resolution, model.tiny_size if tiny else model.size)
        tokens = {"image_tokens": model.image_tokens(size), "text_tokens": model.text if model.joint else 0}
        transformer = models.build(model, "meta", torch.bfloat16, tiny=tiny)
        for setting, changes in SETTINGS.items():
            found = flashomni.memory(Config(**changes), transformer, **tokens)
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
