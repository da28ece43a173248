"""Run inside an installed environment, away from the checkout: the package works as installed.

check.py STATE   STATE: what the CUDA backend must be: "installed", "would build" or "cannot"
"""

import sys

import torch

import flashomni
from flashomni import _native
from flashomni.jit import plugin


def operators() -> None:
    q, k, v = torch.randn(3, 200, 2, 64)
    indptr = torch.tensor([0, 200], dtype=torch.int32)
    wrapper = flashomni.attention.BatchFlashOmniFAWithRaggedKVWrapper(torch.empty(1))
    wrapper.plan(indptr, indptr, 2, 2, 64, q_data_type="float32")
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))
    torch.testing.assert_close(wrapper.run(q, k, v), expected.transpose(0, 1), atol=1e-4, rtol=1e-4)
    x, weight = torch.randn(1, 77, 64), torch.randn(64, 64)
    torch.testing.assert_close(flashomni.gemm_q(x, weight), x @ weight.T, atol=1e-4, rtol=1e-4)


def cuda_backend(expected: str) -> None:
    state = plugin.state()
    assert state.kind == expected, state
    if state.kind == "installed":
        assert _native.load_plugin(plugin.locate()) == "cuda_sm90"
    if state.kind == "cannot":
        assert "FLASHOMNI_NVCC" in state.detail, state


if __name__ == "__main__":
    operators()
    cuda_backend(sys.argv[1])
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"    Python {python}, torch {torch.__version__}, {_native.cpu_isa()}: {flashomni.__file__}")
