"""Installs as users type them, each checked in an environment of its own. README.md lists the cases."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECK = Path(__file__).with_name("check.py")
NO_NVCC = {"FLASHOMNI_NVCC": "/nowhere/nvcc"}
AOT = {"FLASHOMNI_ENABLE_AOT": "1"}
CASES = {}


def case(function):
    """Registers a case under its name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None, fails: str = "") -> str:
    """Runs a command; its output. With `fails` it must not succeed, and say that."""
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if bool(fails) != (result.returncode != 0) or fails not in " ".join(result.stdout.split()):
        wanted = f"a failure that says {fails!r}" if fails else "success"
        failed = f"expected {wanted}, exit code {result.returncode}"
        sys.exit(f"{result.stdout}\n{' '.join(map(str, command))}: {failed}")
    return result.stdout


class Environment:
    """A Python with what the package depends on, and without the package; kept for all cases."""

    def __init__(self, work: Path, python: str, torch: str) -> None:
        name = str(python).strip("/").replace("/", "-")
        self.folder = work / f"env-{name}-{torch or 'any'}"
        self.python = self.folder / "bin" / "python"
        if not self.python.exists():
            run(python, "-m", "venv", self.folder)
            constraints = [] if torch else ["-c", ROOT / "constraints.txt"]
            wanted = [f"torch=={torch}" if torch else "torch>=2.11", "numpy", "apache-tvm-ffi>=0.1.12,<0.2"]
            self.pip("install", *constraints, *wanted)

    def pip(self, *arguments: object, **options: object) -> str:
        return run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments, **options)

    def check(self, state: str, env: dict[str, str] | None = None) -> None:
        """check.py, from a folder where no checkout can be imported by chance."""
        print(run(self.python, CHECK, state, env=env, cwd=self.folder), end="")

    def remove(self) -> None:
        self.pip("uninstall", "-y", "flashomni")


class Bench:
    """What cases share: the working folder, a copy of the checkout, the environment, the wheel."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work

    @functools.cached_property
    def environments(self) -> list[Environment]:
        pairs = zip(self.options.python, self.options.torch, strict=True)
        return [Environment(self.work, *pair) for pair in pairs]

    @property
    def environment(self) -> Environment:
        """The one that builds."""
        return self.environments[0]

    def checkout(self, name: str) -> Path:
        """The tracked files alone, as a clone has them."""
        folder = self.work / f"checkout-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        return folder

    @functools.cached_property
    def wheel(self) -> Path:
        return self.wheel_of(self.checkout("wheel"), self.work / "wheel")

    def wheel_of(self, source: Path, folder: Path) -> Path:
        """Built from a checkout or an sdist."""
        self.environment.pip("wheel", "--no-deps", "-w", folder, source, env=NO_NVCC)
        (wheel,) = folder.glob("*.whl")
        return wheel

    def check_everywhere(self, wheel: Path) -> None:
        """One wheel for every Python and torch: nothing is built again."""
        assert "-py3-none-" in wheel.name, wheel.name
        for environment in self.environments:
            environment.pip("install", wheel)
            environment.check("cannot", NO_NVCC)
            environment.remove()


def install_and_check(bench: Bench, name: str, state: str, env: dict[str, str], *how: str) -> Path:
    """pip install with PyPI's build isolation, as a user has it. Returns the checkout."""
    checkout = bench.checkout(name)
    bench.environment.pip("install", *how, checkout, env=env)
    bench.environment.check(state, env)
    return checkout


@case
def plain(bench: Bench) -> None:
    install_and_check(bench, "plain", "cannot", NO_NVCC)
    bench.environment.check("would build")
    bench.environment.remove()


@case
def editable(bench: Bench) -> None:
    checkout = install_and_check(bench, "editable", "cannot", NO_NVCC, "-e")
    with (checkout / "python/flashomni/__init__.py").open("a") as file:
        file.write('\nEDITED = "yes"\n')
    command = "import flashomni; print(flashomni.EDITED)"
    assert "yes" in run(bench.environment.python, "-c", command, cwd=bench.work)
    bench.environment.check("would build")
    bench.environment.remove()


@case
def aot(bench: Bench) -> None:
    install_and_check(bench, "aot", "installed", AOT)
    bench.environment.remove()


@case
def aot_editable(bench: Bench) -> None:
    install_and_check(bench, "aot-editable", "installed", {**AOT, "FLASHOMNI_CUDA_ARCHS": "90a"}, "-e")
    bench.environment.remove()


@case
def aot_no_nvcc(bench: Bench) -> None:
    checkout, message = bench.checkout("aot-no-nvcc"), "The CUDA backend needs nvcc 13.0 or newer"
    for how in ((), ("-e",)):
        bench.environment.pip("install", *how, checkout, env={**AOT, **NO_NVCC}, fails=message)


@case
def architectures(bench: Bench) -> None:
    env = {**AOT, "FLASHOMNI_CUDA_ARCHS": "80"}
    message = "FLASHOMNI_CUDA_ARCHS: expected 90a, got 80"
    bench.environment.pip("install", bench.checkout("architectures"), env=env, fails=message)


@case
def sdist(bench: Bench) -> None:
    folder, tool = bench.work / "sdist", bench.work / "build-tool"
    run(bench.options.python[0], "-m", "venv", tool)
    run(tool / "bin" / "python", "-m", "pip", "install", "-q", "build")
    run(tool / "bin" / "python", "-m", "build", "--sdist", "-o", folder, bench.checkout("sdist"))
    (archive,) = folder.glob("*.tar.gz")
    bench.check_everywhere(bench.wheel_of(archive, folder))


@case
def wheel(bench: Bench) -> None:
    bench.check_everywhere(bench.wheel)


@case
def cmake(bench: Bench) -> None:
    bench.environment.pip("install", bench.wheel)
    command = "import flashomni; print(flashomni.cmake_prefix_path())"
    prefix = run(bench.environment.python, "-c", command, cwd=bench.work).strip()
    build = bench.work / "example"
    tool = shutil.which("cmake") or sys.exit("cmake: expected one on PATH, got none")
    run(tool, "-S", ROOT / "examples/cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tool, "--build", build)
    run(build / "sparse_attention")
    bench.environment.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all unless named")
    parser.add_argument("--python", action="append", help="an interpreter (once or more; the first builds)")
    parser.add_argument(
        "--torch", action="append", help="torch's version for the interpreter of the same place"
    )
    parser.add_argument(
        "--work", type=Path, help="a folder to keep environments in; a temporary one unless given"
    )
    options = parser.parse_args()
    options.python = options.python or [sys.executable]
    options.torch = [*(options.torch or []), *[""] * (len(options.python) - len(options.torch or []))]
    with tempfile.TemporaryDirectory(prefix="flashomni-installs-") as temporary:
        work = (options.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, work)
        for name in options.cases or CASES:
            begun = time.monotonic()
            print(f"{name} ...", flush=True)
            CASES[name](bench)
            print(f"{name} passed in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
