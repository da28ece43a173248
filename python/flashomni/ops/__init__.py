"""The operators. Each is one call into the native library in eager mode, and a torch.library operator under
torch.compile and for tensor subclasses.

All are for inference: they refuse tensors that require grad while grad mode is on. On the CPU they use
torch.get_num_threads() threads. Errors (ValueError, TypeError, NotImplementedError) name the argument and
come before anything is written.
"""

from flashomni.ops.ada_layer_norm import ada_layer_norm
from flashomni.ops.attention import sparse_attention
from flashomni.ops.bits import packbits, segment_packbits
from flashomni.ops.forecast import quantize_fp8, taylor_forecast, taylor_update
from flashomni.ops.gemm import gemm_o_dispatch, gemm_o_update, gemm_q
from flashomni.ops.select import (
    block_mean,
    norm_rope,
    norm_rope_mean,
    select_flashomni,
    summarize_symbols,
)

__all__ = [
    "ada_layer_norm",
    "block_mean",
    "gemm_o_dispatch",
    "gemm_o_update",
    "gemm_q",
    "norm_rope",
    "norm_rope_mean",
    "packbits",
    "quantize_fp8",
    "segment_packbits",
    "select_flashomni",
    "sparse_attention",
    "summarize_symbols",
    "taylor_forecast",
    "taylor_update",
]
