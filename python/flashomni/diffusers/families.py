"""What is known of each model family, as data: where its attentions are and what their parts are called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from torch import nn


@dataclass(frozen=True)
class Projections:
    """Attribute names, relative to the attention module, of one stream of tokens."""

    q: str
    k: str
    v: str
    norm_q: str
    norm_k: str
    out: str | None = None
    after_out: str | None = None  # applied to out's result (dropout)


@dataclass(frozen=True)
class JointBlocks:
    """Blocks whose attention takes text and image apart and whose processor does everything around it.

    The processor is called as (attention, hidden_states, encoder_hidden_states, attention_mask,
    image_rotary_emb) and returns (image, text).
    """

    path: str  # of the ModuleList in the model
    attention: str  # of the attention in a block
    image: Projections
    text: Projections
    processor: str  # class name of the processor that ours stands in for
    feed_forward: tuple[str, ...] = ()  # names of the FeedForward modules in a block


@dataclass(frozen=True)
class ParallelBlocks:
    """Blocks with one stream, text and image in one sequence, and an MLP beside the attention.

    out([attention, activation(mlp)]), gated and added to the input: the whole forward of the block is
    replaced."""

    path: str
    attention: str
    stream: Projections
    processor: str
    norm: str  # norm(x, emb=temb) -> (x, gate)
    mlp: str
    activation: str  # module; tanh-GELU is fused
    out: str


@dataclass(frozen=True)
class Family:
    """A model class of diffusers. Text comes first in its joint sequences; RoPE pairs are (2i, 2i + 1)."""

    model: str  # class name
    blocks: tuple[JointBlocks | ParallelBlocks, ...]


_IMAGE = Projections("to_q", "to_k", "to_v", "norm_q", "norm_k")

FLUX = Family(
    model="FluxTransformer2DModel",
    blocks=(
        JointBlocks(
            path="transformer_blocks",
            attention="attn",
            image=Projections(
                "to_q", "to_k", "to_v", "norm_q", "norm_k", out="to_out.0", after_out="to_out.1"
            ),
            text=Projections(
                "add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", out="to_add_out"
            ),
            processor="FluxAttnProcessor",
            feed_forward=("ff", "ff_context"),
        ),
        ParallelBlocks(
            path="single_transformer_blocks",
            attention="attn",
            stream=_IMAGE,
            processor="FluxAttnProcessor",
            norm="norm",
            mlp="proj_mlp",
            activation="act_mlp",
            out="proj_out",
        ),
    ),
)

FAMILIES: dict[str, Family] = {FLUX.model: FLUX}


def part(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path; numbers index a ModuleList."""
    return reduce(
        lambda m, name: m[int(name)] if name.isdigit() else getattr(m, name), path.split("."), module
    )


def family_of(model: nn.Module) -> Family:
    """The family of a model. NotImplementedError lists the known ones and says how to add another."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise NotImplementedError(
        f"transformer: expected one of {', '.join(sorted(FAMILIES))}, got {type(model).__name__}. To add "
        "a model, describe its attentions as a flashomni.diffusers.families.Family (JointBlocks, "
        "ParallelBlocks) and put it into families.FAMILIES: docs/engine.md"
    )
