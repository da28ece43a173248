"""Which plugin a CUDA device needs, where it is, and loading it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashomni import _native
from flashomni.jit import build, sources, toolkit

CAPABILITY = (9, 0)
_lock = threading.Lock()


@dataclass(frozen=True)
class State:
    """How the plugin would be had now: kind is "given", "installed", "cached", "would build" or "cannot"."""

    kind: str
    path: Path | None
    detail: str


def _given() -> Path | None:
    """The plugin in a folder of FLASHOMNI_PLUGIN_PATH."""
    for folder in os.environ.get("FLASHOMNI_PLUGIN_PATH", "").split(":"):
        if folder and (path := Path(folder) / sources.LIBRARY).is_file():
            return path
    return None


def _installed() -> Path | None:
    """The plugin that FLASHOMNI_ENABLE_AOT=1 built at install."""
    import flashomni

    for folder in flashomni.__path__:
        if (path := Path(folder) / sources.LIBRARY).is_file():
            return path
    return None


def state() -> State:
    """Looks, and builds nothing. Never raises."""
    try:
        if path := _given():
            return State("given", path, "FLASHOMNI_PLUGIN_PATH")
        found = sources.find()
        note = ""
        if path := _installed():
            if sources.digest_of(path) == found.digest:
                return State("installed", path, "built at install")
            note = f"; {path} is of other sources and is not used"
        tools = toolkit.find()
        if path := build.cached(found, tools):
            return State("cached", path, f"built at first use{note}")
        return State("would build", None, f"at first use, with {tools.name}{note}")
    except Exception as error:
        return State("cannot", None, str(error))


def locate() -> Path:
    """The plugin's file, built now if it must be. Raises RuntimeError that says what is missing."""
    if path := _given():
        return path
    found = sources.find()
    if (path := _installed()) and sources.digest_of(path) == found.digest:
        return path
    return build.build(found, toolkit.find())


def ensure(index: int) -> None:
    """Sees to it that the plugin for CUDA device `index` is loaded; once a process, builds it if need be.

    NotImplementedError for a GPU that no backend serves, RuntimeError where the plugin cannot be had or a
    CUDA graph is being captured. Where FLASHOMNI_BACKEND names another backend nothing is loaded.
    """
    if os.environ.get("FLASHOMNI_BACKEND") not in (None, "", sources.BACKEND):
        return
    with _lock:
        if _native.loaded_plugins():
            return
        import torch

        refuse_unserved(index)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the CUDA backend is not loaded yet, and a graph is being captured: call flashomni.warmup() "
                "before"
            )
        _native.load_plugin(locate())


def refuse_unserved(index: int) -> None:
    """NotImplementedError for a GPU that no plugin is for, before anything is compiled for it."""
    import torch

    if torch.version.hip is not None:
        raise NotImplementedError(
            f"device: expected an NVIDIA GPU, got cuda:{index} of a ROCm build of torch"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        raise NotImplementedError(
            f"device: expected compute capability 9.0 (H100, H200), got cuda:{index}, "
            f"{torch.cuda.get_device_name(index)}, {capability[0]}.{capability[1]}; on the CPU all operators "
            "run"
        )


def warmup(device: Any = None) -> None:
    """Builds and loads the CUDA backend now, not at the first operator: do so before capturing a CUDA graph.

    device: a CUDA device or its index; the current one unless given. Raises as operators on it would.
    """
    import torch

    if isinstance(device, int):
        device = torch.device("cuda", device)
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    if not torch.cuda.is_available():
        raise RuntimeError("device: expected a CUDA device, got none: torch.cuda.is_available() is False")
    index = torch.cuda.current_device() if device.index is None else device.index
    ensure(index)
    _native.cuda_backend(index)


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device that torch sees: index, name, capability, served and reason.

    served is "yes", "no" or "once built".
    """
    import torch

    rows = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        row = {"index": index, "served": "yes", "reason": ""}
        try:
            row["name"] = torch.cuda.get_device_name(index)
            row["capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
            refuse_unserved(index)
            how = state()
            if how.path is None:
                row["served"] = "once built" if how.kind == "would build" else "no"
                row["reason"] = how.detail
            else:
                ensure(index)
                row["reason"] = _native.cuda_backend(index)
        except Exception as error:
            row.update(served="no", reason=str(error))
        rows.append(row)
    return rows
