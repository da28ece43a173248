"""One build of a plugin into the cache: <cache>/<key>/, where key names sources, flags and compilers.

A build happens in a folder of its own and is renamed when complete, under a lock a key: concurrent processes
compile once, and what is interrupted leaves nothing that could be taken for a plugin.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from flashomni.jit import sources as source_files
from flashomni.jit.sources import Sources
from flashomni.jit.toolkit import Toolkit

LOG = "build.log"
MANIFEST = "build.json"


class BuildError(RuntimeError):
    """nvcc failed; holds the end of what it said."""


def cache_folder() -> Path:
    """FLASHOMNI_CACHE_DIR, or flashomni in the user's cache folder."""
    if named := os.environ.get("FLASHOMNI_CACHE_DIR"):
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashomni"


def extra_flags() -> list[str]:
    """FLASHOMNI_NVCC_FLAGS, for those who work on the kernels."""
    return shlex.split(os.environ.get("FLASHOMNI_NVCC_FLAGS", ""))


def key_of(sources: Sources, toolkit: Toolkit) -> str:
    compilers = [toolkit.identity, str(toolkit.compiler), toolkit.compiler_identity]
    parts = [sources.digest, *extra_flags(), *compilers]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def cached(sources: Sources, toolkit: Toolkit) -> Path | None:
    """The plugin if it was built before."""
    library = cache_folder() / key_of(sources, toolkit) / source_files.LIBRARY
    return library if library.is_file() else None


def build(sources: Sources, toolkit: Toolkit) -> Path:
    """The plugin's file, from the cache or built now. BuildError with the end of nvcc's output."""
    if library := cached(sources, toolkit):
        return library
    cache, key = cache_folder(), key_of(sources, toolkit)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache / f"{key}.lock")
        with _Patience(lock):
            return cached(sources, toolkit) or _build_into(cache, key, sources, toolkit)
    except OSError as error:
        raise BuildError(
            f"the cache folder {cache} cannot be written ({error}): set FLASHOMNI_CACHE_DIR to one that can"
        ) from error


class _Patience:
    """Holds the lock; says so if another process has it."""

    def __init__(self, lock: filelock.BaseFileLock) -> None:
        self.lock = lock

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=0.5)
        except filelock.Timeout:
            _say("waiting for another process that builds the CUDA backend")
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _build_into(cache: Path, key: str, sources: Sources, toolkit: Toolkit) -> Path:
    for left in cache.glob(f"{key}.tmp-*"):  # under the lock: nobody works there
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=cache))
    try:
        begun = time.monotonic()
        units = len(sources.units)
        _say(f"building the {source_files.BACKEND} backend with {toolkit.name}, once ({units} files)")
        compile_plugin(sources, toolkit, folder, _count)
        seconds = time.monotonic() - begun
        manifest = {"sources": sources.digest, "nvcc": str(toolkit.nvcc), "seconds": round(seconds, 1)}
        (folder / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        target = cache / key
        shutil.rmtree(target, ignore_errors=True)  # without its library, or it would have been taken
        os.replace(folder, target)
        _say(f"built in {seconds:.0f} s: {target}")
        return target / source_files.LIBRARY
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _say(message: str) -> None:
    print(f"flashomni: {message}", file=sys.stderr, flush=True)


def _count(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(
            f"\rflashomni: {done} of {total} files",
            end="\n" if done == total else "",
            file=sys.stderr,
            flush=True,
        )


def compile_plugin(
    sources: Sources, toolkit: Toolkit, folder: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> Path:
    """Compiles and links in `folder`, and leaves the plugin and LOG, the compilers' report, there."""
    root = sources.root
    common = [*toolkit.command, "--options-file", str(root / source_files.OPTIONS), *extra_flags()]
    define = f'-DFLASHOMNI_SOURCES="{sources.digest}"'
    library = folder / source_files.LIBRARY
    objects = {name: folder / (name.replace("/", "_") + ".o") for name in sources.units}
    running = _Processes()
    log = []

    def compile_one(name: str) -> str:
        flags = [
            f"-I{root}",
            f"-I{root / 'include'}",
            define,
            "-c",
            str(root / name),
            "-o",
            str(objects[name]),
        ]
        return running.run([*common, *flags], name)

    # Large files first: they are what the end waits for.
    order = sorted(objects, key=lambda name: (name.endswith(".cc"), -(root / name).stat().st_size))
    with ThreadPoolExecutor(_jobs(len(order))) as pool:
        try:
            futures = [pool.submit(compile_one, name) for name in order]
            for done, future in enumerate(futures, 1):
                log.append(f"== {order[done - 1]}\n{future.result()}")
                progress(done, len(order))
        except BaseException:
            running.end()
            pool.shutdown(cancel_futures=True)
            raise
    link = ["-shared", "-o", str(library), *map(str, objects.values()), *toolkit.link_folders]
    exports = ["-Xlinker", f"--version-script={root / source_files.EXPORTS}", "-Xlinker", "--no-undefined"]
    log.append(f"== link\n{running.run([*common, *link, *exports], 'link')}")
    for path in objects.values():
        path.unlink()
    (folder / LOG).write_text("\n".join(log), encoding="utf-8")
    return library


def _jobs(units: int) -> int:
    """MAX_JOBS, as other builds of CUDA extensions have it, or the cores at hand."""
    named = os.environ.get("MAX_JOBS", "")
    return max(1, min(units, int(named) if named.isdigit() else len(os.sched_getaffinity(0)), 16))


class _Processes:
    """Compilers at work, each with its children, so that all end when one fails or the user stops them."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._ended = False
        self._lock = threading.Lock()  # none starts between end()'s look and its word

    def run(self, command: list[str], what: str) -> str:
        with self._lock:
            if self._ended:
                raise BuildError(f"{what}: stopped")
            process = self._start(command, what)
            self._running.add(process)
        output, _ = process.communicate()
        self._running.discard(process)
        if process.returncode != 0:
            tail = "\n".join(output.strip().splitlines()[-25:])
            raise BuildError(
                f"nvcc failed at {what} (exit code {process.returncode}):\n{tail}\n"
                f"the command was: {shlex.join(command)}"
            )
        return output

    @staticmethod
    def _start(command: list[str], what: str) -> subprocess.Popen:
        try:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
        except OSError as error:
            raise BuildError(f"{what}: {command[0]} cannot be run: {error}") from error

    def end(self) -> None:
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            try:
                os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
