"""What a plugin is made of. The digest names it: cmake/cuda.cmake computes the same."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

BACKEND = "cuda_sm90"
LIBRARY = f"libflashomni_{BACKEND}.so"
OPTIONS = "src/cuda/sm90/nvcc.options"
EXPORTS = "src/cuda/plugin.map"
DIGEST_MARK = b"flashomni-sources-sha256:"

# Parts of the core that a plugin carries: how errors and messages are made.
_CORE = ("src/core/error.cc", "src/core/tensor.cc")
_FOLDERS = ("include/flashomni", "src/cuda")
_SUFFIXES = {".cu", ".cuh", ".h", ".cc", ".map", ".options"}


@dataclass(frozen=True)
class Sources:
    root: Path
    files: tuple[str, ...]  # relative to root, sorted

    @functools.cached_property
    def units(self) -> list[str]:
        """What is compiled, each by itself."""
        return [name for name in self.files if name.endswith(".cu") or name in _CORE]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the lines "<path> <SHA-256 of the file>"."""
        lines = (
            f"{name} {hashlib.sha256((self.root / name).read_bytes()).hexdigest()}\n" for name in self.files
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def collect(root: Path) -> Sources:
    names = [name for name in _CORE if (root / name).is_file()]
    for folder in _FOLDERS:
        for path in (root / folder).rglob("*"):
            if path.suffix in _SUFFIXES and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return Sources(root, tuple(sorted(names)))


@functools.cache
def find() -> Sources:
    """The checkout's sources where the package runs from one, else those that came with the package.

    RuntimeError where there are neither.
    """
    import flashomni

    folders = [Path(folder) for folder in flashomni.__path__]
    roots = [folder.parents[1] for folder in folders] + [folder / "csrc" for folder in folders]
    for root in roots:
        if (root / OPTIONS).is_file() and (root / "include/flashomni/plugin.h").is_file():
            return collect(root)
    raise RuntimeError(
        f"the CUDA sources are not in {' nor in '.join(map(str, roots))}: reinstall flashomni from a wheel "
        "or a checkout"
    )


def digest_of(library: Path) -> str | None:
    """The digest that a built plugin carries, read without loading it; None if there is none."""
    content = library.read_bytes()
    at = content.find(DIGEST_MARK) + len(DIGEST_MARK)
    digest = content[at : at + 64]
    if at < len(DIGEST_MARK) or len(digest) != 64 or not all(byte in b"0123456789abcdef" for byte in digest):
        return None
    return digest.decode()
