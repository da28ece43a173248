"""examples/cpp/gpu_attention.cc as a user builds it, against the install tree, run on the GPU."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_example(folder: Path) -> Path:
    """The program, which finds the library where it was installed."""
    jobs = str(min(8, os.cpu_count() or 1))
    run("cmake", "-S", ROOT, "-B", folder / "library", "-DCMAKE_BUILD_TYPE=Release", "-DFLASHOMNI_PYTHON=OFF")
    run("cmake", "--build", folder / "library", "-j", jobs)
    run("cmake", "--install", folder / "library", "--prefix", folder / "installed")
    prefix = f"-DCMAKE_PREFIX_PATH={folder / 'installed'}"
    run("cmake", "-S", ROOT / "examples/cpp", "-B", folder / "example", prefix)
    run("cmake", "--build", folder / "example", "-j", jobs)
    return folder / "example" / "gpu_attention"


@pytest.mark.gpu
def test_a_cpp_program_runs_attention_on_the_gpu(tmp_path) -> None:
    """It checks its own rows, and ends with 77 where it sees no GPU."""
    from flashomni.jit import plugin

    printed = run(build_example(tmp_path), FLASHOMNI_PLUGIN_PATH=str(plugin.locate().parent))
    assert "as it was" in printed, printed
