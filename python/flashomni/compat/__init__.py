"""The interface that was published with the paper, on this project's operators. docs/migration.md compares.

wrapper    BatchFlashOmniFAWithRaggedKVWrapper (also in flashomni.attention)
gemm       flashomni_gemm, flashomni_gemm_reduction
plan       what plan() checked and keeps for run()
masks      custom masks through block structure
bits       published bits as SparseSymbols; errors under the published names
"""

from flashomni.compat.gemm import flashomni_gemm, flashomni_gemm_reduction
from flashomni.compat.wrapper import BatchFlashOmniFAWithRaggedKVWrapper

__all__ = ["BatchFlashOmniFAWithRaggedKVWrapper", "flashomni_gemm", "flashomni_gemm_reduction"]
