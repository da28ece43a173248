"""What plan() of the published wrapper is told: checked, refused or kept for run()."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashomni.compat import masks
from flashomni.ops._dispatch import describe, expect_integer

_BLOCKS = ((128, 128), (128, 64), (64, 64))
_MOST_CLASSES_ON_GPU = 64  # each is a call of its own: more would be slower than dense, in silence


@dataclass
class Plan:
    """The problem of the next runs. lengths: (query, key) tokens of each sequence."""

    lengths: list[tuple[int, int]]
    heads: int
    kv_heads: int
    head_dim: int
    block_q: int
    block_kv: int
    q_dtype: torch.dtype
    causal: bool
    scale: float | None
    classes: list[list[masks.RowClass]] | None = None  # of each sequence; None: no mask

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def q_tokens(self) -> int:
        return sum(q for q, _ in self.lengths)

    @property
    def kv_tokens(self) -> int:
        return sum(kv for _, kv in self.lengths)

    @property
    def is_even(self) -> bool:
        """True if all sequences are equally long: a batch without indptrs."""
        return len(set(self.lengths)) == 1

    def cache_bits(self, index: int) -> int:
        return -(-self.lengths[index][0] // self.block_q) * self.heads

    def skip_bits(self, index: int) -> int:
        return self.cache_bits(index) * -(-self.lengths[index][1] // self.block_kv)

    def indptr_bases(self) -> tuple[list[int], list[int]]:
        """Running sums of the cache bits and of the skip bits."""
        each = range(self.batch)
        return (
            [0, *accumulate(self.cache_bits(b) for b in each)],
            [0, *accumulate(self.skip_bits(b) for b in each)],
        )


def lengths_of(qo_indptr: Tensor, kv_indptr: Tensor) -> list[tuple[int, int]]:
    """(query, key) tokens of each sequence. Reads the indptrs, wherever they lie."""
    ends = [_ends("qo_indptr", qo_indptr), _ends("kv_indptr", kv_indptr)]
    if len(ends[0]) != len(ends[1]):
        raise ValueError(
            f"kv_indptr: expected int32[{len(ends[0])}], as qo_indptr, got {describe(kv_indptr)}"
        )
    return list(zip(*([b - a for a, b in pairwise(part)] for part in ends), strict=True))


def _ends(name: str, indptr: Tensor) -> list[int]:
    if not isinstance(indptr, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(indptr).__name__}")
    if indptr.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {describe(indptr)}")
    if indptr.ndim != 1 or len(indptr) < 2:
        raise ValueError(f"{name}: expected int32[B + 1] with B of at least 1, got {describe(indptr)}")
    ends = indptr.tolist()
    if ends[0] != 0 or any(b < a for a, b in pairwise(ends)):
        raise ValueError(f"{name}: expected offsets that begin with 0 and ascend, got {ends}")
    return ends


def dtype_of(name: str, dtype: str | torch.dtype) -> torch.dtype:
    """A torch.dtype or its name, with or without "torch."."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name}: expected float16, bfloat16 or float32 (CPU), got {dtype!r}")
    return found


def check_numbers(heads: int, kv_heads: int, head_dim: int, block_q: int, block_kv: int) -> None:
    for name, value in (("num_qo_heads", heads), ("num_kv_heads", kv_heads), ("head_dim_qk", head_dim)):
        expect_integer(name, value)
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if heads % kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of num_qo_heads = {heads}, got {kv_heads}")
    if (block_q, block_kv) not in _BLOCKS:
        raise ValueError(
            "sparse_block_size_for_q, sparse_block_size_for_kv: expected 128 and 128, 128 and 64, or 64 and "
            f"64, got {block_q} and {block_kv}"
        )


def refuse_unserved(
    head_dim: int,
    head_dim_vo: int | None,
    pos_encoding_mode: str,
    use_fp16_qk_reduction: bool,
    logits_soft_cap: float | None,
    rope_scale: float | None,
    rope_theta: float | None,
) -> None:
    """NotImplementedError that says what to use instead, for what the operators do not do."""
    if head_dim_vo not in (None, head_dim):
        raise NotImplementedError(
            f"head_dim_vo: expected head_dim_qk = {head_dim}, got {head_dim_vo}: pad the shorter with zeros"
        )
    if pos_encoding_mode != "NONE":
        raise NotImplementedError(
            f'pos_encoding_mode: expected "NONE", got {pos_encoding_mode!r}: rotate q and k before, for '
            "instance with flashomni.norm_rope"
        )
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if value is not None:
            raise NotImplementedError(
                f'{name}: expected None, as pos_encoding_mode "NONE" rotates nothing, got {value}: rotate q '
                "and k before, for instance with flashomni.norm_rope"
            )
    if use_fp16_qk_reduction:
        raise NotImplementedError(
            "use_fp16_qk_reduction: expected False, got True: products are summed in float32, which is as "
            "fast here and exact; leave it out"
        )
    if logits_soft_cap is not None and logits_soft_cap > 0:
        raise NotImplementedError(
            f"logits_soft_cap: expected None or 0, got {logits_soft_cap}: capped scores are not supported"
        )


def scale_of(sm_scale: float | None) -> float | None:
    if sm_scale is not None and not (math.isfinite(sm_scale) and sm_scale > 0):
        raise ValueError(f"sm_scale: expected a finite number above 0, or None, got {sm_scale}")
    return sm_scale


def add_mask(plan: Plan, custom_mask: Tensor | None, packed: Tensor | None, device: torch.device) -> None:
    """Takes a custom mask into the plan: as nothing, as causality, or as classes of rows."""
    mask = _flat_mask(plan, custom_mask, packed, device)
    if mask is None:
        return
    if plan.causal:
        raise ValueError("causal: expected False beside a custom mask, got True: put it into the mask")
    if bool(mask.all()):
        return
    parts = list(masks.split(mask, plan.lengths))
    if all(masks.is_causal(part) for part in parts):
        plan.causal = True
        return
    plan.classes = [masks.classes(part, plan.block_q, plan.block_kv) for part in parts]
    most = max(map(len, plan.classes))
    if device.type != "cpu" and most > _MOST_CLASSES_ON_GPU:
        raise NotImplementedError(
            f"custom_mask: expected at most {_MOST_CLASSES_ON_GPU} kinds of rows that see the same keys on a "
            f"GPU, got {most}: use causal=True, or clear whole blocks in sparse_kv_info, or run on the CPU"
        )


def _flat_mask(
    plan: Plan, custom_mask: Tensor | None, packed: Tensor | None, device: torch.device
) -> Tensor | None:
    """bool [sum of Nq Nkv], or None without a mask."""
    counts = [q * kv for q, kv in plan.lengths]
    flat = None
    if custom_mask is not None:
        _expect_mask("custom_mask", custom_mask, torch.bool, sum(counts))
        flat = custom_mask.reshape(-1).to(device)
    if packed is not None:
        _expect_mask("packed_custom_mask", packed, torch.uint8, sum(-(-count // 8) for count in counts))
        mask = masks.unpacked(packed.reshape(-1).to(device), plan.lengths)
        if flat is not None and not torch.equal(flat, mask):
            raise ValueError("packed_custom_mask: expected the bits of custom_mask, got others")
        flat = mask
    return flat


def _expect_mask(name: str, mask: Tensor, dtype: torch.dtype, count: int) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != dtype:
        raise TypeError(f"{name}: expected {str(dtype).removeprefix('torch.')}, got {describe(mask)}")
    if mask.numel() != count:
        raise ValueError(
            f"{name}: expected {count} elements, one [Nq, Nkv] segment a sequence, got {describe(mask)}"
        )
