"""What a model family is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashomni.diffusers.blocks import Blocks
    from flashomni.diffusers.call import Call, Inputs


@dataclass(frozen=True)
class Preset:
    """Settings of a Config by name, and where they come from."""

    settings: Mapping[str, Any]
    source: str


@dataclass(frozen=True)
class Family:
    """Models of diffusers that are built alike.

    models: class names. blocks: the shapes of block in which the model has its attentions, in its order; the
        first that fits a block counts.
    text_first: where the text lies in the joint sequence that FlashOmni lays out. That need not be diffusers'
        order: attention knows none. Text that may be padded has to come last, where padding is a length.
    prepare: reads a call's inputs before the model runs: padding, condition tokens (Call).
    presets: by "quality", "balanced", "fast". notes: what explain() says of every model of the family.
    """

    models: tuple[str, ...]
    blocks: tuple[Blocks, ...]
    text_first: bool = True
    prepare: Callable[[Inputs, Call], None] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


UNMEASURED = "between no reuse at all and the paper's setting; chosen by us, not measured on trained weights"
BEYOND = "beyond the paper's setting; chosen by us, not measured on trained weights"
CARRIED_OVER = "the paper's setting (arXiv 2509.25401) for a model of its own, not measured on this one"


def presets_around(paper: Mapping[str, Any], source: str) -> dict[str, Preset]:
    """ "balanced" as in the paper, "quality" and "fast" on either side of it."""
    return {
        "quality": Preset(
            {**paper, "cache_interval": 3, "tau_q": paper["tau_q"] / 2, "tau_kv": paper["tau_kv"] / 2},
            UNMEASURED,
        ),
        "balanced": Preset(paper, source),
        "fast": Preset(
            {**paper, "cache_interval": paper["cache_interval"] + 2, "tau_kv": 2 * paper["tau_kv"]}, BEYOND
        ),
    }


TEXTLESS = (
    "Self-attention without text: the paper's criterion for S_c is undefined, so that policy 'flashomni' "
    "caches nothing and skips key blocks only. Policy 'drift' caches the row blocks whose output changes "
    "least."
)
ACROSS_HEADS = (
    "Query and key norms run over all heads at once: GEMM-Q and the queries' norm skip row blocks that are "
    "cached in all heads; the keys' norm is dense."
)
CROSS_DENSE = "Outside of FlashOmni: cross-attention, which is dense and never reused."


def textless_presets(tau_kv: float) -> dict[str, Preset]:
    """For attentions without text. The paper has no setting for them."""
    skip = {"tau_kv": tau_kv, "cache_interval": 5, "ramp_power": 2.0}
    drift = {**skip, "policy": "drift", "max_order": 1, "tau_q": 0.2}
    return {
        "quality": Preset(
            {**skip, "policy": "flashomni", "max_order": 0},
            "skips key blocks only, by the paper's tau_kv; not measured on trained weights",
        ),
        "balanced": Preset(drift, "chosen by us, not measured on trained weights"),
        "fast": Preset({**drift, "tau_q": 0.5, "tau_kv": 2 * tau_kv, "s_q": 0.3}, BEYOND),
    }


PAPER_IMAGE = {
    "tau_q": 0.5,
    "tau_kv": 0.15,
    "cache_interval": 5,
    "max_order": 1,
    "s_q": 0.3,
    "ramp_power": 2.0,
}
PAPER_VIDEO = {
    "tau_q": 0.5,
    "tau_kv": 0.05,
    "cache_interval": 6,
    "max_order": 1,
    "s_q": 0.3,
    "ramp_power": 1.7,
}
