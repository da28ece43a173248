"""What will be sparse in a model, what stays dense, and why: known before a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashomni.config import Config
from flashomni.diffusers.blocks import Layer
from flashomni.schedule import plan


@dataclass(frozen=True)
class Row:
    """One attention layer. attention, gemm_q, gemm_o: "sparse" or "dense"; gemm_q may be "rows" too: it skips
    row blocks that are cached in all heads. notes: why something has to be dense."""

    layer: int
    name: str
    attention: str
    gemm_q: str
    gemm_o: str
    notes: tuple[str, ...] = ()
    mlp: str = "dense"  # or "follow" (Config.mlp)
    cross_attention: str = ""  # "dense" or "follow"; "": there is none that could


@dataclass(frozen=True)
class Explanation:
    """explain()'s answer; str() gives a table."""

    model: str
    enabled: bool
    config: Config
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    step_kinds: tuple[str, ...] = field(default=())  # if the number of steps was given

    def __str__(self) -> str:
        c = self.config
        sparse = sum(row.attention == "sparse" for row in self.rows)
        lines = [
            f"{self.model}: {sparse} of {len(self.rows)} attention layers sparse; FlashOmni is "
            + ("enabled" if self.enabled else "not enabled"),
            f"policy {c.policy}: tau_q {c.tau_q:g}, tau_kv {c.tau_kv:g}, s_q {c.s_q:g}, "
            f"ramp {c.ramp_power:g}; blocks {c.block_q} x {c.block_kv}",
            f"an Update every {c.cache_interval} steps, forecasts of order {c.max_order}; the first "
            f"{c.disable_cache_before_step} and the last {c.cooldown_steps} steps dense",
        ]
        if self.step_kinds:
            letters = {"full": "F", "update": "U", "dispatch": "d"}
            lines.append(
                "steps " + "".join(letters[kind] for kind in self.step_kinds) + " (Full, Update, dispatch)"
            )
        width = max((len(row.name) for row in self.rows), default=4)
        lines.append(f"{'':>4} {'layer':<{width}} attention gemm_q gemm_o")
        for row in self.rows:
            work = f"{row.attention:<9} {row.gemm_q:<6} {row.gemm_o:<6}"
            lines.append(f"{row.layer:>4} {row.name:<{width}} {work} {'; '.join(row.notes)}".rstrip())
        lines += self.notes
        return "\n".join(lines)


_ALWAYS = (
    "Dense in every step: key and value projections (text rows look at every key), modulation.",
    "Layers whose tiles are all reused (s_q) compute neither q, k, v nor attention until the next Update.",
)


def row_of(layer: Layer, config: Config) -> Row:
    """What one layer will do under `config`."""
    if layer.refusal is not None:
        return Row(layer.index, layer.name, "dense", "dense", "dense", (f"its own code: {layer.refusal}",))
    if layer.index in config.dense_layers:
        return Row(layer.index, layer.name, "dense", "dense", "dense", ("in dense_layers",))
    stream = layer.spec.streams()[0]
    caches = layer.spec.has_text or config.caches_without_text
    gemm_q = "dense"
    if caches and not any(note.split()[0] == stream.q for note in layer.fallbacks):
        gemm_q = "rows" if stream.across_heads else "sparse"
    notes = tuple(f"{note}: called as a module" for note in layer.fallbacks)
    if not layer.gemm_o:
        notes += ("O is forecast instead of its projection",)
    return Row(
        layer.index,
        layer.name,
        "sparse",
        gemm_q,
        "sparse" if caches and layer.gemm_o else "dense",
        notes,
        "follow" if config.mlp == "follow" and caches and layer.spec.mlp_can_follow(layer) else "dense",
        "" if layer.spec.cross_attention is None else _cross_attention(layer, config, caches),
    )


def _cross_attention(layer: Layer, config: Config, caches: bool) -> str:
    return "follow" if config.cross_attention == "follow" and caches and layer.cross_can_follow else "dense"


def explanation(
    model: str,
    enabled: bool,
    config: Config,
    layers: list[Layer],
    num_steps: int | None,
    notes: tuple[str, ...] = (),
) -> Explanation:
    """The table; `notes` are the family's."""
    rows = tuple(row_of(layer, config) for layer in layers)
    feed_forward = "Feed-forward: dense in every step."
    if config.mlp == "follow":
        following = sum(row.mlp == "follow" for row in rows)
        feed_forward = (
            "Feed-forward (in parallel blocks the MLP with its attention): rows cached in all heads are "
            f"forecast in {following} of {len(rows)} layers."
        )
    if any(row.cross_attention for row in rows):
        crossing = sum(row.cross_attention == "follow" for row in rows)
        forecast = f"rows cached in all heads are forecast in {crossing} of {len(rows)} layers"
        how = forecast if crossing else "dense in every step (Config.cross_attention)"
        notes += (f"Cross-attention: {how}.",)
    kinds = tuple(step.kind for step in plan(num_steps, config)) if num_steps is not None else ()
    return Explanation(model, enabled, config, rows, (*_ALWAYS, feed_forward, *notes), kinds)
