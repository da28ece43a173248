"""Every CPU instruction set that this chip has, each in a process of its own."""

import os
import subprocess
import sys

import pytest

ISAS = ("generic", "avx2", "avx512", "avx512bf16")
CHOSEN = (
    "test_ops_attention.py::test_each_head_dim_and_dtype",
    "test_ops_attention.py::test_skipped_blocks_may_be_stood_for_by_their_means",
    "test_ops_gemm.py::test_gemm_q_of_a_model",
    "test_ops_gemm.py::test_a_forecast_of_a_linear_feature_is_exact",
    "test_ops_select.py::test_norm_is_torchs",
    "test_ops_forecast.py::test_strided_features",
    "test_ops_fp8.py::test_differences_are_quantised_and_nothing_else_is_rounded",
)


def run(*command: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "FLASHOMNI_CPU_ISA": isa},
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("isa", ISAS)
def test_operators_under(isa: str) -> None:
    asked = run("-c", "from flashomni._native import cpu_isa; print(cpu_isa())", isa=isa)
    if asked.returncode:
        # The chip lacks it: refused by name, and never silently replaced.
        assert isa != "generic" and "ValueError" in asked.stderr and isa in asked.stderr, asked.stderr
        pytest.skip(f"this chip has no {isa}")
    assert asked.stdout.strip() == isa
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *CHOSEN, isa=isa)
    assert result.returncode == 0, result.stdout[-4000:]


def test_an_unknown_instruction_set_is_refused() -> None:
    asked = run("-c", "from flashomni._native import cpu_isa; print(cpu_isa())", isa="mmx")
    assert asked.returncode and "ValueError" in asked.stderr and "mmx" in asked.stderr
