"""Block-sparse attention by the published names, checked and timed against dense attention of torch.

python examples/published_api/attention.py
"""

import torch
from common import arguments, cache_bits, check, milliseconds, pack, row

import flashomni


@torch.inference_mode()
def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    shape = (options.tokens, options.heads, options.head_dim)
    q, k, v = (torch.randn(shape, dtype=options.dtype, device=options.device) for _ in range(3))
    indptr = torch.tensor([0, options.tokens], dtype=torch.int32, device=options.device)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=options.device)
    wrapper = flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper(workspace, "NHD")
    wrapper.plan(
        *(indptr, indptr, options.heads, options.heads, options.head_dim),
        sparse_block_size_for_q=128,
        sparse_block_size_for_kv=128,
        q_data_type=options.dtype,
    )

    def dense() -> torch.Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first)

    expected = dense()[0].transpose(0, 1)
    check("dense", wrapper.run(q, k, v), expected)
    for sparsity in (0.0, 0.5, 0.8):
        cache = cache_bits(options, sparsity)
        blocks = cache.shape[0]
        skip = torch.rand(blocks, options.heads, blocks, device=options.device) >= sparsity
        skip |= torch.eye(blocks, dtype=torch.bool, device=options.device)[:, None]
        sparse_info, sparse_info_indptr = pack(cache, wrapper._sparse_info_indptr_base)
        sparse_kv_info, sparse_kv_info_indptr = pack(skip, wrapper._sparse_kv_info_indptr_base)
        bits = (sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr)
        out = wrapper.run(q, k, v, *bits)
        rows = cache.repeat_interleave(128, 0)[: options.tokens]
        if out[~rows].any():
            raise SystemExit("attention: a cached tile was written")
        # One head by torch, under the mask that the bits stand for.
        seen = skip[:, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        seen = seen[: options.tokens, : options.tokens]
        head = torch.nn.functional.scaled_dot_product_attention(
            *(x[None, None, :, 0] for x in (q, k, v)), attn_mask=seen
        )
        check("attention", out[:, 0][rows[:, 0]], head[0, 0][rows[:, 0]])
        share = float((cache[:, :, None] & skip).float().mean())
        row("attention", 1 - share, *milliseconds(options, lambda b=bits: wrapper.run(q, k, v, *b), dense))


if __name__ == "__main__":
    main()
