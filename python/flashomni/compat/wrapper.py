"""The published attention wrapper, on sparse_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashomni.compat import execution
from flashomni.compat import plan as planning
from flashomni.compat.bits import expect_bits, expect_no_indptr, renamed
from flashomni.ops._dispatch import describe

_LAYOUTS = ("NHD", "HND")
_BACKENDS = ("auto", "fa2", "fa3")  # published kernels; here the device decides in all cases
_NAMES = {"q_indptr": "qo_indptr", "scale": "sm_scale"}
_ERRORS = (ValueError, TypeError, NotImplementedError, RuntimeError)


class BatchFlashOmniFAWithRaggedKVWrapper:
    """Block-sparse attention over a ragged batch: plan() the lengths once, run() as often as wanted.

    float_workspace_buffer: any tensor; its device is where the wrapper works. Operators bring their own
        workspace, so its memory is not touched.
    kv_layout: of k and v: "NHD" [tokens, heads, D] or "HND" [heads, tokens, D]. q and out are "NHD" always.
    use_cuda_graph: a captured run() obeys the lengths of later plan() calls, which are written into
        qo_indptr_buf and kv_indptr_buf, int32 [B + 1] on the device, and the bits that lie in its tensors.
    backend: "auto", or "fa2" and "fa3", the names of published kernels; FLASHOMNI_BACKEND forces one of ours.
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        kv_indptr_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(float_workspace_buffer, Tensor):
            got = type(float_workspace_buffer).__name__
            raise TypeError(f"float_workspace_buffer: expected a torch.Tensor, got {got}")
        if kv_layout not in _LAYOUTS:
            raise ValueError(f'kv_layout: expected "NHD" or "HND", got {kv_layout!r}')
        if backend not in _BACKENDS:
            raise ValueError(
                f'backend: expected "auto", "fa2" or "fa3", got {backend!r}; FLASHOMNI_BACKEND forces one'
            )
        for name, buffer in (("custom_mask_buf", custom_mask_buf), ("mask_indptr_buf", mask_indptr_buf)):
            if buffer is not None:
                raise NotImplementedError(
                    f"{name}: expected None, got {describe(buffer)}: a captured run cannot see the mask of "
                    "a later plan; plan it with a wrapper without use_cuda_graph, and capture that one's run"
                )
        self.device = float_workspace_buffer.device
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer: Tensor | None = None
        self._kv_layout = kv_layout
        self._use_cuda_graph = bool(use_cuda_graph)
        for name, buffer in (("qo_indptr_buf", qo_indptr_buf), ("kv_indptr_buf", kv_indptr_buf)):
            self._check_buffer(name, buffer)
        self._given = (qo_indptr_buf, kv_indptr_buf)
        self._qo_indptr_buf, self._kv_indptr_buf = self._given
        self._plan: planning.Plan | None = None

    def _check_buffer(self, name: str, buffer: Tensor | None) -> None:
        if buffer is None:
            if self._use_cuda_graph:
                raise ValueError(f"{name}: expected int32[B + 1], as use_cuda_graph is True, got None")
            return
        if buffer.dtype != torch.int32 or buffer.ndim != 1 or buffer.device != self.device:
            raise ValueError(
                f"{name}: expected int32[B + 1] on {self.device}, got {describe(buffer)} on {buffer.device}"
            )

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        """Takes other workspaces, on the same device. Their memory is not touched."""
        for name, buffer in (
            ("float_workspace_buffer", float_workspace_buffer),
            ("int_workspace_buffer", int_workspace_buffer),
        ):
            if not isinstance(buffer, Tensor) or buffer.device != self.device:
                got = f"one on {buffer.device}" if isinstance(buffer, Tensor) else type(buffer).__name__
                raise ValueError(f"{name}: expected a tensor on {self.device}, got {got}")
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = int_workspace_buffer

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        sparse_block_size_for_q: int = 128,
        sparse_block_size_for_kv: int = 128,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Says what the next runs are about. Reads the indptrs and the mask, so it waits for their device.

        qo_indptr, kv_indptr: int32 [B + 1] on any device: the tokens where each sequence starts.
        head_dim_qk: 64, 72, 80, 96, 128 or 256. Blocks (query x key): 128 x 128, 128 x 64 or 64 x 64.
        custom_mask: bool, B segments [Nq, Nkv] one after the other, True = seen; packed_custom_mask: its
            little-endian bits, each segment from a byte of its own. Exact; beside bits, both apply. A mask
            costs one pass for each set of keys that some rows see (docs/migration.md); a GPU takes up to 64
            such sets.
        causal: exact to the token; the last query sees the last key. Not beside a mask.
        sm_scale: 1 / sqrt(head_dim_qk) unless given.
        q_data_type, kv_data_type: float16, bfloat16 or (CPU) float32, and the same.

        Raises ValueError or TypeError that names the argument, NotImplementedError for what is not served:
        another head_dim_vo, pos_encoding_mode, use_fp16_qk_reduction, logits_soft_cap, rope_scale,
        rope_theta.
        """
        planning.refuse_unserved(
            *(head_dim_qk, head_dim_vo, pos_encoding_mode, use_fp16_qk_reduction),
            *(logits_soft_cap, rope_scale, rope_theta),
        )
        planning.check_numbers(
            num_qo_heads, num_kv_heads, head_dim_qk, sparse_block_size_for_q, sparse_block_size_for_kv
        )
        q_dtype = planning.dtype_of("q_data_type", q_data_type)
        if kv_data_type is not None and planning.dtype_of("kv_data_type", kv_data_type) != q_dtype:
            raise NotImplementedError(f"kv_data_type: expected q_data_type = {q_dtype}, got {kv_data_type}")
        plan = planning.Plan(
            lengths=planning.lengths_of(qo_indptr, kv_indptr),
            heads=num_qo_heads,
            kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            block_q=sparse_block_size_for_q,
            block_kv=sparse_block_size_for_kv,
            q_dtype=q_dtype,
            causal=bool(causal),
            scale=planning.scale_of(sm_scale),
        )
        if self._use_cuda_graph and (custom_mask is not None or packed_custom_mask is not None):
            raise NotImplementedError(
                "custom_mask: expected None with use_cuda_graph=True: a captured run cannot see the mask of "
                "a later plan; capture the run of a wrapper without it"
            )
        planning.add_mask(plan, custom_mask, packed_custom_mask, self.device)
        self._keep(plan, qo_indptr, kv_indptr)

    begin_forward = plan

    def end_forward(self) -> None:
        """Nothing: a plan needs no end."""

    def _keep(self, plan: planning.Plan, qo_indptr: Tensor, kv_indptr: Tensor) -> None:
        """The plan, and the attributes that callers read after it."""
        buffers = []
        for name, given, indptr in zip(
            ("qo_indptr", "kv_indptr"), self._given, (qo_indptr, kv_indptr), strict=True
        ):
            if given is None:
                buffers.append(indptr.to(self.device, copy=True))
            elif given.shape != indptr.shape:
                raise ValueError(
                    f"{name}: expected int32{list(given.shape)}, as {name}_buf, got {describe(indptr)}"
                )
            else:
                buffers.append(given.copy_(indptr))
        self._qo_indptr_buf, self._kv_indptr_buf = buffers
        self._sparse_block_size_for_q, self._sparse_block_size_for_kv = plan.block_q, plan.block_kv
        self._sparse_info_indptr_base, self._sparse_kv_info_indptr_base = (
            torch.tensor(base, dtype=torch.int32, device=self.device) for base in plan.indptr_bases()
        )
        self._plan = plan

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sparse_info: Tensor | None = None,
        sparse_kv_info: Tensor | None = None,
        sparse_info_indptr: Tensor | None = None,
        sparse_kv_info_indptr: Tensor | None = None,
        is_full: bool = False,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """softmax(sm_scale * q k^T) v over the blocks that the bits select.

        q: [sum of Nq, H, D]; k, v: [sum of Nkv, Hkv, D], or [Hkv, sum of Nkv, D] in "HND"; the plan's dtype.
        sparse_info, sparse_kv_info: uint8, the cache and the skip bits (little-endian), with indptrs int32
            [B + 1] in bytes; or [B, bytes] without. None: everything computes.
        is_full: the bits are not looked at.
        out: q's shape; rows of cached tiles stay as they were (zero in a new one). lse: float32 [sum of Nq,
            H], log2 of the sum of exponentials; likewise.

        Returns out, or (out, lse) with return_lse. A row that sees no key gives 0 and lse = -inf. Raises
        ValueError, TypeError or NotImplementedError that names the argument, RuntimeError without a plan or
        for tensors that require grad.
        """
        plan = self._plan
        if plan is None:
            raise RuntimeError("run: expected a plan() before, got none")
        self._check_inputs(plan, q, k, v)
        if self._kv_layout == "HND":
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        bits = (sparse_info, sparse_kv_info, sparse_info_indptr, sparse_kv_info_indptr)
        if not isinstance(is_full, int):
            raise TypeError(f"is_full: expected a bool, got {is_full!r}")
        if is_full:
            bits = (None,) * 4
        self._check_bits(plan, *bits)
        out, lse = self._outputs(plan, q, bits[0], out, lse, return_lse)
        try:
            if plan.classes is not None:
                execution.masked(plan, q, k, v, bits, out, lse)
            elif plan.is_even and not self._use_cuda_graph:
                execution.batched(plan, q, k, v, bits, out, lse)
            else:
                indptrs = (self._qo_indptr_buf, self._kv_indptr_buf)
                execution.ragged(plan, indptrs, q, k, v, bits, out, lse)
        except _ERRORS as error:
            raise renamed(error, _NAMES) from None
        return (out, lse) if return_lse else out

    forward = run

    def run_return_lse(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """run() with return_lse=True."""
        return self.run(*args, **options, return_lse=True)

    forward_return_lse = run_return_lse

    def _check_inputs(self, plan: planning.Plan, q: Tensor, k: Tensor, v: Tensor) -> None:
        keys, tokens = (plan.kv_tokens, plan.kv_heads, plan.head_dim), 0
        if self._kv_layout == "HND":
            keys, tokens = (plan.kv_heads, plan.kv_tokens, plan.head_dim), 1
        for name, tensor, shape, axis in (
            ("q", q, (plan.q_tokens, plan.heads, plan.head_dim), 0),
            ("k", k, keys, tokens),
            ("v", v, keys, tokens),
        ):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.dtype != plan.q_dtype:
                raise TypeError(f"{name}: expected {plan.q_dtype}, as in plan(), got {describe(tensor)}")
            if tensor.device != self.device:
                raise ValueError(f"{name}: expected a tensor on {self.device}, got one on {tensor.device}")
            if not self._fits(tensor, shape, axis):
                layout = self._kv_layout if name != "q" else "NHD"
                raise ValueError(f"{name}: expected {list(shape)} ({layout}), got {describe(tensor)}")

    def _fits(self, tensor: Tensor, shape: tuple[int, ...], tokens: int) -> bool:
        """In a graph tensors keep their size, and a later plan may fill fewer of their tokens."""
        if not self._use_cuda_graph or tensor.ndim != 3:
            return tuple(tensor.shape) == shape
        used = [*tensor.shape]
        used[tokens] = min(used[tokens], shape[tokens])
        return tuple(used) == shape

    @staticmethod
    def _check_bits(
        plan: planning.Plan,
        cache: Tensor | None,
        skip: Tensor | None,
        cache_indptr: Tensor | None,
        skip_indptr: Tensor | None,
    ) -> None:
        for name, part, indptr in (
            ("sparse_info", cache, cache_indptr),
            ("sparse_kv_info", skip, skip_indptr),
        ):
            expect_no_indptr(name, part, indptr)
            if part is not None:
                expect_bits(name, part, indptr, plan.batch)

    def _outputs(
        self,
        plan: planning.Plan,
        q: Tensor,
        cache: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """New outputs are zero where nothing will be written: in cached tiles, past the last sequence."""
        partly = cache is not None or self._use_cuda_graph
        make = torch.zeros if partly else torch.empty
        if out is None:
            out = make(q.shape, dtype=q.dtype, device=q.device)
        elif out.shape != q.shape:
            raise ValueError(f"out: expected {list(q.shape)}, as q, got {describe(out)}")
        if lse is None and return_lse:
            lse = make(q.shape[:-1], dtype=torch.float32, device=q.device)
        elif lse is not None and lse.shape != q.shape[:-1]:
            raise ValueError(f"lse: expected float32{list(q.shape[:-1])}, got {describe(lse)}")
        return out, lse
