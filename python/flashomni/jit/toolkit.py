"""nvcc: found in the places where it usually is, asked for its version."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEAST = (13, 0)
ARCHITECTURES = "90a"  # as src/cuda/sm90/nvcc.options has it
USUAL = Path("/usr/local/cuda/bin/nvcc")
PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl"
ADVICE = (
    "install CUDA's toolkit 13.0 or newer, or `pip install "
    + " ".join(f"'{name}>=13,<13.1'" for name in PACKAGES.split())
    + "`, or name an nvcc with FLASHOMNI_NVCC"
)


class ToolkitError(RuntimeError):
    """No nvcc that will do, with what was found and what to install."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    version: tuple[int, int]
    identity: str  # what `nvcc --version` says
    compiler: Path  # the host's
    compiler_identity: str

    @property
    def name(self) -> str:
        return f"nvcc {self.version[0]}.{self.version[1]}"

    @property
    def command(self) -> list[str]:
        return [str(self.nvcc), "-ccbin", str(self.compiler)]

    @property
    def link_folders(self) -> list[str]:
        """PyPI's packages keep libraries in lib, where their nvcc does not look."""
        folder = self.nvcc.parent.parent / "lib"
        return [f"-L{folder}"] if list(folder.glob("libcudart_static.a")) else []


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def _candidates() -> Iterator[tuple[str, Path]]:
    """Where an nvcc may be, the most explicit place first, with the name of the place."""
    if named := os.environ.get("FLASHOMNI_NVCC"):
        yield "FLASHOMNI_NVCC", Path(named)
        return
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            yield variable, Path(home) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        yield "PATH", Path(found)
    yield "/usr/local/cuda", USUAL
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield "nvidia-cuda-nvcc", Path(folder) / "cu13" / "bin" / "nvcc"


def _version(text: str) -> tuple[int, int] | None:
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def host_compiler() -> tuple[Path, str]:
    """The C++ compiler that nvcc shall use, and what it says of itself. ToolkitError if there is none."""
    named = os.environ.get("NVCC_CCBIN") or os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        if found := shutil.which(name):
            return Path(found), _output([found, "--version"]).partition("\n")[0]
    raise ToolkitError(
        f"C++ compiler: expected one that runs as '{named or 'g++'}', got none: install g++"
        + (", or set CXX to the name of one" if named else "")
    )


def check_architectures() -> None:
    """ToolkitError where FLASHOMNI_CUDA_ARCHS asks for what there are no kernels for."""
    named = os.environ.get("FLASHOMNI_CUDA_ARCHS") or ARCHITECTURES
    if named != ARCHITECTURES:
        raise ToolkitError(f"FLASHOMNI_CUDA_ARCHS: expected {ARCHITECTURES} (Hopper), got {named}")


def find() -> Toolkit:
    """The first nvcc of LEAST or newer. ToolkitError that lists what came instead."""
    check_architectures()
    seen = []
    for place, path in _candidates():
        if not path.is_file() or not os.access(path, os.X_OK):
            seen.append(f"{place}: no nvcc at {path}")
            continue
        identity = _output([str(path), "--version"])
        version = _version(identity)
        if version is None:
            seen.append(f"{place}: {path} --version names no release")
        elif version < LEAST:
            seen.append(f"{place}: {path} is {version[0]}.{version[1]}")
        else:
            return Toolkit(path, version, identity, *host_compiler())
    least = ".".join(map(str, LEAST))
    raise ToolkitError(
        f"nvcc: expected {least} or newer, got {'; '.join(seen) or 'none'}. To have one: {ADVICE}"
    )
