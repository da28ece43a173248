"""The native library, loaded when an operator is first called."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

_NAME = "libflashomni_ffi.so"


def _library_path() -> Path:
    import flashomni

    for folder in flashomni.__path__:
        path = Path(folder) / _NAME
        if path.is_file():
            return path
    raise RuntimeError(
        f"{_NAME} is not in {' nor in '.join(flashomni.__path__)}: build it with `make build` in a checkout, "
        "or install the package with `pip install .` (needs a C++20 compiler with OpenMP)"
    )


@functools.cache
def load() -> Any:
    """The loaded tvm-ffi module. RuntimeError with how to build it where the library is missing."""
    path = _library_path()
    import tvm_ffi

    tvm_ffi.error.register_error("NotImplementedError", NotImplementedError)
    return tvm_ffi.load_module(str(path))


class _Library:
    """Native functions as attributes; the first use of each looks it up."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(load(), name)
        setattr(self, name, function)
        return function


library = _Library()


def backends() -> list[dict[str, Any]]:
    """The backend table in priority order: name, device, serves (bool) and reason (why not, or "")."""
    keys = ("name", "device", "serves", "reason")
    return [
        dict(zip(keys, (str(n), str(d), bool(s), str(r)), strict=True)) for n, d, s, r in library.backends()
    ]


def load_plugin(path: Path) -> str:
    """Loads a plugin for the rest of the process; the name of its backend. RuntimeError if it is none."""
    return str(library.load_plugin(str(path)))


def loaded_plugins() -> list[dict[str, str]]:
    """The plugins that are loaded: name, path and sources, what they were built from."""
    keys = ("name", "path", "sources")
    return [dict(zip(keys, map(str, row), strict=True)) for row in library.loaded_plugins()]


def cuda_backend(index: int) -> str:
    """The backend that serves a CUDA device; NotImplementedError with every backend's reason if none does."""
    return str(library.cuda_backend(index))


def cpu_isa() -> str:
    """The CPU instruction set in use: "avx512bf16", "avx512", "avx2" or "generic".

    The environment variable FLASHOMNI_CPU_ISA forces one; ValueError if the chip lacks it.
    """
    return str(library.cpu_isa())
