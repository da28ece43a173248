"""How the CUDA backend is found, built, cached and loaded. No GPU and no nvcc: a script stands for it."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import flashomni
from flashomni import _native
from flashomni.jit import build, plugin, sources, toolkit

ROOT = Path(__file__).parents[2]

NVCC = """\
#!/bin/bash
# Stands for nvcc: an object holds the digest that it was told, the library holds its objects.
here=$(dirname "$0")
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"; exit 0; fi
echo "$*" >> "$here/calls"
out=; depfile=; objects=(); digest=; shared=
while [ $# -gt 0 ]; do
  case $1 in
    -o) out=$2; shift;;
    -MF) depfile=$2; shift;;
    -shared) shared=1;;
    -DFLASHOMNI_SOURCES=*) digest=${{1#*=}}; digest=${{digest//\\"/}};;
    *.o) objects+=("$1");;
  esac
  shift
done
if [ -e "$here/fail" ] && [[ $out == *attention* ]]; then
  echo "attention.cu(3): error: it is wrong"
  exit 2
fi
if [ -e "$here/slow" ]; then echo $$ >> "$here/pids"; sleep 30; fi
[ -z "$depfile" ] || echo "$out:" > "$depfile"
if [ -n "$shared" ]; then
  cat "${{objects[@]}}" > "$out"
else
  echo "flashomni-sources-sha256:$digest" > "$out"
fi
"""


def fake_nvcc(folder: Path, version: str = "13.0") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(NVCC.format(version=version))
    path.chmod(0o755)
    return path


def calls(nvcc: Path) -> list[str]:
    log = nvcc.parent / "calls"
    return log.read_text().splitlines() if log.exists() else []


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in ("FLASHOMNI_NVCC", "CUDA_HOME", "CUDA_PATH", "FLASHOMNI_PLUGIN_PATH", "FLASHOMNI_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NVCC_CCBIN", "CXX", "FLASHOMNI_NVCC_FLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FLASHOMNI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(toolkit, "USUAL", tmp_path / "no-toolkit" / "nvcc")


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    """A PATH without nvcc, and no packages that bring one."""
    binaries = tmp_path / "binaries"
    binaries.mkdir()
    (binaries / "g++").symlink_to(shutil.which("g++") or shutil.which("c++"))
    monkeypatch.setenv("PATH", str(binaries))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return binaries


@pytest.fixture
def tree(tmp_path) -> sources.Sources:
    """A small source tree."""
    files = {
        "include/flashomni/plugin.h": "// header",
        "src/core/error.cc": "// error",
        "src/core/tensor.cc": "// tensor",
        "src/cuda/plugin.map": "{ local: *; };",
        "src/cuda/sm90/nvcc.options": "-O3",
        "src/cuda/sm90/plugin.cu": "// plugin",
        "src/cuda/sm90/attention/attention.cu": "// kernel",
        "src/cuda/sm90/attention/README.md": "no source",
    }
    for name, text in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sources.collect(tmp_path / "tree")


@pytest.fixture
def nvcc(monkeypatch, tmp_path) -> Path:
    path = fake_nvcc(tmp_path / "toolkit")
    monkeypatch.setenv("FLASHOMNI_NVCC", str(path))
    return path


# Finding nvcc


def test_the_most_explicit_nvcc_wins(monkeypatch, no_nvcc, tmp_path):
    places = {name: fake_nvcc(tmp_path / name) for name in ("named", "home", "cuda_path", "usual", "package")}
    on_path = no_nvcc / "nvcc"

    class Spec:
        submodule_search_locations = [str(tmp_path / "site")]

    shutil.copytree(tmp_path / "package", tmp_path / "site" / "cu13")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    assert toolkit.find().nvcc == tmp_path / "site" / "cu13" / "bin" / "nvcc"
    monkeypatch.setattr(toolkit, "USUAL", places["usual"])
    assert toolkit.find().nvcc == places["usual"]
    on_path.write_text(places["home"].read_text())
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{no_nvcc}:{os.defpath}")
    assert toolkit.find().nvcc == on_path
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda_path"))
    assert toolkit.find().nvcc == places["cuda_path"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolkit.find().nvcc == places["home"]
    monkeypatch.setenv("FLASHOMNI_NVCC", str(places["named"]))
    assert toolkit.find().nvcc == places["named"]


def test_an_old_nvcc_is_passed_over_and_told(monkeypatch, no_nvcc, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "old", "12.4").parents[1]))
    monkeypatch.setenv("PATH", f"{no_nvcc}:{os.defpath}")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(
        toolkit.ToolkitError, match=r"nvcc: expected 13\.0 or newer, got CUDA_HOME: .* is 12\.4"
    ):
        toolkit.find()
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setattr(toolkit, "USUAL", fake_nvcc(tmp_path / "new", "13.2"))
    monkeypatch.setattr(
        toolkit.shutil, "which", lambda name, path=None: None if name == "nvcc" else f"/bin/{name}"
    )
    assert toolkit.find().version == (13, 2)


def test_other_architectures_are_refused(monkeypatch, nvcc):
    for named in ("90a", ""):
        monkeypatch.setenv("FLASHOMNI_CUDA_ARCHS", named)
        toolkit.find()
    monkeypatch.setenv("FLASHOMNI_CUDA_ARCHS", "80;90a")
    with pytest.raises(toolkit.ToolkitError, match="FLASHOMNI_CUDA_ARCHS: expected 90a .*, got 80;90a"):
        toolkit.find()


def test_no_nvcc_says_what_to_install(no_nvcc):
    with pytest.raises(
        toolkit.ToolkitError, match=r"expected 13\.0 or newer, got .*pip install 'nvidia-cuda-nvcc"
    ):
        toolkit.find()


def test_a_named_nvcc_is_never_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHOMNI_NVCC", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path / "good").parents[1]))
    with pytest.raises(toolkit.ToolkitError, match="FLASHOMNI_NVCC: no nvcc at"):
        toolkit.find()


def test_a_program_that_is_no_nvcc(monkeypatch):
    monkeypatch.setenv("FLASHOMNI_NVCC", shutil.which("true"))
    with pytest.raises(toolkit.ToolkitError, match="names no release"):
        toolkit.find()


def test_a_missing_host_compiler_is_named(monkeypatch, nvcc):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        toolkit.ToolkitError, match=r"C\+\+ compiler: expected .*'no-such-compiler', got none"
    ):
        toolkit.find()


# Sources


def test_the_digest_follows_contents_and_names(tree):
    before = tree.digest
    assert "src/cuda/sm90/attention/README.md" not in tree.files
    assert set(tree.units) == {
        *("src/core/error.cc", "src/core/tensor.cc"),
        *("src/cuda/sm90/plugin.cu", "src/cuda/sm90/attention/attention.cu"),
    }
    assert sources.collect(tree.root).digest == before
    (tree.root / "src/cuda/sm90/attention/attention.cu").write_text("// another")
    changed = sources.collect(tree.root).digest
    (tree.root / "src/cuda/sm90/attention/more.cuh").write_text("")
    assert len({before, changed, sources.collect(tree.root).digest}) == 3


def test_the_checkout_has_its_sources():
    found = sources.find()
    assert found.root == ROOT
    assert "src/cuda/sm90/plugin.cu" in found.units


def test_digest_of_a_file(tmp_path):
    file = tmp_path / "x"
    for content, digest in ((b"junk", None), (sources.DIGEST_MARK + b"short", None)):
        file.write_bytes(content)
        assert sources.digest_of(file) == digest
    file.write_bytes(b"\x7fELF\0" + sources.DIGEST_MARK + b"0a" * 32 + b"\0")
    assert sources.digest_of(file) == "0a" * 32


def test_cmake_makes_the_same_digest(tree, nvcc):
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if cmake is None:
        pytest.skip("no cmake")
    root = tree.root
    (root / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(fake CXX)\n"
        "include(GNUInstallDirs)\ninclude(cuda.cmake)\n"
    )
    shutil.copy(ROOT / "cmake" / "cuda.cmake", root / "cuda.cmake")
    configure = [cmake, "-S", str(root), "-B", str(root / "out"), f"-DFLASHOMNI_NVCC={nvcc}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run([cmake, "--build", str(root / "out")], check=True, capture_output=True)
    library = root / "out" / sources.LIBRARY
    assert library.read_bytes().count(tree.digest.encode()) == 1
    # Another content is another digest, without asking for it.
    (root / "src/cuda/sm90/attention/attention.cu").write_text("// another")
    subprocess.run([cmake, "--build", str(root / "out")], check=True, capture_output=True)
    assert sources.collect(root).digest.encode() in library.read_bytes()
    old = fake_nvcc(root / "old", "12.9")
    result = subprocess.run([*configure[:-1], f"-DFLASHOMNI_NVCC={old}"], capture_output=True, text=True)
    assert result.returncode != 0 and "is 12.9" in " ".join(result.stderr.split())
    environment = {**os.environ, "FLASHOMNI_CUDA_ARCHS": "80"}
    result = subprocess.run(configure, capture_output=True, text=True, env=environment)
    assert result.returncode != 0 and "expected 90a, got 80" in " ".join(result.stderr.split())


# Building


def test_built_once_then_cached(tree, nvcc, capsys):
    tools = toolkit.find()
    assert build.cached(tree, tools) is None
    library = build.build(tree, tools)
    assert sources.digest_of(library) == tree.digest
    assert (library.parent / build.LOG).is_file() and (library.parent / build.MANIFEST).is_file()
    assert len(calls(nvcc)) == len(tree.units) + 1
    assert "building the cuda_sm90 backend with nvcc 13.0" in capsys.readouterr().err
    assert build.build(tree, tools) == library == build.cached(tree, tools)
    assert len(calls(nvcc)) == len(tree.units) + 1
    assert capsys.readouterr().err == ""
    assert not list(build.cache_folder().glob("*.tmp-*"))


def test_the_key_names_sources_flags_and_compilers(tree, nvcc, monkeypatch):
    keys = {build.key_of(tree, toolkit.find())}
    nvcc.write_text(NVCC.format(version="13.1"))
    keys.add(build.key_of(tree, toolkit.find()))
    monkeypatch.setenv("FLASHOMNI_NVCC_FLAGS", "-DX=1")
    keys.add(build.key_of(tree, toolkit.find()))
    (tree.root / "src/cuda/sm90/nvcc.options").write_text("-O1")
    keys.add(build.key_of(sources.collect(tree.root), toolkit.find()))
    assert len(keys) == 4


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tree, nvcc):
    fail = nvcc.parent / "fail"
    fail.touch()
    with pytest.raises(
        build.BuildError, match=r"(?s)nvcc failed at src/cuda/.*attention\.cu.*it is wrong.*command"
    ):
        build.build(tree, toolkit.find())
    assert [path.suffix for path in build.cache_folder().iterdir()] == [".lock"]
    fail.unlink()
    assert build.build(tree, toolkit.find()).is_file()


def test_a_cache_that_cannot_be_written(tree, nvcc, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHOMNI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="FLASHOMNI_CACHE_DIR"):
        build.build(tree, toolkit.find())


def builder(tree: sources.Sources) -> subprocess.Popen:
    """Another process that builds the tree. It minds SIGINT, which a shell has ignored by what it runs in the
    background."""
    script = f"""
        import signal
        from pathlib import Path
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from flashomni.jit import build, sources, toolkit
        print(build.build(sources.collect(Path({str(tree.root)!r})), toolkit.find()))
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tree.root,
    )


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_processes_at_once_compile_once(tree, nvcc):
    processes = [builder(tree) for _ in range(3)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert len(calls(nvcc)) == len(tree.units) + 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_leaves_nothing_broken(tree, nvcc, how):
    slow, pids = nvcc.parent / "slow", nvcc.parent / "pids"
    slow.touch()
    process = builder(tree)
    wait_for(pids.exists)
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0
    compilers = [int(line) for line in pids.read_text().split()]
    if how == signal.SIGINT:  # then it stops its compilers too
        wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in compilers))
    slow.unlink()
    library = build.build(tree, toolkit.find())
    assert sources.digest_of(library) == tree.digest
    assert not list(build.cache_folder().glob("*.tmp-*"))
    for pid in compilers:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_a_second_process_does_not_recompile(tree, nvcc):
    outputs = [builder(tree).communicate(timeout=60) for _ in range(2)]
    assert outputs[0][0] == outputs[1][0] and outputs[0][0].strip()
    assert "building" in outputs[0][1] and outputs[1][1] == ""
    assert len(calls(nvcc)) == len(tree.units) + 1


# What there is, and loading it


def test_state_tells_every_case(tree, nvcc, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "find", lambda: tree)
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(flashomni, "__path__", [str(package)])
    assert plugin.state().kind == "would build"
    nvcc.write_text(NVCC.format(version="11.8"))
    assert plugin.state().kind == "cannot" and "11.8" in plugin.state().detail
    nvcc.write_text(NVCC.format(version="13.0"))
    built = plugin.locate()
    assert plugin.state() == plugin.State("cached", built, "built at first use")
    # Of other sources: not used, and told.
    installed = package / sources.LIBRARY
    installed.write_bytes(sources.DIGEST_MARK + b"00" * 32)
    assert plugin.state().kind == "cached" and str(installed) in plugin.state().detail
    assert plugin.locate() == built
    installed.write_bytes(built.read_bytes())
    assert plugin.state().kind == "installed" and plugin.locate() == installed
    monkeypatch.setenv("FLASHOMNI_PLUGIN_PATH", f"/nowhere:{built.parent}")
    assert plugin.state().kind == "given" and plugin.locate() == built


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A Hopper GPU as torch would show it; yields what is loaded."""
    loaded = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Abacus")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(plugin, "locate", lambda: Path("/plugin.so"))
    monkeypatch.setattr(_native, "loaded_plugins", lambda: loaded)
    monkeypatch.setattr(_native, "load_plugin", loaded.append)
    monkeypatch.setattr(_native, "cuda_backend", lambda index: "cuda_sm90")
    return loaded


def test_loaded_once(pretended_gpu):
    flashomni.warmup()
    flashomni.warmup(0)
    flashomni.warmup("cuda:0")
    assert pretended_gpu == [Path("/plugin.so")]


def test_another_gpu_is_refused_before_anything_is_built(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    with pytest.raises(
        NotImplementedError, match=r"expected compute capability 9\.0 .*, got cuda:0, Abacus, 8\.0"
    ):
        flashomni.warmup()
    assert pretended_gpu == []
    (row,) = plugin.gpus()
    assert row["served"] == "no" and "8.0" in row["reason"]


def test_nothing_is_loaded_during_a_capture(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"flashomni\.warmup\(\)"):
        flashomni.warmup()
    assert pretended_gpu == []


def test_a_forced_backend_loads_no_other(pretended_gpu, monkeypatch):
    monkeypatch.setenv("FLASHOMNI_BACKEND", "cpu")
    plugin.ensure(0)
    assert pretended_gpu == []
    monkeypatch.setenv("FLASHOMNI_BACKEND", "cuda_sm90")
    plugin.ensure(0)
    assert pretended_gpu == [Path("/plugin.so")]


def test_warmup_wants_a_cuda_device(pretended_gpu, monkeypatch):
    with pytest.raises(ValueError, match="device: expected a CUDA device, got cpu"):
        flashomni.warmup("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="got none"):
        flashomni.warmup()


def test_a_library_that_is_no_plugin(tmp_path):
    file = tmp_path / "junk.so"
    file.write_text("junk")
    with pytest.raises(RuntimeError, match=r"junk\.so: expected a library that can be loaded"):
        _native.load_plugin(file)


def test_a_plugin_serves_what_it_says(tmp_path):
    """In a process of its own, as a plugin stays; it is C++ without a GPU (tests/cpp/fake_plugin.cc)."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path / sources.LIBRARY
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{ROOT / 'include'}", f"-I{ROOT}"]
    subprocess.run([compiler, *flags, "-o", str(library), str(ROOT / "tests/cpp/fake_plugin.cc")], check=True)
    script = f"""
        from flashomni import _native
        assert not _native.backends()[0]["serves"] and not _native.loaded_plugins()
        assert _native.load_plugin({str(library)!r}) == "cuda_sm90"
        assert _native.backends()[0]["serves"], _native.backends()
        assert _native.loaded_plugins() == [
            {{"name": "cuda_sm90", "path": {str(library)!r}, "sources": "fake"}}
        ]
        assert _native.cuda_backend(1) == "cuda_sm90"
        try:
            _native.cuda_backend(2)
        except NotImplementedError as error:
            assert "Abacus" in str(error), error
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
