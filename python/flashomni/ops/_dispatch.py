"""How an operator is called: straight into the native library, or as a torch.library operator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flashomni._native import library
from flashomni.symbols import SparseSymbols

_torch_library = torch.library.Library("flashomni", "DEF")
_local = threading.local()
_FIRST_BYTES = 1 << 16
_ready: set[int] = set()  # CUDA devices whose backend is loaded


def define(
    schema: str, call: Callable[..., Any], fake: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> Any:
    """Defines `flashomni::<schema>` as `call`, with `fake` for tracing. Returns the OpOverload."""
    name = schema[: schema.index("(")]
    _torch_library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag, *tags))
    _torch_library.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashomni::{name}", fake, lib=_torch_library)
    return getattr(torch.ops.flashomni, name).default


def no_result(*_: Any) -> None:
    """The fake of an operator that only writes into its arguments."""


class Native:
    """A native operator, called on torch's tensors.

    arguments: the names of its tensor arguments, in order; a "?" ends those that may be None.
    counts: whether it counts, on a GPU, with the context's counter.
    """

    __slots__ = ("counts", "function", "names", "required")

    def __init__(self, function: str, arguments: str, counts: bool = False):
        names = arguments.split(", ")
        self.function = function
        self.counts = counts
        self.names = tuple(name.rstrip("?") for name in names)
        self.required = tuple(i for i, name in enumerate(names) if not name.endswith("?"))

    def is_direct(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """check_tensors(), quick where nothing is wrong: this comes before every call.

        Tensors without plain memory pass; invoke() refuses them.
        """
        if torch.compiler.is_compiling():
            return check_tensors(self.names, tensors, self.required)
        grad = torch.is_grad_enabled()
        for i in self.required:
            if tensors[i] is None:
                return check_tensors(self.names, tensors, self.required)
        for tensor in tensors:
            if tensor is None:
                continue
            kind = type(tensor)
            plain = kind is Tensor or kind is Parameter
            if not plain or tensor.is_neg() or (grad and tensor.requires_grad):
                return check_tensors(self.names, tensors, self.required)
        return True

    def invoke(self, *arguments: Any) -> None:
        """Calls it on the device of the first tensor; ValueError for tensors without plain memory."""
        like = arguments[0]
        try:
            if like.is_cpu:
                _invoke_on_cpu(self.function, arguments)
            else:
                _invoke_on_gpu(self, like, arguments)
        except Exception:
            # What has no plain memory cannot be handed over, and whoever finds that out knows no name.
            for name, tensor in zip(self.names, arguments, strict=False):
                if tensor is not None:
                    _expect_plain_memory(name, tensor)
            raise


def check_tensors(
    names: tuple[str, ...], tensors: tuple[Tensor | None, ...], required: tuple[int, ...]
) -> bool:
    """Checks the tensor arguments; True if they can go straight to the native library.

    TypeError for what is no tensor (the `required` ones may not be None), RuntimeError for tensors that
    require grad, ValueError for lazily negated or conjugated views and tensors without plain memory. False
    under torch.compile and for tensor subclasses, which torch must see.
    """
    compiling = torch.compiler.is_compiling()
    direct = not compiling
    grad = torch.is_grad_enabled()
    for i, tensor in enumerate(tensors):
        if tensor is None and i not in required:
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{names[i]}: expected a torch.Tensor, got {kind.__name__}")
            direct = False
        if grad and tensor.requires_grad:
            raise RuntimeError(
                f"{names[i]}: expected a tensor that does not require grad, as FlashOmni is for inference; "
                "call it under torch.no_grad() or torch.inference_mode()"
            )
        if not compiling:
            _expect_plain_memory(names[i], tensor)
    return direct


def _expect_plain_memory(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        unusual = "one on the meta device"
    elif tensor.layout is not torch.strided:
        unusual = f"layout {tensor.layout}"
    elif tensor.is_neg() or tensor.is_conj():
        unusual = "a lazily negated or conjugated view: resolve it with .resolve_neg() or .resolve_conj()"
    else:
        return
    raise ValueError(f"{name}: expected a tensor with plain memory, got {unusual}")


def _invoke_on_cpu(function: str, arguments: tuple) -> None:
    """Each thread keeps one workspace, grown as needed."""
    native = getattr(library, function)
    workspaces = _local.__dict__
    workspace = workspaces.get("cpu")
    if workspace is None:
        workspace = workspaces["cpu"] = _workspace("cpu", _FIRST_BYTES)
    threads = torch.get_num_threads()
    needed = native(*arguments, workspace, threads)
    if needed:
        workspace = workspaces["cpu"] = _workspace("cpu", needed)
        native(*arguments, workspace, threads)


def _invoke_on_gpu(operator: Native, like: Tensor, arguments: tuple) -> None:
    """Work on one stream runs in order, so each thread keeps a workspace and a counter a stream for all its
    calls there. Under capture the workspace comes from the graph's own memory, and the counter is the call's
    own, since a graph may be replayed on any stream.
    """
    index = like.get_device()
    if index not in _ready:
        _make_ready(like)
    native = getattr(library, operator.function)
    if _is_capturing():
        needed = native(*arguments, None, 0)
        counter = _counters[index].take() if operator.counts else 0
        native(*arguments, _workspace(like.device, needed), counter)
        return
    kept = _local.__dict__
    key = (index, _raw_stream(index))
    mine = kept.get(key)
    if mine is None:
        counter = _counters[index].take() if index in _ready else 0
        mine = kept[key] = (_workspace(like.device, _FIRST_BYTES), counter)
    workspace, counter = mine
    needed = native(*arguments, workspace, counter)
    if needed:
        workspace = _workspace(like.device, needed)
        kept[key] = (workspace, counter)
        native(*arguments, workspace, counter)


class _Counters:
    """Numbers in a GPU's memory that operators count with. Each is 0 before a call and after it, so that
    nothing has to set it to 0. They are not given back, since a graph may be replayed at any time.
    """

    _MANY, _BYTES = 1 << 18, 4

    def __init__(self, index: int):
        self._index = index
        self._lock = threading.Lock()
        self._memory: list[Tensor] = []
        self._next = self._end = 0

    def take(self) -> int:
        """The address of one; 0, for none, under capture if none is left, as memory cannot be set then."""
        with self._lock:
            if self._next == self._end and not self._add():
                return 0
            address = self._next
            self._next += self._BYTES
            return address

    def _add(self) -> bool:
        if _is_capturing():
            return False
        with torch.inference_mode(False):
            zeros = torch.zeros(self._MANY, dtype=torch.int32, device=f"cuda:{self._index}")
        torch.cuda.current_stream(self._index).synchronize()  # other streams use them
        self._memory.append(zeros)
        self._next = zeros.data_ptr()
        self._end = self._next + self._MANY * self._BYTES
        return True


_counters: dict[int, _Counters] = {}


def _make_ready(like: Tensor) -> None:
    """Loads the backend of a GPU before its first call. Other devices the native library refuses."""
    if like.is_cuda:
        from flashomni import jit

        index = like.get_device()
        jit.ensure(index)
        _counters.setdefault(index, _Counters(index))
        _ready.add(index)


def _raw_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


# What torch's own compiled code calls: it takes a tenth of the time, and is absent where torch has no CUDA.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _raw_stream)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


def _workspace(device: torch.device | str, size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device=device)


def expect_dims(name: str, tensor: Tensor, layout: str) -> None:
    """ValueError unless `tensor` has as many dimensions as `layout`, e.g. "B, M, K", names."""
    if tensor.ndim != layout.count(",") + 1:
        raise ValueError(f"{name}: expected [{layout}], got {describe(tensor)}")


def expect(name: str, what: str, value: Any, wanted: Any) -> None:
    """ValueError unless two numbers agree."""
    if value != wanted:
        raise ValueError(f"{name}: expected {wanted} {what}, got {value}")


def expect_integer(name: str, value: Any) -> None:
    """TypeError unless `value` is an integer (or, while tracing, a symbolic one)."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")


def expect_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def orders(name: str, tensors: Any, least: int, most: int) -> tuple[Tensor | None, ...]:
    """A list of tensors as `most` arguments, None past its end."""
    if isinstance(tensors, Tensor) or not hasattr(tensors, "__len__"):
        raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if not least <= len(tensors) <= most:
        raise ValueError(f"{name}: expected {least} to {most} tensors, got {len(tensors)}")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected tensors, got {type(tensor).__name__}")
    return (*tensors, *(None,) * (most - len(tensors)))


def expect_symbols(symbols: Any) -> None:
    if not isinstance(symbols, SparseSymbols):
        raise TypeError(f"symbols: expected SparseSymbols, got {type(symbols).__name__}")


def tile_arguments(symbols: SparseSymbols | None) -> tuple[Tensor | None, Tensor | None]:
    """The cache bits of `symbols` with their indptr; (None, None) without symbols."""
    if symbols is None:
        return None, None
    expect_symbols(symbols)
    return symbols.cache, symbols.cache_indptr


def new_output(shape: tuple[int, ...], like: Tensor, cache: Tensor | None, dtype: Any = None) -> Tensor:
    """An output; zero where cached tiles will not be written."""
    make = torch.empty if cache is None else torch.zeros
    return make(shape, dtype=dtype or like.dtype, device=like.device)
