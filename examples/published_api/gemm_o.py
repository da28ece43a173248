"""The sparse output projection by the published names: an Update's two calls, then a Dispatch's one.

python examples/published_api/gemm_o.py
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
    o = torch.randn(1, options.image, width, **make)
    weight = torch.randn(width, width, **make) / width**0.5
    bias = torch.randn(width, **make)

    def dense() -> torch.Tensor:
        return torch.nn.functional.linear(o, weight, bias)

    expected = dense()
    for sparsity in (0.0, 0.5, 0.8):
        cache = cache_bits(options, sparsity)
        indptr = torch.tensor([0, cache.numel()], dtype=torch.int32, device=options.device)
        shared = (o, weight, options.heads, *pack(cache, indptr), options.text)
        # Update: the cached heads' share with the bias is kept, and the active heads' share completes it.
        kept = flashomni.flashomni_gemm_reduction(*shared, bias, is_for_cache=True)

        def dispatch(shared=shared, kept=kept) -> torch.Tensor:
            return flashomni.flashomni_gemm_reduction(*shared, kept, is_for_cache=False)

        check("gemm-o", dispatch(), expected)
        rows = cache.repeat_interleave(128, 0)[options.text : options.tokens]
        row("gemm-o", 1 - float(rows.float().mean()), *milliseconds(options, dispatch, dense))


if __name__ == "__main__":
    main()
