"""How a tensor is kept between steps: as it is or in e4m3, on the device or in the host's memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flashomni import ops
from flashomni.engine.buffers import Buffers, new_zeros
from flashomni.ops.forecast import scales_shape
from flashomni.symbols import SparseSymbols


class Traffic:
    """Copies between the host's memory and a GPU, on a stream of their own beside the layers' work.

    All that is copied on the device is scratch that layers share, so whoever is about to write there waits
    for the copies under way, and a copy waits for the work before it. On the CPU they are plain copies.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._busy = False

    def copy(self, to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Starts to copy: after all work so far, before what comes after wait()."""
        device = next((t.device for t in (*to, *tensors) if t.is_cuda), None)
        if device is None:
            for target, tensor in zip(to, tensors, strict=True):
                target.copy_(tensor)
            return
        if self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for target, tensor in zip(to, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
        self._busy = True

    def wait(self) -> None:
        """Work from here on comes after the copies."""
        if self._busy:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def join(self) -> None:
        """The pass is over: no copy outlives it, so that it can be captured and its memory freed."""
        self.wait()
        self._busy = False


class Kept:
    """A tensor of one shape and of `like`'s dtype that outlives the step that wrote it.

    Write into space(), then keep() it; read() gives it back later. Between them, what is not kept as it is
    on the device uses scratch tensors called `name`, which all layers share: one is valid until the next
    layer asks for it. fp8: in e4m3 with a scale for every 128 columns. traffic: in the host's memory.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        like: Tensor,
        buffers: Buffers,
        *,
        fp8: bool = False,
        traffic: Traffic | None = None,
    ):
        self.name, self.shape, self.like = name, shape, like.new_empty(0)
        self.buffers, self.fp8, self.traffic = buffers, fp8, traffic
        self._forms = [("", shape, like.dtype)]
        if fp8:
            values = (" values", shape, torch.float8_e4m3fn)
            self._forms = [values, (" scales", scales_shape(shape), torch.float32)]
        device = torch.device("cpu") if traffic is not None else like.device
        pinned = traffic is not None and like.is_cuda
        self.parts = [new_zeros(form, dtype, device, pinned=pinned) for _, form, dtype in self._forms]

    @property
    def on_host(self) -> bool:
        return self.traffic is not None

    def _here(self) -> list[Tensor]:
        """The parts on the device."""
        if self.traffic is None:
            return self.parts
        return [
            self.buffers.take(self.name + part, shape, self.like, dtype) for part, shape, dtype in self._forms
        ]

    def prefetch(self) -> None:
        """read() will come: a copy from the host can start."""
        if self.traffic is not None:
            self.traffic.copy(self._here(), self.parts)

    def arrived(self) -> list[Tensor]:
        """The parts on the device, after prefetch(), to be read and written."""
        if self.traffic is not None:
            self.traffic.wait()
        return self._here()

    def written(self) -> None:
        """What arrived() gave has been written."""
        if self.traffic is not None:
            self.traffic.copy(self.parts, self._here())

    def read(self) -> Tensor:
        """After prefetch()."""
        parts = self.arrived()
        if not self.fp8:
            return parts[0]
        out = self.space()
        return forecast([self], unit(out.device), out)

    def space(self) -> Tensor:
        """Where to write what is to be kept."""
        parts = self.arrived()
        if not self.fp8:
            return parts[0]
        return self.buffers.take(self.name, self.shape, self.like)

    def keep(self, tensor: Tensor) -> None:
        """tensor: what read() or space() gave, written since."""
        if self.fp8:
            ops.quantize_fp8(tensor, *self._here())
        self.written()


def update(
    kept: Sequence[Kept], feature: Tensor, *, gap: int, valid: int, last: Tensor | None = None
) -> None:
    """Keeps the differences of `feature`, see ops.taylor_update; all kept alike, what is on the host after
    prefetch()."""
    values, *rest = zip(*(one.arrived() for one in kept), strict=True)
    scales = rest[0] if rest else None
    ops.taylor_update(feature, values, gap=float(gap), valid=valid, scales=scales, last=last)
    for one in kept:
        one.written()


def differences(
    kept: Sequence[Kept], feature: Tensor, *, gap: int, valid: int, last: Tensor | None = None
) -> list[Tensor]:
    """The same for who needs the differences too, as they are before e4m3: [feature, the first one, ..].

    last: receives the difference one order above those kept. In e4m3 it takes a kernel an order: the
    difference that one makes, the next one keeps.
    """
    found = [feature, *(one.space() for one in kept[1:])]
    if last is not None:
        found.append(last)
    if not kept[0].fp8:
        update(kept, feature, gap=gap, valid=valid, last=last)
        return found
    for i, one in enumerate(kept):
        above = found[i + 1] if i + 1 < len(found) else None
        update([one], found[i], gap=gap, valid=int(i < valid), last=above)
    return found


def forecast(
    kept: Sequence[Kept],
    coefficients: Tensor,
    out: Tensor,
    symbols: SparseSymbols | None = None,
    **which: int | str,
) -> Tensor:
    """out = sum_i coefficients[i] kept[i], all kept alike and on the device by now.

    symbols, which: on some row blocks alone, as ops.taylor_forecast takes them.
    """
    parts = [one._here() for one in kept]
    if not kept[0].fp8:
        return ops.taylor_forecast([part for (part,) in parts], coefficients, out, None, symbols, **which)
    values, scales = zip(*parts, strict=True)
    return ops.taylor_forecast(values, coefficients, out, scales, symbols, **which)


@functools.lru_cache(maxsize=64)
def unit(device: torch.device) -> Tensor:
    """The coefficients of a single order: float32 [1], a one."""
    with torch.inference_mode(False):
        return torch.ones(1, device=device)
