"""What this machine has, and whether FlashOmni can use it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = {
    "torch": "needed",
    "apache-tvm-ffi": "needed: loads the C++ library",
    "diffusers": "for flashomni.enable and tiny_flux",
    "transformers": "for diffusers' pipelines",
    "safetensors": "for tiny_flux",
    "pillow": "for pictures",
    "matplotlib": "for the quality plot",
}
ISA_FLAGS = {  # what /proc/cpuinfo says where the instruction set is there
    "avx512bf16": ("avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx2": ("avx2", "fma", "f16c"),
    "generic": (),
}


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_info() -> tuple[str, set[str]]:
    """The chip's name and its feature flags; where /proc/cpuinfo is missing, what Python knows and no
    flags.
    """
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return name, flags


def native() -> dict:
    """State of the C++ library: {found, isa, backends, error}; never raises, since it is what a doctor
    reports.
    """
    from flashomni import _native

    try:
        return {"found": True, "isa": _native.cpu_isa(), "backends": _native.backends(), "error": None}
    except Exception as error:
        return {"found": False, "isa": None, "backends": [], "error": str(error)}


def cuda() -> dict:
    """What the CUDA backend has here: {driver, torch_cuda, nvcc, cache, plugin, gpus}. Builds nothing.

    nvcc: {found, path, version, error}. plugin: {kind, path, detail}, kind one of "given", "installed",
    "cached", "would build", "cannot". gpus: rows of index, name, capability, served, reason.
    """
    import torch

    from flashomni.jit import build, plugin, toolkit

    try:
        tools = toolkit.find()
        nvcc = {
            "found": True,
            "path": str(tools.nvcc),
            "version": ".".join(map(str, tools.version)),
            "error": None,
        }
    except Exception as error:
        nvcc = {"found": False, "path": None, "version": None, "error": str(error)}
    state = plugin.state()
    return {
        "driver": driver(),
        "torch_cuda": torch.version.cuda,
        "nvcc": nvcc,
        "cache": str(build.cache_folder()),
        "plugin": {"kind": state.kind, "path": str(state.path or ""), "detail": state.detail},
        "gpus": plugin.gpus(),
    }


def driver() -> str | None:
    """The NVIDIA driver's version, as the kernel module or nvidia-smi tells it; None without one."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0]
        if found := re.search(r"\b(\d+\.\d+(\.\d+)?)\b", line):
            return found[1]
    except OSError:
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.partition("\n")[0].strip() or None if result.returncode == 0 else None


def machine() -> dict:
    """What numbers from this machine depend on, flat and JSON-ready."""
    import torch

    import flashomni

    name, _ = cpu_info()
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": native()["isa"],
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "flashomni": flashomni.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def report() -> dict:
    """Everything that `flashomni doctor` prints: {ok, machine, native, isas, cuda, packages}."""
    # First, as it loads the plugin where there is one, which the backends' rows then show.
    found = cuda() if native()["found"] else None
    library = native()
    _, flags = cpu_info()
    isas = {isa: all(flag in flags for flag in need) for isa, need in ISA_FLAGS.items()}
    packages = {name: (package_version(name), why) for name, why in PACKAGES.items()}
    complete = all(version for version, why in packages.values() if why.startswith("needed"))
    return {
        "ok": library["found"] and complete and any(backend["serves"] for backend in library["backends"]),
        "machine": machine(),
        "native": library,
        "isas": isas,
        "cuda": found,
        "packages": packages,
    }


def show(console) -> bool:
    """Prints the report to a rich console; True if all is well."""
    from rich.table import Table

    found = report()
    library, host = found["native"], found["machine"]
    console.print(f"[bold]FlashOmni[/] {host['flashomni']} · Python {host['python']} · {host['system']}")
    console.print(f"CPU: {host['cpu']}, {host['cores']} cores, {host['threads']} threads in use")
    if library["found"]:
        isas = ", ".join(
            f"[bold green]{isa}[/]" if isa == library["isa"] else isa
            for isa, there in found["isas"].items()
            if there
        )
        forced = os.environ.get("FLASHOMNI_CPU_ISA")
        console.print(
            f"C++ library: found; instruction sets here: {isas}" + (f" (forced: {forced})" if forced else "")
        )
        table = Table(
            "backend", "device", "serves", "why not", title="Backends, in order", title_justify="left"
        )
        for row in library["backends"]:
            table.add_row(row["name"], row["device"], "yes" if row["serves"] else "no", row["reason"])
        console.print(table)
        show_cuda(console, found["cuda"])
    else:
        console.print("[bold red]C++ library: not usable[/]")
        console.print(library["error"], markup=False)
    table = Table("package", "version", "what for", title="Packages", title_justify="left")
    for name, (version, why) in found["packages"].items():
        table.add_row(name, version or "[red]missing[/]", why)
    console.print(table)
    console.print(
        "[green]All is well.[/]" if found["ok"] else "[red]FlashOmni cannot run here yet: see above.[/]"
    )
    return found["ok"]


def show_cuda(console, found: dict) -> None:
    """The part about GPUs."""
    from rich.table import Table

    nvcc, plugin = found["nvcc"], found["plugin"]
    kinds = {
        "given": "taken from FLASHOMNI_PLUGIN_PATH",
        "installed": "built at install",
        "cached": "built before, in the cache",
        "would build": "not built yet",
        "cannot": "cannot be built",
    }
    driver = found["driver"] or "none"
    console.print(f"CUDA: NVIDIA driver {driver}, torch for CUDA {found['torch_cuda'] or '(none)'}")
    if nvcc["found"]:
        console.print(f"nvcc: {nvcc['version']}, {nvcc['path']}", markup=False)
    else:
        console.print(nvcc["error"], markup=False)
    where = plugin["path"] or (plugin["detail"] if plugin["detail"] != nvcc["error"] else "")
    console.print(f"CUDA backend: {kinds[plugin['kind']]}" + (f": {where}" if where else ""), markup=False)
    console.print(f"cache folder: {found['cache']}", markup=False)
    if not found["gpus"]:
        console.print("GPUs: none that torch sees")
        return
    table = Table("GPU", "name", "capability", "served", "by or why not", title="GPUs", title_justify="left")
    for row in found["gpus"]:
        table.add_row(
            str(row["index"]), row.get("name", "?"), row.get("capability", "?"), row["served"], row["reason"]
        )
    console.print(table)
