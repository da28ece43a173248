"""The command line: what it prints, what it refuses and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from flashomni import _native, demo
from flashomni.cli import app
from flashomni.config import Config
from flashomni.schedule import StepPlan

runner = CliRunner()


def invoke(*arguments: str):
    return runner.invoke(app, list(arguments))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flashomni.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'diffusers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["doctor", "demo", "report", "quality", "bench"])
def test_every_command_has_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "Usage" in result.output


def test_doctor_shows_the_backend_and_the_instruction_set():
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "cpu" in result.output and _native.cpu_isa() in result.output


def test_doctor_says_how_to_build(monkeypatch):
    def missing():
        raise RuntimeError("not there: build it with `make build`")

    monkeypatch.setattr(_native, "cpu_isa", missing)
    result = invoke("doctor")
    assert result.exit_code == 1 and "make build" in result.output


def test_commands_stop_early_without_the_library(monkeypatch):
    def missing():
        raise RuntimeError("not there: build it with `make build`")

    monkeypatch.setattr(_native, "cpu_isa", missing)
    for arguments in (["demo"], ["bench", "attention"], ["quality"]):
        result = invoke(*arguments)
        assert result.exit_code == 1 and "make build" in result.output, arguments


@pytest.mark.parametrize("prompt", ["a red dragon", "", "a a a a a a a a a a a a a a a a a"])
def test_demo_refuses_a_prompt_and_lists_the_words(prompt):
    result = invoke("demo", prompt)
    assert result.exit_code == 2 and result.output.startswith("error:")
    if len(prompt.split()) < 16:
        assert all(word in result.output for word in ("star", "purple", "above", "checkered", "seven"))


@pytest.mark.parametrize(
    "change,message",
    [
        ("tau_q=2", "tau_q: expected"),
        ("no_such=1", "no field 'no_such'"),
        ("tau_q", "expected field=value"),
        ("preset=best", "preset: expected one of"),
        ("cache_interval=soon", "cache_interval: expected"),
    ],
)
def test_demo_refuses_a_configuration(change, message):
    result = invoke("demo", "--config", change)
    assert result.exit_code == 2 and message in result.output


def test_demo_draws_and_reports(tmp_path, monkeypatch):
    pipeline = pytest.importorskip("flashomni.tiny_flux.pipeline")
    monkeypatch.setattr(pipeline, "SIDE", 64)  # 256 tokens instead of 4,096
    monkeypatch.setattr(demo, "default_dtype", lambda: torch.float32)
    changes = ["disable_cache_before_step=1", "cache_interval=3", "block_q=64", "block_kv=64", "tau_q=0.9"]
    options = [part for change in changes for part in ("--config", change)]
    result = invoke("demo", "a red star", "--seed", "3", "--steps", "6", "--out", str(tmp_path), *options)
    assert result.exit_code == 0, result.output
    assert "speed-up" in result.output and "as asked" in result.output and "report.html" in result.output
    run = json.loads((tmp_path / "run.json").read_text())
    arms = run["pictures"][0]["arms"]
    assert list(arms) == ["torch", "dense", "flashomni"] and run["pictures"][0]["seed"] == 3
    assert [step["kind"] for step in run["schedule"]] == [
        *("full", "update", "dispatch", "dispatch", "full", "full")
    ]
    assert all((tmp_path / arm["file"]).is_file() and len(arm["step_seconds"]) == 6 for arm in arms.values())
    assert arms["dense"]["psnr"] > 45 and arms["dense"]["density"] == 1.0  # rounding moves little
    assert 0.2 < arms["flashomni"]["density"] < 1.0
    assert run["density"]["pairs"][1][0] == [1.0] * 4 and min(run["density"]["pairs"][2][0]) < 1.0
    assert {"attention", "projections", "MLP", "other"} <= set(run["arms"][2]["time"])
    before = (tmp_path / "report.html").read_text()
    assert invoke("report", str(tmp_path)).exit_code == 0
    assert (tmp_path / "report.html").read_text() == before


def test_demo_leaves_out_prompts_that_would_take_too_long(tmp_path, monkeypatch):
    pipeline = pytest.importorskip("flashomni.tiny_flux.pipeline")
    monkeypatch.setattr(pipeline, "SIDE", 64)
    monkeypatch.setattr(demo, "TIME_LIMIT", 0.01)
    result = invoke("demo", "--steps", "2", "--out", str(tmp_path), "--config", "disable_cache_before_step=0")
    assert result.exit_code == 0, result.output
    assert "left out 1 of 2 prompts" in result.output
    assert len(json.loads((tmp_path / "run.json").read_text())["pictures"]) == 1


def test_bench_e2e_has_a_row_a_kind_of_step(tmp_path, monkeypatch):
    pipeline = pytest.importorskip("flashomni.tiny_flux.pipeline")
    monkeypatch.setattr(pipeline, "SIDE", 64)
    path = tmp_path / "rows.json"
    result = invoke("bench", "e2e", "--steps", "6", "--json", str(path), "-c", "disable_cache_before_step=1")
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["benchmarks"]
    assert {(r["case"]["arm"], r["case"]["what"]) for r in rows} == {
        (arm, what)
        for arm in ("dense", "flashomni")
        for what in ("picture", "full step", "update step", "dispatch step")
    } | {("torch", "picture")}
    assert all(r["baseline"]["name"] == "torch" for r in rows)


def test_tiny_flux_with_compiled_blocks(monkeypatch):
    from flashomni.bench import e2e
    from flashomni.config import Config

    pipeline = pytest.importorskip("flashomni.tiny_flux.pipeline")
    monkeypatch.setattr(pipeline, "SIDE", 64)
    config = Config(**demo.SETTINGS | {"disable_cache_before_step": 1})
    rows = e2e.run(steps=6, config=config, dtype=torch.float32, rounds=1, backend="eager")
    assert rows[0]["not_measured"] == {}
    arms = {r["case"]["arm"] for r in rows if r["case"]["what"] == "picture"}
    assert arms == {"torch", "dense", "flashomni", "torch compiled", "flashomni compiled"}
    ours = [r for r in rows if r["case"]["arm"] == "flashomni compiled"]
    assert len(ours) == 4 and all(r["baseline"]["name"].startswith("torch") for r in ours)


def test_bench_e2e_refuses_what_it_cannot_run():
    result = invoke("bench", "e2e", "--model", "flux-schnell")
    assert result.exit_code == 2 and "model: expected one of flux-dev" in result.output
    if not torch.cuda.is_available():
        result = invoke("bench", "e2e", "--model", "flux-dev")
        assert result.exit_code == 2 and "expected cuda" in result.output
    tiny = ("bench", "e2e", "--model", "flux-dev", "--tiny", "--device", "cpu")
    for option, value, message in (
        ("--resolution", "1024", "resolution: expected WIDTHxHEIGHT"),
        ("--resolution", "100x96", "resolution: expected sides that are multiples of 16"),
        ("--resolution", "96x96x5", "resolution: expected WIDTHxHEIGHT for a model of pictures"),
        ("--sparsity", "0.9", "sparsity: expected from 0 to less than 0.64"),
        ("--density", "1.5", "density: expected more than 0"),
        ("--arm", "fast", "arms: expected names among eager, graphs, compiled, compiled graphs"),
    ):
        result = invoke(*tiny, option, value)
        assert result.exit_code == 2 and message in result.output, result.output


def test_bench_refuses_a_dtype_and_a_head_size():
    result = invoke("bench", "attention", "--dtype", "float64")
    assert result.exit_code == 2 and "float32, bfloat16, float16" in result.output
    result = invoke("bench", "attention", "--head-dim", "65", "--tokens", "128", "--rounds", "1")
    assert result.exit_code == 2 and "error:" in result.output


def test_bench_writes_rows(tmp_path):
    path = tmp_path / "sub" / "rows.json"
    size = ["--tokens", "128", "--heads", "1", "--head-dim", "64", "--rounds", "1"]
    result = invoke("bench", "attention", *size, "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["benchmarks"]
    assert all(row["suite"] == "attention" and row["baseline"]["name"] == "torch_sdpa" for row in rows)


def test_report_refuses_what_is_no_run(tmp_path):
    result = invoke("report", str(tmp_path))
    assert result.exit_code == 2 and "run.json" in result.output


def test_parse_config_starts_from_the_base_or_a_preset():
    assert demo.parse_config([], {"tau_q": 0.25}) == Config(tau_q=0.25)
    found = demo.parse_config(["tau_kv=0.1", "policy=dense", "cache_interval = 7"], {"tau_q": 0.25})
    assert found == Config(tau_q=0.25, tau_kv=0.1, policy="dense", cache_interval=7)
    assert demo.parse_config(["preset=flux", "s_q=0"], {"tau_q": 0.25}) == Config.preset("flux", s_q=0)
    assert demo.parse_config(["dense_layers=(0, 2)"], {}).dense_layers == (0, 2)


def test_density_by_step_repeats_the_last_update():
    plans = [
        StepPlan("full", False, 0, 0, 1.0),
        StepPlan("update", True, 0, 0, 1.0),
        StepPlan("dispatch", False, 1, 0, 1.0),
        StepPlan("dispatch", False, 2, 0, 1.0),
    ]
    cache = torch.tensor([[True, False], [True, True]])
    skip = torch.tensor([[[True, False], [True, True]], [[True, True], [True, True]]])
    found = demo.density_by_step(plans, {1: {1: (cache, skip)}}, layers=2, heads=2)
    dense = [1.0, 1.0]
    assert found["pairs"] == [[dense, dense], [dense, dense], [dense, [0.25, 1.0]], [dense, [0.25, 1.0]]]
    assert found["tiles"][3] == [dense, [0.5, 1.0]]


def test_masks_are_sampled_over_updates_and_layers():
    cache, skip = torch.ones(4, 3, dtype=torch.bool), torch.ones(4, 3, 3, dtype=torch.bool)
    masks = {step: {layer: (cache, skip) for layer in range(6)} for step in (3, 8, 13)}
    found = demo.sample_masks(masks, [f"layer {i}" for i in range(6)])
    assert len(found) == demo.MASKS_SHOWN
    assert {m["step"] for m in found} == {3, 8, 13} and len({m["layer"] for m in found}) == 6
    assert demo.sample_masks({}, []) == []


def test_mean_of_counts_what_is_missing_as_nothing():
    assert demo.mean_of([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0, "b": 1.0}
