"""What all shapes of block share: names of projections, the layer that is taken over, masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.diffusers.blocks.compiled import InGraph
from flashomni.diffusers.blocks.makes import feed_forward_layers
from flashomni.diffusers.call import Call, Joint
from flashomni.diffusers.rope import rounded
from flashomni.engine import FloatNorm, Stream, why_no_norm, why_not_plain
from flashomni.engine.memory import LayerShape

Restore = Callable[[], None]


@dataclass(frozen=True)
class Projections:
    """Attribute names, relative to the attention module, of one stream of tokens."""

    q: str
    k: str
    v: str
    norm_q: str | None = None
    norm_k: str | None = None
    out: str | None = None
    after_out: str | None = None  # applied to out's result (dropout)
    across_heads: bool = False  # norm_q and norm_k are over all heads at once, before the split
    other_norms: bool = False  # they are no RMS norms: always called as modules, on all rows
    grouped: bool = False  # k and v have fewer heads than q, each for several of q's
    float_norms: bool = False  # they are given float32: an eps that they leave open is float32's


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A shape of block. Subclasses describe the rest and bring the code that stands in for the model's own.

    path: of the ModuleList in the model. block: class name of the blocks there that this describes.
    attention: name of the attention in a block. heads: what it calls the number of its heads. processor:
    class name of the processor that ours stands for.
    feed_forward: names of the feed-forwards in a block; the first can follow the attention (Config.mlp).
    cross_attention: name of one after the attention, of the same class, which can follow it too.
    has_text: some of the tokens that attend to each other are text.
    rope: form of what the block gets as RoPE (flashomni.diffusers.rope); None: no RoPE. rotated: type that
    rotated queries and keys are rounded to in models of every type; None: the model's own.
    mask: argument in which the model passes the padding that the family's prepare() has dealt with; any other
    mask is refused.
    """

    path: str
    block: str
    attention: str
    processor: str
    heads: str = "heads"
    has_text: bool = True
    feed_forward: tuple[str, ...] = ()
    cross_attention: str | None = None
    rope: Callable | None = None
    rotated: torch.dtype | None = None
    mask: str | None = None

    def streams(self) -> tuple[Projections, ...]:
        """The projections before attention."""
        raise NotImplementedError

    def refusal(self, layer: Layer) -> str | None:
        """Why a layer has to be left to its own code, beyond what holds for all shapes."""
        return None

    def find_fallbacks(self, layer: Layer) -> None:
        """Notes in `layer` what has to be called as a module: its look() does that."""
        raise NotImplementedError

    def mlp_can_follow(self, layer: Layer) -> bool:
        """Whether the MLP's rows can follow the attention's (Config.mlp); after find_fallbacks()."""
        names = self.feed_forward[:1]
        return bool(names) and not any(note.split()[0] == names[0] for note in layer.fallbacks)

    def intercept(self, call: Call, layer: Layer) -> Restore:
        """Puts our code in place in one layer; returns a function that takes it out again."""
        raise NotImplementedError

    def shape_of(self, layer: Layer, image: int, text: int) -> LayerShape:
        """What decides how much memory the layer takes."""
        raise NotImplementedError


@dataclass
class Layer:
    """One attention of a model. `refusal` says why it is left to its own code; `fallbacks`, which parts are
    called as modules instead of being run by our operators."""

    index: int
    name: str
    block: nn.Module
    spec: Blocks
    refusal: str | None = None
    fallbacks: list[str] = field(default_factory=list)
    gemm_o: bool = True  # the output projections are ours
    cross_refusal: str | None = None  # why the cross-attention cannot follow the attention

    @property
    def cross_can_follow(self) -> bool:
        """The same for the cross-attention."""
        return self.spec.cross_attention is not None and self.cross_refusal is None

    @property
    def attention(self) -> nn.Module:
        return part(self.block, self.spec.attention)

    @property
    def heads(self) -> int:
        return getattr(self.attention, self.spec.heads)

    @property
    def head_dim(self) -> int:
        """Not every class of attention names it."""
        attention = self.attention
        known = getattr(attention, "head_dim", None)
        if known is not None:
            return known
        width = getattr(attention, "inner_dim", None)
        if width is None:
            width = part(attention, self.spec.streams()[0].q).out_features
        return width // self.heads

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def look(self, owner: nn.Module, name: str, why: Callable[..., str | None]) -> bool:
        """Whether our operators can do a part; notes it where they cannot."""
        module = part(owner, name)
        reason = why(module, next(self.attention.parameters()).dtype) if module is not None else None
        if reason is not None:
            self.fallbacks.append(f"{name} {reason}")
        return reason is None

    def look_at(self, stream: Projections) -> None:
        """The same for all of a stream."""
        attention = self.attention
        for name in (stream.q, stream.k, stream.v):
            self.look(attention, name, why_not_plain)
        for name in (stream.norm_q, stream.norm_k):
            if name is not None and not stream.other_norms:
                self.look(attention, name, why_no_norm)
        if stream.out is not None and optional_part(attention, stream.out) is not None:
            self.gemm_o &= self.look(attention, stream.out, why_not_plain)


def part(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path; numbers index a ModuleList."""
    return reduce(
        lambda m, name: m[int(name)] if name.isdigit() else getattr(m, name), path.split("."), module
    )


def optional_part(module: nn.Module, path: str) -> Any:
    """The same, or None where its owner has nothing of the last name."""
    owner, _, name = path.rpartition(".")
    owner = part(module, owner) if owner else module
    return part(owner, name) if hasattr(owner, name) or name.isdigit() else None


@dataclass(frozen=True)
class RepeatedHeads:
    """A projection to fewer heads than there are queries': each of them as often as it is used."""

    module: nn.Module
    head_dim: int
    times: int

    def __call__(self, x: Tensor) -> Tensor:
        heads = self.module(x).unflatten(-1, (-1, self.head_dim))
        return heads.repeat_interleave(self.times, dim=-2).flatten(-2)


def stream_of(attention: nn.Module, names: Projections, x: Tensor, start: int) -> Stream:
    """Rows start .. of the joint sequence, with the modules that make q, k and v of them."""
    k, v = part(attention, names.k), part(attention, names.v)
    if names.grouped:
        head_dim, times = (
            attention.inner_dim // attention.heads,
            attention.inner_dim // attention.inner_kv_dim,
        )
        k, v = RepeatedHeads(k, head_dim, times), RepeatedHeads(v, head_dim, times)
    return Stream(
        x,
        start,
        part(attention, names.q),
        k,
        v,
        norm_of(attention, names, names.norm_q),
        norm_of(attention, names, names.norm_k),
        names.across_heads,
    )


def norm_of(attention: nn.Module, names: Projections, name: str | None) -> nn.Module | FloatNorm | None:
    """The norm of queries or keys of that name, as it is called; None without one."""
    if name is None:
        return None
    norm = part(attention, name)
    return FloatNorm(norm) if names.float_norms else norm


def rope_of(call: Call, spec: Blocks, rope: Any, joint: Joint, dtype: torch.dtype) -> Any:
    """What the form makes of it for queries and keys of `dtype`, once a pass."""
    if rope is None or spec.rope is None:
        return None
    form, to = spec.rope, spec.rotated

    def make() -> tuple[Any, Any]:
        made = form(rope, joint)
        return rope, made if to is None or to == dtype else rounded(made, to)

    # Compiled blocks give each layer another object for the same tensor. The pair keeps `rope` alive, so that
    # nothing else takes its id or its memory within the pass.
    which = (rope.data_ptr(), rope.shape) if isinstance(rope, Tensor) else id(rope)
    return call.engine.once(("rope", which, form, to, dtype, joint), make)[1]


def given_of(**arguments: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def refuse_masks(spec: Blocks, layer: str, masks: dict[str, Tensor | None]) -> None:
    """NotImplementedError for a mask that is not the padding which prepare() dealt with."""
    for name, mask in masks.items():
        if mask is not None and name != spec.mask:
            raise NotImplementedError(
                f"{name}: expected None in {layer}, got a mask; sparse attention takes none. Call the model "
                "inside `with flashomni.disabled(...)`"
            )


def feed_forward_scratch(
    layer: Layer, names: tuple[str, ...], rows: Iterator[int] | tuple[int, ...]
) -> list[tuple[str, int]]:
    """The inner activations of feed-forwards that run as two products, by their rows."""
    found = []
    for name, count in zip(names, rows, strict=False):
        module = part(layer.block, name)
        if module is not None and _will_be_fused(layer, name):
            inner = feed_forward_layers(module).first.out_features
            found.append((f"feed_forward {count}", count * inner))
    return found


def _is_for_weights(reason: str) -> bool:
    """Whether a module falls back for where its weights are now: on the meta device, perhaps not for long."""
    return "weight that is no plain" in reason


def _will_be_fused(layer: Layer, name: str) -> bool:
    """Whether a feed-forward runs as two products, once its weights are in memory."""
    return all(_is_for_weights(note) for note in layer.fallbacks if note.split()[0] == name)


def followers(layer: Layer, rows: int) -> dict[str, tuple[str, int, int]]:
    """What can follow the attention, by the Config's field: (what its scratch is called, rows, features)."""
    found = {}
    names = layer.spec.feed_forward[:1]
    if names and _will_be_fused(layer, names[0]):
        features = feed_forward_layers(part(layer.block, names[0])).last.out_features
        found["mlp"] = ("feed_forward", rows, features)
    crosses = layer.spec.cross_attention is not None
    if crosses and (layer.cross_refusal is None or _is_for_weights(layer.cross_refusal)):
        out = f"{layer.spec.cross_attention}.{layer.spec.streams()[0].out}"
        features = part(layer.block, out).out_features
        found["cross_attention"] = ("cross_attention", rows, features)
    return found


def output_follower(out: nn.Module, rows: int) -> dict[str, tuple[str, int, int]]:
    """The same for a parallel block, whose MLP follows in the projection `out` of attention and MLP."""
    return {} if keeps_o([out]) else {"mlp": ("output", rows, out.out_features)}


class Processor(InGraph):
    """An attention processor of ours in the place of `original`, to which it passes on what it is not for."""

    flashomni = True

    def __init__(self, call: Call, layer: Layer, original: Any):
        self.call, self.engine, self.layer, self.spec = call, call.engine, layer, layer.spec
        self.original = original
        self._attention_backend = getattr(original, "_attention_backend", None)
        self._parallel_config = getattr(original, "_parallel_config", None)
        self.enroll(layer.attention)

    def run(self, arguments: dict[str, Any]) -> Any:
        return self(self.layer.attention, **arguments)


def put_processor(attention: nn.Module, processor: Processor) -> Restore:
    """Puts the processor in place; returns a function that takes it out again."""
    copied = processor._attention_backend
    attention.processor = processor

    def restore() -> None:
        if attention.processor is processor:
            if processor._attention_backend != copied:
                processor.original._attention_backend = processor._attention_backend
            attention.processor = processor.original

    return restore


def keeps_o(linears: list[nn.Module]) -> bool:
    return any(type(linear) is not nn.Linear for linear in linears)
