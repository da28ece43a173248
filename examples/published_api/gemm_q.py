"""The sparse query projection by the published names, checked and timed against a dense linear layer.

python examples/published_api/gemm_q.py
"""

import torch
from common import arguments, cache_bits, check, milliseconds, pack, row

import flashomni


@torch.inference_mode()
def main() -> None:
    options = arguments(__doc__)
    torch.manual_seed(0)
    width = options.heads * options.head_dim
    make = {"dtype": options.dtype, "device": options.device}
    x = torch.randn(1, options.image, width, **make)  # the image rows of the joint sequence
    weight = torch.randn(width, width, **make) / width**0.5
    bias = torch.randn(width, **make)

    def dense() -> torch.Tensor:
        return torch.nn.functional.linear(x, weight, bias)

    expected = dense()
    for sparsity in (0.0, 0.5, 0.8):
        cache = cache_bits(options, sparsity)
        indptr = torch.tensor([0, cache.numel()], dtype=torch.int32, device=options.device)
        sparse_info, sparse_info_indptr = pack(cache, indptr)

        def sparse(info=sparse_info, offsets=sparse_info_indptr) -> torch.Tensor:
            return flashomni.flashomni_gemm(x, weight, options.heads, info, offsets, options.text, bias)

        # Text need not fill whole blocks: a row's block is counted from the joint sequence's first token.
        rows = cache.repeat_interleave(128, 0)[options.text : options.tokens]
        active = rows.repeat_interleave(options.head_dim, 1)
        out = sparse()[0]
        if out[~active].any():
            raise SystemExit("gemm-q: a cached tile was written")
        check("gemm-q", out[active], expected[0][active])
        row("gemm-q", 1 - float(rows.float().mean()), *milliseconds(options, sparse, dense))


if __name__ == "__main__":
    main()
