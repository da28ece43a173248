"""examples/published_api at small size: each checks itself and prints a row a sparsity."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "published_api"
SMALL = "--device cpu --text 77 --image 435 --heads 2 --head-dim 64 --repeats 1".split()


@pytest.mark.parametrize("name", ["attention", "gemm_q", "gemm_o"])
def test_example(name) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *SMALL]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" ms  dense ") == 3, run.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["attention", "gemm_q", "gemm_o"])
def test_example_on_a_gpu(name) -> None:
    command = [
        sys.executable,
        str(FOLDER / f"{name}.py"),
        "--device",
        "cuda",
        "--image",
        "4096",
        "--repeats",
        "3",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
