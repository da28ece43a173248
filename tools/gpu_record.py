"""What was tested and measured on a GPU, kept with the digest of the kernels' sources.

    python tools/gpu_record.py measure [--out FOLDER] [tests] [sanitizer] [benchmarks] [e2e] [e2e-NAME]
    python tools/gpu_record.py check [FILE ...]     # exit code 1 where a record is not of today's sources
    python tools/gpu_record.py docs                 # writes docs/gpu-results.md from the records

`measure` writes FOLDER/<gpu>.json (bench/results unless given) part by part, each with the digest of the
sources that it is of; other parts are kept, so that a record can be made in several goes. Without names it
makes all parts but e2e: whole models, of which e2e-NAME is one. `check` wants the former of today's sources;
models of earlier kernels stay, and say so. It needs pytest, and compute-sanitizer from CUDA's toolkit;
FlashAttention-3 stands beside ours where PyPI's fa3-fwd is installed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import gpu_page

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs" / "gpu-results.md"
TESTS = ROOT / "tests" / "python"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ATTENTION_SHAPES = ((33280, 128), (16896, 128), (4608, 128), (33280, 64), (33280, 256))  # tokens, head_dim
SELECT_TOKENS = (33280, 4608)


def digest() -> str:
    """Of the kernels' sources as a compiler sees them: a comment, another layout or a header that nothing
    includes makes no record stale."""
    from flashomni.jit import sources

    found = sources.find()
    texts = {name: (found.root / name).read_text(encoding="utf-8") for name in found.files}
    started = [*found.units, *(name for name in texts if name.endswith((".map", ".options")))]
    lines = []
    for name in sorted(included(texts, started)):
        lines.append(f"{name} {hashlib.sha256(code_of(texts[name]).encode()).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def included(texts: Mapping[str, str], started: Iterable[str]) -> set[str]:
    """The files of `texts`, by their paths, that `started` and all they include are made of."""
    found, waiting = set(), list(started)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for wanted in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', texts[name], flags=re.MULTILINE):
            beside = (Path(name).parent / wanted).as_posix()
            waiting += [path for path in (wanted, f"include/{wanted}", beside) if path in texts]
    return found


def code_of(text: str) -> str:
    """C++ without comments, and with one blank or, beside a directive, one line break for all white space."""
    kept = re.sub(
        r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/',
        lambda found: found[0] if found[0][0] == '"' else " ",
        text.replace("\\\n", " "),
        flags=re.DOTALL,
    )
    lines = (" ".join(line.split()) for line in kept.splitlines())
    marked = (f"\n{line}\n" if line.startswith("#") else line for line in lines if line)
    return re.sub(r" ?\n+ ?", "\n", " ".join(marked)).strip()


# ---- parts ----
def tests(rounds: int) -> dict:
    """Counts of `pytest -m gpu`, and the failures' names."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", str(TESTS)]
        if importlib.util.find_spec("xdist"):  # the CPU's reference takes longer than the GPU
            command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2))), "--dist", "worksteal"]
        subprocess.run(command, cwd=ROOT, check=False)
        seconds = perf_counter() - start
        suite = ElementTree.parse(report).getroot().find("testsuite")
    count = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    problems = int(os.environ.get("FLASHOMNI_GPU_PROBLEMS", "2500"))
    return {**count, "failed": failed, "random_problems": problems, "seconds": round(seconds, 1)}


def sanitizer(rounds: int) -> dict:
    """Errors that each tool of compute-sanitizer counts over gpu_sanitize.py; None: it did not end."""
    program = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if program is None:
        raise RuntimeError("compute-sanitizer: not found; it comes with CUDA's toolkit")
    # Every allocation torch makes is its own, so that what lies beside it is watched.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watched_by(tool: str) -> dict:
        # initcheck must see who writes first, torch's kernels among them; the others look at ours alone.
        only = [] if tool == "initcheck" else ["--kernel-name", "kns=flashomni"]
        command = [program, "--tool", tool, *only, sys.executable, str(TESTS / "gpu_sanitize.py")]
        start = perf_counter()
        done = subprocess.run(
            command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False
        )
        output = done.stdout + done.stderr
        errors = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
        solved = re.search(r"(\d+) problems, all right", output)
        found = {
            "errors": int(errors[1] or errors[2]) if errors else None,
            "problems": int(solved[1]) if solved else None,
            "seconds": round(perf_counter() - start, 1),
        }
        print(f"{tool}: {found}", flush=True)
        if not errors or not solved or int(errors[1] or errors[2]):
            worst = [line for line in output.splitlines() if re.search(r"Error:|Invalid|Uninitialized", line)]
            print("\n".join([*worst[:20], *output.splitlines()[-20:]]))
        return found

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(watched_by, TOOLS), strict=True))


def benchmarks(rounds: int) -> dict:
    import torch

    from flashomni.bench import attention_cuda, gemm_cuda, host, select

    rows, on_host = [], [host.run()]
    for shape in gemm_cuda.SHAPES:
        rows += gemm_cuda.run(shape, rounds=rounds)
        print(f"GEMMs of {shape}: done", flush=True)
    for tokens in SELECT_TOKENS:
        shape = {"tokens": tokens, "heads": 24, "head_dim": 128, "block": 128}
        rows += select.run(**shape, dtype=torch.bfloat16, rounds=rounds, device="cuda")
        print(f"selection and forecasts at {tokens} tokens: done", flush=True)
    on_host.append(host.run())
    for tokens, head_dim in ATTENTION_SHAPES:
        rows += attention_cuda.run(
            tokens=tokens, heads=24, head_dim=head_dim, dtype=torch.bfloat16, rounds=rounds
        )
        print(f"attention at {tokens} tokens, head_dim {head_dim}: done", flush=True)
    on_host.append(host.run())
    # A host's minutes differ: its figures are those of three, some minutes apart.
    host_us = {name: median(run[name] for run in on_host) for name in on_host[0]}
    return {"rounds": rounds, "rows": rows, "host_us": host_us, "host_us_runs": on_host}


PARTS = {"benchmarks": benchmarks, "tests": tests, "sanitizer": sanitizer}

# Full-size models, a minute or a few each; by what they are called in the record and in `measure e2e-NAME`.
COMPILED = {"arms": ("compiled",)}
GRAPHS = ("compiled", "compiled graphs")
VIDEO = {"sparsity": (0.46,), "rounds": 1, **COMPILED}
# What follows is forecast from caches of its own: in e4m3 they fit 80 GB beside a model's weights.
FOLLOW = {"follow": True, "chosen": False}
FP8 = {"cache_dtype": "float8_e4m3"}
E2E = {
    "tiny-flux": {},
    "flux-dev": {"model": "flux-dev", "follow": True, "arms": GRAPHS},
    "flux-dev-2048": {
        "model": "flux-dev",
        "resolution": "2048x2048",
        "follow": True,
        "arms": GRAPHS,
    },
    "flux-kontext": {
        "model": "flux-kontext",
        "changes": {"protect_conditions": False},  # else more than half of the tokens are always computed
        "sparsity": (0.46,),
        "follow": True,
        **COMPILED,
    },
    "hunyuanvideo": {"model": "hunyuanvideo", "density": (0.25,), **VIDEO},
    "hunyuanvideo-follow": {
        "model": "hunyuanvideo",
        "density": (0.25,),
        "changes": FP8,
        **FOLLOW,
        **VIDEO,
        "arms": GRAPHS,
    },
    "qwen-image": {"model": "qwen-image", "sparsity": (0.46,), "follow": True, **COMPILED},
    "wan-14b": {"model": "wan-14b", "changes": {"policy": "drift"}, **VIDEO},  # without text it alone caches
    "wan-14b-follow": {"model": "wan-14b", "changes": {"policy": "drift", **FP8}, **FOLLOW, **VIDEO},
}


def end_to_end(name: str) -> dict:
    """Rows of one of E2E."""
    import torch
    from rich.console import Console

    from flashomni.bench import e2e, e2e_model, models
    from flashomni.config import Config

    if name == "tiny-flux":
        from flashomni.demo import SETTINGS

        run = {"config": Config(**SETTINGS), "steps": 20, "rounds": 5, "device": "cuda"}
        rows = e2e.run(**run, dtype=torch.bfloat16)
        tables = e2e.tables(rows)
    else:
        options = dict(E2E[name])
        changes = options.pop("changes", {})
        config = Config(**models.model_of(options["model"]).settings | changes)
        rows = e2e_model.run(config=config, **options, say=lambda text: print(text, flush=True))
        tables = e2e_model.tables(rows)
    for table in tables:
        Console(highlight=False, width=100).print(table)
    return {"rows": rows}


# ---- the record ----
def machine() -> dict:
    """What the figures depend on."""
    import torch

    from flashomni import doctor

    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    driver, power = (
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
    )
    cuda = {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "power_limit": power,
        "cuda": torch.version.cuda,
    }
    return {
        **cuda,
        **{name: value for name, value in doctor.machine().items() if name not in ("isa", "threads")},
    }


def slug(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100"."""
    found = re.search(r"\b[A-Z]{1,3}\d{2,4}\b", gpu)
    return (found[0] if found else re.sub(r"\W+", "-", gpu)).lower()


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def measure(folder: Path, parts: list[str], rounds: int) -> int:
    here, sources = machine(), digest()
    path = folder / f"{slug(here['gpu'])}.json"
    record = {**read(path), "machine": here}
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"e2e-{case}" for case in E2E]
    for name in [n for part in parts or PARTS for n in (names if part == "e2e" else [part])]:
        made = PARTS[name](rounds) if name in PARTS else end_to_end(name.removeprefix("e2e-"))
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record[name] = {"date": date, "sources": sources, **made}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    missing = [name for name in PARTS if name not in record]
    print(f"record: {path}" + (f"; still without {', '.join(missing)}" if missing else ""))
    return int(bool(faults(record)))


def faults(record: dict) -> list[str]:
    """What a record says went wrong."""
    found = [f"test {name} failed" for name in record.get("tests", {}).get("failed", [])]
    for tool in TOOLS:
        result = record.get("sanitizer", {}).get(tool)
        if result and (result["errors"] is None or result["errors"] > 0 or result["problems"] is None):
            found.append(f"{tool}: {result['errors']} errors, {result['problems']} problems solved")
    return found


def models(record: dict) -> list[str]:
    """The end-to-end parts that a record has."""
    return [f"e2e-{case}" for case in E2E if f"e2e-{case}" in record]


def check(paths: list[Path]) -> int:
    today, bad = digest(), 0
    for path in paths or sorted(RESULTS.glob("*.json")):
        record = read(path)
        wrong = faults(record)
        for name in PARTS:
            if name not in record:
                wrong.append(f"has no {name}")
            elif record[name]["sources"] != today:
                of = record[name]["sources"][:12]
                wrong.append(f"{name} of sources {of}, and today's are {today[:12]}")
        print(f"{path.name}: " + ("; ".join(wrong) or "of today's sources, complete, without faults"))
        earlier = [name for name in models(record) if record[name]["sources"] != today]
        if earlier:
            print(f"{path.name}: of earlier kernels: {', '.join(earlier)}")
        bad += bool(wrong)
    if not paths and not any(RESULTS.glob("*.json")):
        print("no record: make gpu-record, on a machine with a GPU")
        return 1
    return int(bad > 0)


def docs() -> int:
    """Writes the page of all records."""
    records = map(read, sorted(RESULTS.glob("*.json")))
    DOCS.write_text(gpu_page.page(records, digest(), list(E2E)), encoding="utf-8")
    print(f"wrote {DOCS.relative_to(ROOT)}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, default=RESULTS)
    measuring.add_argument("--rounds", type=int, default=7, help="turns of each arm of the benchmarks")
    measuring.add_argument(
        "parts", nargs="*", choices=[*PARTS, "e2e", *(f"e2e-{case}" for case in E2E), []], default=[]
    )
    checking = commands.add_parser("check")
    checking.add_argument("files", nargs="*", type=Path)
    commands.add_parser("docs")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        status = measure(arguments.out, arguments.parts, arguments.rounds)
        return docs() or status if arguments.out == RESULTS else status
    return check(arguments.files) if arguments.command == "check" else docs()


if __name__ == "__main__":
    sys.exit(main())
