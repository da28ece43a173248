"""Random inputs for the operators' tests."""

from __future__ import annotations

from dataclasses import dataclass

import reference
import torch
from torch import Generator, Tensor

from flashomni import SparseSymbols

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 72, 80, 96, 128, 256)
BLOCKS = ((128, 128), (128, 64), (64, 64))


def random(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


def random_mask(generator: torch.Generator, density: float, *shape: int) -> Tensor:
    """True with probability `density`; exactly all or none at 1 and 0."""
    return torch.rand(*shape, generator=generator) < density


def random_symbols(
    generator: torch.Generator,
    batch: int,
    heads: int,
    q_tokens: int,
    kv_tokens: int,
    block: tuple[int, int] = (128, 128),
    cache_density: float = 0.6,
    skip_density: float = 0.5,
) -> SparseSymbols:
    q_blocks, kv_blocks = reference.blocks(q_tokens, block[0]), reference.blocks(kv_tokens, block[1])
    return SparseSymbols.from_masks(
        random_mask(generator, cache_density, batch, heads, q_blocks),
        random_mask(generator, skip_density, batch, heads, q_blocks, kv_blocks),
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
        block_q=block[0],
        block_kv=block[1],
    )


def set_padding(symbols: SparseSymbols) -> None:
    """Sets the bits past the last one of each element, which no operator may look at."""
    tiles = symbols.q_blocks * symbols.heads
    for bits, count in ((symbols.cache, tiles), (symbols.skip, tiles * symbols.kv_blocks)):
        bits[:, -1] |= 0xFF & (0xFF << ((count - 1) % 8 + 1))


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """NaN everywhere: what is not written shows, and what is written shows too."""
    return torch.full(shape, float("nan"), dtype=dtype)


def strided(tensor: Tensor, parts: int = 3) -> Tensor:
    """The same values as a view into a wider tensor, as q is inside a fused qkv; the rest is NaN."""
    *leading, heads, dim = tensor.shape
    fused = torch.full((*leading, parts, heads, dim), float("nan"), dtype=tensor.dtype)
    fused[..., parts // 2, :, :] = tensor
    return fused[..., parts // 2, :, :]


def token_mask(cache: Tensor, tokens: int, block: int, row_offset: int = 0) -> Tensor:
    """Cache mask [B, H, q_blocks] by token: bool [B, tokens, H]."""
    rows = (torch.arange(tokens) + row_offset) // block
    return cache[:, :, rows].transpose(1, 2)


def norm_weight(generator: Generator, over: str, heads: int, dim: int, dtype: torch.dtype) -> Tensor | None:
    """A norm's weight: over each "head", over "all" heads of a token, or None."""
    width = {"head": dim, "all": heads * dim}.get(over)
    return None if width is None else random(generator, width, dtype=dtype)


def poison_unread(x: Tensor, active: Tensor, over: str) -> Tensor:
    """x [B, N, H, D] with NaN in what norm_rope may not read: tiles that are not active [B, N, H]; with a
    norm over "all" heads, tokens without an active one."""
    read = active.any(2, keepdim=True) if over == "all" else active
    return x.masked_fill(~read.unsqueeze(-1), float("nan"))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN or not."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@dataclass
class Case:
    """A batch of attention inputs with its symbols."""

    q: Tensor
    k: Tensor
    v: Tensor
    symbols: SparseSymbols | None

    def expected(self, out: Tensor, lse: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        """The reference's (out, lse), batched."""
        symbols = self.symbols
        block = reference.Blocks(*((128, 128) if symbols is None else (symbols.block_q, symbols.block_kv)))
        k_mean, v_mean = options.pop("k_mean", None), options.pop("v_mean", None)
        results = [
            reference.attention(
                self.q[b],
                self.k[b],
                self.v[b],
                None if symbols is None or symbols.cache is None else symbols.cache[b],
                None if symbols is None or symbols.skip is None else symbols.skip[b],
                block,
                out=out[b],
                lse=lse[b],
                k_mean=None if k_mean is None else k_mean[b],
                v_mean=None if v_mean is None else v_mean[b],
                **options,
            )
            for b in range(self.q.shape[0])
        ]
        return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def attention_case(
    seed: int,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    q_tokens: int = 200,
    kv_tokens: int = 200,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = (128, 128),
    cache_density: float = 0.6,
    skip_density: float = 0.5,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        random(generator, batch, q_tokens, heads[0], head_dim, dtype=dtype),
        random(generator, batch, kv_tokens, heads[1], head_dim, dtype=dtype),
        random(generator, batch, kv_tokens, heads[1], head_dim, dtype=dtype),
        random_symbols(generator, batch, heads[0], q_tokens, kv_tokens, block, cache_density, skip_density),
    )
