"""A full-size transformer end to end: dense bars and ours in one run, by step kind and operator class, and
the bound of Amdahl's law.

    python -m flashomni.bench.e2e_model --model flux-dev --resolution 1024x1024 --sparsity 0.46

Configurations are the published ones, weights and inputs random, made on the device. One pass a step:
guidance by a second pass would double every arm alike. The seconds of a run are composed: a few steps of each
kind are measured, and the run is their sum over the schedule's steps (levels.Sample); `--whole` runs all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from torch import nn

import flashomni
from flashomni import schedule
from flashomni.bench import classes, harness, levels, models
from flashomni.bench.dense import Bar, Dense, compiled, forget_peak, peak, timed
from flashomni.config import FOLLOWERS, Config
from flashomni.policies import Policy

ARMS = ("eager", "graphs", "compiled", "compiled graphs")  # compiled: by repeated blocks
SPARSITY = (0.28, 0.46)  # at which the paper shows FLUX
GIB = 2**30


@dataclass(frozen=True)
class Level:
    """How sparse an arm is. policy None: what the configuration's own policy chooses. follows: all that can
    follow the attention's rows does, MLPs and Wan's cross-attention."""

    name: str
    policy: Policy | None = None
    follows: bool = False


@dataclass
class Ours:
    """One sparse arm. By step: milliseconds, density of pairs, share of active tiles."""

    level: Level
    arm: str
    steps: list[float]
    density: list[float]
    tiles: list[float]
    by_key: dict[str, float]
    peak: int | None
    held: int
    notes: dict[str, int]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)

    def of_kind(self, kinds: Sequence[str], kind: str) -> float:
        return fmean(ms for ms, k in zip(self.steps, kinds, strict=True) if k == kind)


class Run:
    """Everything that the arms of one benchmark share."""

    def __init__(self, name: str, size: models.Size, text: int, device: str, dtype: torch.dtype, tiny: bool):
        self.name, self.model, self.size, self.text = name, models.model_of(name), size, text
        self.device, self.dtype = torch.device(device), dtype
        self.tokens = self.model.tokens(size, text)
        self.transformer: nn.Module = models.build(self.model, self.device, dtype, tiny=tiny)
        self.inputs = models.make_inputs(self.model, self.transformer, size, text)

    def call(self, time: float) -> torch.Tensor:
        return self.transformer(**self.inputs(time))[0]


@torch.no_grad()
def run(
    *,
    model: str,
    config: Config,
    resolution: str = "",
    steps: int = 0,
    text: int = 0,
    sparsity: Sequence[float] = SPARSITY,
    density: Sequence[float] = (),
    tiles: float | None = None,
    follow: bool = False,
    chosen: bool = True,
    arms: Sequence[str] = ARMS,
    dense_compiled: bool = True,
    backend: str = "inductor",
    rounds: int = 2,
    whole: bool = False,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    tiny: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """Rows of suite "e2e": whole runs and steps of each kind, for every arm.

    sparsity: mean uncomputed share of block pairs over the run, one level each; density: computed share in
    Dispatch steps, one level each; tiles: share of active tiles there (None: as sparse along rows as along
    columns). follow: each of these levels once more, tiles cached as whole rows and all following them that
    can. chosen: also what config.policy chooses. arms: ours (ARMS); dense_compiled: whether diffusers' own
    code is measured compiled too; backend: of torch.compile. Zeros mean the model's own.

    ratio, bound and share_of_bound are against the better dense arm. bound: dense time over what is left of
    it if attention and gemm_q, gemm_o (and what follows) shrank as the densities say and nothing
    else changed or was added.
    Raises ValueError that names the argument, NotImplementedError for a model that is not served.
    """
    spec = models.model_of(model)
    size = models.parse_size(resolution, spec.tiny_size if tiny else spec.size)
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        raise ValueError(f"arms: expected names among {', '.join(ARMS)}, got {', '.join(unknown)}")
    spec.image_tokens(size)
    steps = steps or spec.steps
    plans = schedule.plan(steps, config)
    text = text or (32 if tiny else spec.text)
    wanted = _levels(plans, sparsity, density, tiles, follow, chosen)
    for level in wanted:
        if level.policy is not None:
            kept = text if spec.joint else 0
            if config.protect_conditions:
                kept += spec.image_tokens(size) // spec.images * (spec.images - 1)
            _check(level.policy, spec.tokens(size, text), kept, config)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device, got none on this machine")
    here = Run(model, size, text, device, dtype, tiny)
    parameters = sum(p.numel() for p in here.transformer.parameters())
    say(f"{model} {size}: {here.tokens} tokens, {parameters / 1e9:.2f}e9 parameters")
    flashomni.explain(here.transformer, config)  # a model that is not served ends here

    missing: dict[str, str] = {}
    dense = Dense(here.transformer, here.call, spec.mask_argument, steps if whole else rounds)
    eager = dense.eager(spec.image_tokens(size))
    say(f"{eager.name}: {eager.step:.1f} ms a step")
    bars = [eager]
    if dense_compiled:
        try:
            bars.append(dense.compiled(backend))
            say(f"{bars[-1].name}: {bars[-1].step:.1f} ms a step")
        except Exception as error:  # a compiler's failure is no reason to lose the other arms
            missing["dense compiled"] = harness.short(error)
    found: list[Ours] = []
    for level in wanted:
        for arm in [arm for arm in ARMS if arm in arms]:
            if "graphs" in arm and here.device.type != "cuda":
                missing[arm] = "no GPU"
                continue
            by_class = "graphs" not in arm and not any(ours.level == level for ours in found)
            try:
                with compiled(here.transformer, backend) if "compiled" in arm else nullcontext():
                    found.append(_measure(here, config, level, arm, plans, rounds, whole, by_class))
                say(f"flashomni {arm}, {level.name}: {sum(found[-1].steps) / 1e3:.2f} s a run")
            except Exception as error:
                # A GPU that is too small, a step that cannot be captured, a compiler's failure: no reason to
                # lose the others.
                if arm == "eager" and not isinstance(error, torch.OutOfMemoryError):
                    raise
                missing[f"{arm}, {level.name}"] = harness.short(error)
            forget_peak(here.device)
    dense.again(eager)
    for name, reason in missing.items():
        say(f"not measured: {name}: {reason}")
    rows = _rows(here, bars, found, plans, whole, missing)
    rows[0]["config"] = asdict(config)
    return rows


def _levels(plans, sparsity, density, tiles: float | None, follow: bool, chosen: bool) -> list[Level]:
    asked = {f"{value:.0%} sparse": levels.dispatch_density(value, plans) for value in sparsity}
    asked |= {f"density {value:g}": value for value in density}
    found = [Level(name, levels.LevelPolicy(value, tiles)) for name, value in asked.items()]
    if follow:
        for name, value in asked.items():
            policy = levels.LevelPolicy(value, tiles, rows=True)
            found.append(Level(f"{name}, rows follow", policy, follows=True))
    if chosen:
        found.append(Level("as chosen"))
    return found


def _check(policy: levels.LevelPolicy, tokens: int, kept: int, config: Config) -> None:
    """ValueError for a level that what is always computed leaves no room for, before anything is built."""
    blocks = [-(-count // size) for count in (tokens, kept) for size in (config.block_q, config.block_kv)]
    levels.image_shares(policy.density, *blocks, tiles=policy.tiles)


def _measure(
    here: Run, config: Config, level: Level, arm: str, plans, rounds: int, whole: bool, by_class: bool
) -> Ours:
    """One sparse arm: warmed up, then measured `rounds` times, then with `by_class` once more by class of
    operator."""
    graphs = "graphs" in arm
    changes = {"cuda_graphs": graphs} | (dict.fromkeys(FOLLOWERS, "follow") if level.follows else {})
    config = Config(**{**vars(config), **changes})
    sample = levels.Sample(plans, config.max_order, each_window=level.policy is None, whole=whole)
    forget_peak(here.device)
    engine = flashomni.enable(here.transformer, config, policy=level.policy)
    try:
        short = sample.shortest()
        if graphs:
            # A first step makes the layers' states; then a pass of each kind runs as it is, one is captured.
            for wanted in (short[:1], short, short):
                _steps(here, engine, plans, wanted)
        else:
            _steps(here, engine, plans, _first_window(plans, short))
        times: dict = {}
        for _ in range(rounds):
            for i, ms in _steps(here, engine, plans, sample.measured()).items():
                times.setdefault(sample.keys[i], []).append(ms)
        shares = {sample.keys[i]: _shares(engine, i) for i in sample.measured()}
        stats = flashomni.stats(here.transformer)
        spent = _by_class(here, engine, plans, _first_window(plans, short)) if by_class else {}
        medians = {key: median(values) for key, values in times.items()}
        return Ours(
            level=level,
            arm=arm,
            steps=[medians[key] for key in sample.keys],
            density=[shares[key][0] for key in sample.keys],
            tiles=[shares[key][1] for key in sample.keys],
            by_key={str(key): ms for key, ms in medians.items()},
            peak=peak(here.device),
            held=sum(size for kind, size in engine.bytes_held().items() if kind != "host_history"),
            notes=dict(stats.notes),
            classes=spent,
        )
    finally:
        flashomni.disable(here.transformer)


def _first_window(plans, steps: Sequence[int]) -> list[int]:
    """Those of `steps` that feed the history, and the first Update with its Dispatch step."""
    updates = [i for i in steps if plans[i].kind == "update"]
    end = updates[1] if len(updates) > 1 else len(plans)
    return [i for i in steps if i < end and (plans[i].record or plans[i].kind != "full")]


def _steps(here: Run, engine, plans, wanted: Sequence[int], each=lambda i: None) -> dict[int, float]:
    """Milliseconds of the `wanted` steps of a run; the others only let the clock go on."""
    engine.begin(len(plans))
    found, output = {}, None

    def step(i: int) -> None:
        nonlocal output
        output = here.call(1 - i / len(plans))

    for i in range(len(plans)):
        if i in wanted:
            found[i] = timed(lambda i=i: step(i), here.device)
            each(i)
        engine.step()
    if output is not None and not bool(torch.isfinite(output).all()):
        raise RuntimeError(f"{here.name}: expected finite outputs, got others")
    return found


def _shares(engine, step: int) -> tuple[float, float]:
    """(density of pairs, share of active tiles) of one step, over all layers; what is dense counts 1."""
    sums, seen = [0.0, 0.0], 0
    for at, _, _, _, density, cache in engine.stats.entries:
        if at == step:
            seen += 1
            for i, share in enumerate((density, cache)):
                sums[i] += 1.0 if share is None else float(share.mean())
    return tuple((total + engine.layers - seen) / engine.layers for total in sums)


def _by_class(here: Run, engine, plans, wanted: Sequence[int]) -> dict[str, dict[str, float]]:
    """{kind: {class: ms}} of the last of `wanted` of each kind. "rest" is what no class holds."""
    found: dict[str, dict[str, float]] = {}
    with classes.watch_engine(engine, here.device) as ledger:
        spent: list[dict[str, float]] = []

        def each(i: int) -> None:
            spent.append(ledger.milliseconds())
            ledger.clear()

        times = _steps(here, engine, plans, wanted, each)
    for (i, ms), by_class in zip(times.items(), spent, strict=True):
        found[plans[i].kind] = {**by_class, "rest": max(ms - sum(by_class.values()), 0.0)}
    return found


def _bound(dense_step: float, sparse: dict[str, float], ours: Ours) -> float:
    """Amdahl's: dense time over dense time less what the densities save of the dense arm's own classes. Where
    MLPs and cross-attention follow, a tile is cached in all heads, so that rows are cached as tiles are."""
    names = ("gemm_q", "gemm_o", *(FOLLOWERS if ours.level.follows else ()))
    by_tiles = sum(sparse[name] for name in names)
    saved = sum(
        sparse["attention"] * (1 - density) + by_tiles * (1 - tiles)
        for density, tiles in zip(ours.density, ours.tiles, strict=True)
    )
    total = dense_step * len(ours.steps)
    return total / (total - saved)


def _rows(here: Run, bars: list[Bar], found: list[Ours], plans, whole: bool, missing: dict) -> list[dict]:
    kinds, count = [plan.kind for plan in plans], len(plans)
    best = min(bars, key=lambda bar: bar.step)
    by_class = bars[0].classes
    sparse = classes.sparse_work(by_class, here.transformer)
    case = {
        "model": here.name,
        "resolution": str(here.size),
        "tokens": here.tokens,
        "steps": count,
        "dtype": str(here.dtype).removeprefix("torch."),
    }
    rows = []

    def add(arm: str, level: str, what: str, ms: float, base: float, **more) -> None:
        found_row = harness.row(
            "e2e", {**case, "arm": arm, "level": level, "what": what}, ms, None, (best.name, base, None)
        )
        rows.append({**found_row, **more})

    for bar in bars:
        shown = classes.merged(bar.classes)
        if shown:
            shown["rest"] = max(bar.step - sum(shown.values()), 0.0)
        add(
            bar.name,
            "dense",
            "run",
            bar.step * count,
            best.step * count,
            composed=not whole,
            classes={"full": shown} if shown else {},
            peak_gib=_gib(bar.peak),
            not_measured=missing,
        )
    for ours in found:
        total = sum(ours.steps)
        bound = _bound(best.step, sparse, ours)
        add(
            f"flashomni {ours.arm}",
            ours.level.name,
            "run",
            total,
            best.step * count,
            composed=not whole,
            density=fmean(ours.density),
            tiles=fmean(ours.tiles),
            bound=bound,
            share_of_bound=best.step * count / total / bound,
            peak_gib=_gib(ours.peak),
            held_gib=_gib(ours.held),
            classes=ours.classes,
            by_key=ours.by_key,
            notes=ours.notes,
        )
        for kind in dict.fromkeys(kinds):
            ms = ours.of_kind(kinds, kind)
            add(f"flashomni {ours.arm}", ours.level.name, f"{kind} step", ms, best.step)
    return rows


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def tables(rows: Sequence[dict]) -> list:
    """What the rows say, as rich tables that fit 100 columns: the runs, and a step by class of operator."""
    from rich import box
    from rich.table import Table

    runs = [found for found in rows if found["case"]["what"] == "run"]
    steps = {
        (found["case"]["arm"], found["case"]["level"], found["case"]["what"]): found["ms"] for found in rows
    }
    case = runs[0]["case"]
    how = "composed of measured steps" if runs[0]["composed"] else "whole"
    title = (
        f"{case['model']} {case['resolution']}, {case['tokens']} tokens, {case['steps']} steps, "
        f"{case['dtype']}; runs {how}"
    )
    style = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    table = Table(title=title, **style)
    table.add_column("arm", no_wrap=True)
    table.add_column("level")
    for name in ("run, s", "x", "full", "update", "disp.", "pairs", "tiles", "bound", "of it", "GiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for found in runs:
        arm, level = found["case"]["arm"], found["case"]["level"]
        kinds = [_number(steps.get((arm, level, f"{kind} step"))) for kind in ("full", "update", "dispatch")]
        if level == "dense":
            kinds[0] = _number(found["ms"] / case["steps"])
        shares = [_number(found.get(name), ".2f") for name in ("density", "tiles", "bound")]
        of_it = _number(found.get("share_of_bound"), ".0%")
        ratio = f"{found['ratio']:.2f}"
        memory = _number(found["peak_gib"], ".1f")
        shown = arm.removeprefix("flashomni ").removeprefix("dense ")
        table.add_row(shown, level, f"{found['ms'] / 1e3:.2f}", ratio, *kinds, *shares, of_it, memory)
    return [table, *_class_tables(runs, style)]


def _class_tables(runs: Sequence[dict], style: dict) -> list:
    from rich.table import Table

    columns = {
        ("dense" if found["case"]["level"] == "dense" else found["case"]["level"], kind): spent
        for found in runs
        for kind, spent in found["classes"].items()
        if kind != "full" or found["case"]["level"] == "dense"
    }
    if not columns:
        return []
    ours = {
        found["case"]["arm"].removeprefix("flashomni ")
        for found in runs
        if "by_key" in found and found["classes"]
    }
    title = f"By class of operator (dense eager, ours {', '.join(sorted(ours)) or 'not at all'})"
    table = Table("ms a step", title=title, **style)
    for level, kind in columns:
        table.add_column(level if level == "dense" else f"{level}\n{kind}", justify="right")
    names = sorted({name for spent in columns.values() for name in spent} - {"rest"})
    for name in (*names, "rest"):
        table.add_row(name, *(_number(spent.get(name)) for spent in columns.values()))
    return [table]


def _number(value: float | None, form: str = "") -> str:
    if value is None:
        return "–"
    return format(value, form or (".0f" if value >= 100 else ".3g"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, choices=list(models.MODELS))
    parser.add_argument("--resolution", default="")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--text", type=int, default=0, help="tokens")
    parser.add_argument("--sparsity", type=float, action="append")
    parser.add_argument("--density", type=float, action="append", default=[])
    parser.add_argument("--tiles", type=float)
    parser.add_argument(
        "--follow", action="store_true", help="each level once more by whole rows, which the MLP follows"
    )
    parser.add_argument("--no-chosen", action="store_true", help="leave out the policy's own choice")
    parser.add_argument("--arm", action="append", choices=ARMS)
    parser.add_argument("--no-dense-compiled", action="store_true", help="leave out the compiled dense arm")
    parser.add_argument("--config", "-c", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    from flashomni.demo import parse_config

    try:
        rows = run(
            model=given.model,
            config=parse_config(given.config, models.model_of(given.model).settings),
            resolution=given.resolution,
            steps=given.steps,
            text=given.text,
            sparsity=given.sparsity or (() if given.density else SPARSITY),
            density=given.density,
            tiles=given.tiles,
            follow=given.follow,
            chosen=not given.no_chosen,
            arms=given.arm or ARMS,
            dense_compiled=not given.no_dense_compiled,
            rounds=given.rounds,
            whole=given.whole,
            device=given.device,
            dtype=getattr(torch, given.dtype),
            tiny=given.tiny,
            say=lambda text: print(text, flush=True),
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from rich.console import Console

    for table in tables(rows):
        Console(highlight=False, width=100).print(table)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(harness.record(rows), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
