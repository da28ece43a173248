"""The `flashomni` command. What a command needs is imported inside it, so that `--help` is instant."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="flashomni",
    help="Sparse attention, sparse linear layers and feature caching for Diffusion Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Time the operators beside torch's own, in one run.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Changes = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", metavar="FIELD=VALUE", help="Change the configuration; may be repeated."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: as many as torch takes.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
DTYPES = ("float32", "bfloat16", "float16")


def fail(message: object, code: int) -> typer.Exit:
    """Prints the error and gives the exception to raise: 2 = a wrong argument, 1 = it did not work."""
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(code)


def console():
    from rich.console import Console

    return Console(highlight=False)


def torch_dtype(name: str):
    if name not in DTYPES:
        raise fail(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}", 2)
    import torch

    return getattr(torch, name)


def set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def need_native() -> None:
    """Exits with how to build the C++ library where it is missing, before anything slow begins."""
    from flashomni import doctor

    found = doctor.native()
    if not found["found"]:
        raise fail(found["error"], 1)


@app.command("doctor")
def doctor_command() -> None:
    """Say what this machine has and whether FlashOmni can use it; exit code 1 if it cannot."""
    from flashomni import doctor

    if not doctor.show(console()):
        raise typer.Exit(1)


@app.command("demo")
def demo_command(
    prompt: Annotated[str | None, typer.Argument(help="What to draw; without one, two prompts.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the first picture's noise; each further one adds 1.")
    ] = 0,
    steps: Annotated[
        int, typer.Option(min=0, max=1000, help="Denoising steps; 0: 40, or 4 with --quick.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures and the report.")] = Path("demo"),
    config: Changes = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps of one picture, to see that all works.")
    ] = False,
    threads: Threads = 0,
) -> None:
    """Draw with tiny_flux: dense with torch, dense with our kernels, and sparse, from the same noise."""
    from flashomni.tiny_flux import vocabulary

    prompts = [prompt] if prompt is not None else []
    try:
        for text in prompts:
            if not vocabulary.tokenize(text):
                raise ValueError(
                    f"prompt: expected words of the vocabulary: {', '.join(vocabulary.WORDS[1:])}"
                )
    except ValueError as error:
        raise fail(error, 2) from None
    from flashomni import demo

    settings = demo.QUICK_SETTINGS if quick else demo.SETTINGS
    try:
        chosen = demo.parse_config(config or [], settings)
    except (ValueError, TypeError) as error:
        raise fail(error, 2) from None
    need_native()
    set_threads(threads)
    steps = steps or (demo.QUICK_STEPS if quick else demo.STEPS)
    prompts = prompts or list(demo.PROMPTS[:1] if quick else demo.PROMPTS)
    limit = math.inf if prompt is not None else demo.TIME_LIMIT
    found = _draw_with_progress(prompts, seed, steps, out, chosen, limit)
    if left := len(prompts) - len(found.json["pictures"]):
        typer.echo(f"left out {left} of {len(prompts)} prompts: this machine would take too long")
    _show_run(found)


def _draw_with_progress(prompts: list[str], seed: int, steps: int, out: Path, config, time_limit: float):
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from flashomni import demo

    screen = console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=screen) as bar:
        task = bar.add_task("loading", total=len(prompts) * len(demo.ARMS) * steps)

        def progress(what: str, done: int) -> None:
            bar.update(task, advance=done, **({"description": what} if what else {}))

        command = shlex.join(["flashomni", *sys.argv[1:]])
        return demo.run(
            prompts, seed, steps, out, config, demo.default_dtype(), command, progress, time_limit
        )


def _show_run(found) -> None:
    from flashomni.demo import results_table
    from flashomni.report import page

    screen = console()
    screen.print(results_table(found))
    if warning := page.disturbance(found):
        screen.print(f"[yellow]{warning}[/]")
    screen.print(f"report: {page.write(found)}", soft_wrap=True)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="A run's folder or its run.json.")] = Path("demo"),
    out: Annotated[Path | None, typer.Option(help="Where to; by default beside the run.")] = None,
    strip: Annotated[Path | None, typer.Option(help="Also write the pictures as one PNG.")] = None,
) -> None:
    """Render a run's HTML report anew from its JSON."""
    from flashomni.report import data, page
    from flashomni.report import strip as strips

    try:
        found = data.load(run)
        path = page.write(found, out)
        if strip is not None:
            strips.write(found, strip)
    except ValueError as error:
        raise fail(error, 2) from None
    except FileNotFoundError as error:
        raise fail(f"a picture of the run is missing: {error.filename}", 1) from None
    typer.echo(f"report: {path}")


@app.command("quality")
def quality_command(
    prompts: Annotated[int, typer.Option(min=1, help="How many held-out prompts.")] = 3,
    steps: Annotated[int, typer.Option(min=2, max=1000, help="Denoising steps.")] = 40,
    work: Annotated[Path, typer.Option(help="Folder of the dense pictures and of what is done.")] = Path(
        "build/quality"
    ),
    docs: Annotated[
        Path, typer.Option(help="Folder that gets quality.md, quality.json and the plot.")
    ] = Path("docs"),
    only: Annotated[list[str] | None, typer.Option(help="Draw only settings whose name holds this.")] = None,
    limit: Annotated[float, typer.Option(min=0, help="Stop drawing after so many seconds; 0: no limit.")] = 0,
    write_only: Annotated[
        bool, typer.Option("--write-only", help="Draw nothing; write the docs from what is done.")
    ] = False,
    threads: Threads = 0,
) -> None:
    """Sweep settings on tiny_flux: density, speed, distance from dense pictures. Goes on where it was cut."""
    from rich.progress import Progress

    from flashomni import quality

    set_threads(threads)
    if not write_only:
        need_native()
        with Progress(console=console()) as bar:
            task = bar.add_task("loading", total=None)

            def progress(done: int, total: int, what: str) -> None:
                bar.update(task, completed=done, total=total, description=what)

            quality.sweep(work, prompts, steps, only or [], limit or float("inf"), progress)
    try:
        path = quality.write_docs(work, docs, prompts, steps)
    except ValueError as error:
        raise fail(error, 1) from None
    typer.echo(f"table: {path}")


def _finish_bench(rows: list[dict], json_file: Path | None, tables=None) -> None:
    from flashomni.bench import harness

    for table in [harness.rows_table(rows)] if tables is None else tables(rows):
        console().print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(harness.record(rows), indent=1) + "\n", encoding="utf-8")
        typer.echo(f"rows: {json_file}")


Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the joint sequence.")]
Heads = Annotated[int, typer.Option(min=1)]
HeadDim = Annotated[int, typer.Option(min=16)]
Block = Annotated[int, typer.Option(help="Tokens a block, 64 or 128.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed rounds; the median is reported.")]


def _suite(run, json_file: Path | None, threads: int, tables=None, **options) -> None:
    """Runs a suite of benchmarks; what the operators refuse is a wrong argument."""
    need_native()
    set_threads(threads)
    try:
        rows = run(**options)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise fail(error, 2) from None
    _finish_bench(rows, json_file, tables)


@bench_app.command("attention")
def bench_attention(
    tokens: Tokens = 4112,
    heads: Heads = 4,
    head_dim: HeadDim = 64,
    block: Block = 128,
    dtype: DTypeName = "float32",
    rounds: Rounds = 9,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Block-sparse attention beside torch's SDPA."""
    kind = torch_dtype(dtype)
    from flashomni.bench import attention

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "block": block}
    _suite(attention.run, json_file, threads, **shape, dtype=kind, rounds=rounds)


@bench_app.command("gemm")
def bench_gemm(
    tokens: Tokens = 4112,
    heads: Heads = 8,
    head_dim: HeadDim = 128,
    block: Block = 128,
    dtype: DTypeName = "float32",
    rounds: Rounds = 9,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """GEMM-Q, and GEMM-O at an Update, a Dispatch and over a window, beside torch's linear."""
    kind = torch_dtype(dtype)
    from flashomni.bench import gemm

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "block": block}
    _suite(gemm.run, json_file, threads, **shape, dtype=kind, rounds=rounds)


@bench_app.command("select")
def bench_select(
    tokens: Tokens = 4112,
    heads: Heads = 4,
    head_dim: HeadDim = 64,
    block: Block = 128,
    dtype: DTypeName = "float32",
    rounds: Rounds = 9,
    threads: Threads = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Making symbols, beside one dense attention; norms and forecasting, beside a copy."""
    kind = torch_dtype(dtype)
    if device not in ("cpu", "cuda"):
        raise fail(f"--device: expected cpu or cuda, got {device!r}", 2)
    from flashomni.bench import select

    shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim, "block": block, "device": device}
    _suite(select.run, json_file, threads, **shape, dtype=kind, rounds=rounds)


@bench_app.command("e2e")
def bench_e2e(
    model: Annotated[
        str, typer.Option(help="tiny-flux, flux-dev, flux-kontext, hunyuanvideo, wan-14b or qwen-image.")
    ] = "tiny-flux",
    resolution: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT, videos WIDTHxHEIGHTxFRAMES; empty: the model's own.")
    ] = "",
    steps: Annotated[int, typer.Option(min=0, help="Denoising steps; 0: 20, or the model's own.")] = 0,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Mean uncomputed share over a run; may be repeated.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Computed share in Dispatch steps; may be repeated.")
    ] = None,
    tiles: Annotated[float, typer.Option(help="Share of active tiles there; 0: as sparse both ways.")] = 0.0,
    follow: Annotated[
        bool, typer.Option("--follow", help="Each level once more by whole rows, which the MLP follows.")
    ] = False,
    chosen: Annotated[bool, typer.Option(help="Also what the configuration's policy chooses.")] = True,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="Ours: eager, graphs, compiled or compiled graphs; may be repeated; all by default."
        ),
    ] = None,
    dense_compiled: Annotated[bool, typer.Option(help="Diffusers' own code compiled, too.")] = True,
    rounds: Annotated[int, typer.Option(min=0, help="Pictures or rounds an arm; 0: 1, or 2 on a GPU.")] = 0,
    whole: Annotated[
        bool, typer.Option("--whole", help="Run all steps instead of a few of each kind.")
    ] = False,
    config: Changes = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; empty: cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option(help="Empty: float32 on a CPU, bfloat16 on a GPU.")] = "",
    threads: Threads = 0,
    json_file: JsonFile = None,
    tiny: Annotated[bool, typer.Option("--tiny", hidden=True)] = False,
) -> None:
    """A whole model: runs and their steps by kind, dense and sparse in one run.

    tiny-flux draws pictures. The others are full-size transformers with random weights, on a GPU.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise fail(f"--device: expected cpu or cuda, got {device!r}", 2)
    kind = torch_dtype(dtype or ("bfloat16" if device == "cuda" else "float32"))
    from flashomni import demo
    from flashomni.bench import e2e, e2e_model, models

    full_size = model != "tiny-flux"
    try:
        base = models.model_of(model).settings if full_size else demo.SETTINGS
        shared = {
            "config": demo.parse_config(config or [], base),
            "device": device,
            "dtype": kind,
            "rounds": rounds or (2 if device == "cuda" else 1),
        }
    except (ValueError, TypeError) as error:
        raise fail(error, 2) from None
    if not full_size:
        _suite(e2e.run, json_file, threads, tables=e2e.tables, **shared, steps=steps or 20)
        return
    if device == "cpu" and not tiny:
        raise fail(f"--device: expected cuda for a model of the size of {model}, got cpu", 2)
    shape = {"model": model, "resolution": resolution, "steps": steps, "tiny": tiny}
    usual = () if density else e2e_model.SPARSITY
    asked = {"sparsity": sparsity or usual, "density": density or (), "follow": follow}
    how = {"tiles": tiles or None, "chosen": chosen, "arms": arm or e2e_model.ARMS, "whole": whole}
    how["dense_compiled"] = dense_compiled
    _suite(
        e2e_model.run,
        json_file,
        threads,
        tables=e2e_model.tables,
        say=typer.echo,
        **shared,
        **shape,
        **asked,
        **how,
    )


@bench_app.command("memory")
def bench_memory(json_file: JsonFile = None) -> None:
    """What full-size models will hold between steps, by setting. Counted from shapes; nothing is run."""
    from flashomni.bench import memory

    _finish_bench(memory.run(), json_file, memory.tables)


def main() -> None:
    # Their start-up remarks (no torchvision, a cast that loses nothing) would hide what the commands say.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    app()


if __name__ == "__main__":
    main()
