"""enable, disable, disabled, stats, explain: FlashOmni on a diffusers pipeline or transformer."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flashomni.config import Config
from flashomni.diffusers.blocks import Layer
from flashomni.diffusers.call import Call, Inputs
from flashomni.diffusers.clock import listen, unlisten
from flashomni.diffusers.explain import Explanation, explanation, row_of
from flashomni.diffusers.families import Family, family_of
from flashomni.diffusers.graphs import graph_steps
from flashomni.diffusers.layers import find_layers
from flashomni.diffusers.patches import lay_out_tokens
from flashomni.engine import Engine, RunStats
from flashomni.engine.stats import sum_by_name, together
from flashomni.policies import Policy, check_policy, make_policy

_ATTRIBUTE = "_flashomni"


class _Attachment:
    """All that enable() put onto one transformer, and how it comes off again."""

    def __init__(self, engine: Engine, family: Family, transformer: nn.Module, pipe: Any):
        self.engine, self.family = engine, family
        self.call = Call(engine, family.text_first)
        self.pipe = weakref.ref(pipe) if pipe is not None else None
        self.scheduler = getattr(pipe, "scheduler", None)
        self.restore: list[Callable[[], None]] = []
        self.context: str | None = None
        self._in_pass = False
        self._transformer = weakref.ref(transformer)

    def put(self, layers: list[Layer]) -> None:
        transformer, engine = self._transformer(), self.engine
        try:
            for layer in layers:
                self.restore.append(layer.spec.intercept(self.call, layer))
            self.restore.append(lay_out_tokens(engine, transformer))
            if engine.config.cuda_graphs:
                self.restore.append(graph_steps(engine, transformer))
            before = transformer.register_forward_pre_hook(self._before, with_kwargs=True)
            after = transformer.register_forward_hook(self._after, with_kwargs=True, always_call=True)
            self.restore += [before.remove, after.remove]
            self._watch_context(transformer)
            if self.scheduler is not None:
                listen(engine, self.scheduler)
                self.restore.append(functools.partial(unlisten, engine, self.scheduler))
            transformer.__dict__[_ATTRIBUTE] = self
        except BaseException:
            self.take_off()
            raise

    def take_off(self) -> None:
        for restore in reversed(self.restore):
            restore()
        self.restore = []
        self._transformer().__dict__.pop(_ATTRIBUTE, None)
        self.engine.enabled = False
        self.engine.release()

    def _watch_context(self, transformer: nn.Module) -> None:
        """Pipelines name their passes by transformer.cache_context(name)."""
        original = getattr(transformer, "cache_context", None)
        if original is None:
            return
        inner = transformer.__dict__.get("cache_context")

        @functools.wraps(original)
        @contextmanager
        def cache_context(name: str, **kwargs: Any) -> Iterator[None]:
            before, self.context = self.context, name
            try:
                with original(name, **kwargs):
                    yield
            finally:
                self.context = before

        transformer.__dict__["cache_context"] = cache_context

        def restore() -> None:
            if transformer.__dict__.get("cache_context") is cache_context:
                del transformer.__dict__["cache_context"]
                if inner is not None:
                    transformer.__dict__["cache_context"] = inner

        self.restore.append(restore)

    def _before(self, transformer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        engine = self.engine
        if not engine.enabled:
            return None
        pipe = self.pipe() if self.pipe is not None else None
        if pipe is not None and pipe.scheduler is not self.scheduler:
            raise RuntimeError(
                "flashomni: the pipeline's scheduler was replaced since flashomni.enable(pipe): "
                "call disable(pipe) and enable(pipe, config) again"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in transformer.parameters()):
            raise RuntimeError(
                "flashomni: expected inference (torch.no_grad() or torch.inference_mode()), got grad mode on "
                "and parameters that require grad; to train, call flashomni.disable() first"
            )
        device = next(transformer.parameters()).device.type
        # Weights that are offloaded say nothing of where the model runs.
        if any(torch.is_autocast_enabled(d) for d in ({device} & {"cpu", "cuda"} or ("cpu", "cuda"))):
            raise RuntimeError(
                "flashomni: expected no autocast, got one; convert the model by .to(dtype) instead"
            )
        engine.ledger.synchronize = device == "cuda"
        self.call.begin()
        if self.family.prepare is not None:
            inputs = Inputs(transformer, args, kwargs)
            self.family.prepare(inputs, self.call)
            args, kwargs = (), inputs.kwargs
        engine.start_pass(self.context, self.call.key())
        self._in_pass = True
        return args, kwargs

    def _after(self, transformer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        in_pass, self._in_pass = self._in_pass, False
        if in_pass:
            self.engine.end_pass(output is not None)


def enable(
    target: Any, config: Config | str | None = None, *, policy: Policy | None = None, timing: bool = False
) -> Engine:
    """Makes a diffusers pipeline, or a bare transformer, compute sparsely until disable().

    target: a pipeline with a supported `transformer`, whose scheduler then is the clock; or such a
        transformer, whose clock is the returned engine: begin(num_steps) before a run, step() after every
        denoising step.
        A pipeline's second expert (`transformer_2`) is served too, with an engine of its own.
    config: a Config, the name of a preset, or None for the defaults. policy: an object of your own instead of
        config.policy. timing: keep a ledger of seconds by kind of work (flashomni.stats).

    Warns once if anything will run dense unasked. Returns the engine, of two the first expert's. Raises
    NotImplementedError for an unknown model, one with nothing that can be sparse and, with config.strict, one
    with anything that cannot; RuntimeError if it is enabled already or another cache is; ValueError or
    TypeError for arguments.
    """
    pipe = target if not isinstance(target, nn.Module) else None
    made = []
    for name, transformer in transformers_of(target):
        made.append(_attachment_for(name, transformer, pipe, config, policy, timing))
    done: list[_Attachment] = []
    try:
        for attachment, layers in made:
            attachment.put(layers)
            done.append(attachment)
    except BaseException:
        for attachment in done:
            attachment.take_off()
        raise
    return made[0][0].engine


def _attachment_for(
    name: str,
    transformer: nn.Module,
    pipe: Any,
    config: Config | str | None,
    policy: Policy | None,
    timing: bool,
) -> tuple[_Attachment, list[Layer]]:
    """What to put onto one transformer, and the layers that it is for; changes nothing yet."""
    family = family_of(transformer)
    config = config_of(config, family)
    if _ATTRIBUTE in transformer.__dict__:
        raise RuntimeError("flashomni: enabled already; call flashomni.disable() first")
    if getattr(transformer, "is_cache_enabled", False):
        raise RuntimeError(
            "flashomni: another cache is enabled on the transformer; call its disable_cache() first"
        )
    layers = find_layers(transformer, family, name)
    beyond = [layer for layer in config.dense_layers if layer >= len(layers)]
    if beyond:
        raise ValueError(f"dense_layers: expected indices below {len(layers)}, got {beyond}")
    problems = [
        f"{row.name}: {'; '.join(row.notes)}"
        for row in (row_of(layer, config) for layer in layers)
        if row.notes and row.layer not in config.dense_layers
    ]
    if config.strict and problems:
        raise NotImplementedError("strict: " + "\n".join(problems))
    served = [layer for layer in layers if layer.refusal is None]
    if not served:
        raise NotImplementedError("flashomni: no layer can be sparse:\n" + "\n".join(problems))
    if problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        warnings.warn(
            f"flashomni: {len(problems)} of {len(layers)} layers run partly dense: {problems[0]}{more}. "
            "flashomni.explain() tells what each one does",
            stacklevel=3,
        )
    engine = Engine(config, len(layers), check_policy(policy or make_policy(config.policy, config)))
    engine.ledger.enabled = timing
    return _Attachment(engine, family, transformer, pipe), served


def disable(target: Any) -> None:
    """Puts back what was there before enable() and frees the engine's memory. Does nothing else."""
    for _, transformer in transformers_of(target):
        attachment = transformer.__dict__.get(_ATTRIBUTE)
        if attachment is not None:
            attachment.take_off()


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Inside, the model runs its own code; afterwards it is sparse again. The clock goes on."""
    engines = _engines(target)
    before = [engine.enabled for engine in engines]
    for engine in engines:
        engine.enabled = False
    try:
        yield
    finally:
        for engine, enabled in zip(engines, before, strict=True):
            engine.enabled = enabled


def stats(target: Any) -> RunStats:
    """Steps by kind, density, memory and seconds of this or the last run. RuntimeError if not enabled.

    Of a pipeline with two experts it is of both: the second's layers are numbered on from the first's.
    """
    engines = _engines(target)
    begun = [engine for engine in engines if engine.count] or engines
    joined = together([engine.run_stats() for engine in begun])
    return replace(joined, bytes_held=sum_by_name(engine.bytes_held() for engine in engines))


def explain(
    target: Any, config: Config | str | None = None, num_inference_steps: int | None = None
) -> Explanation:
    """Layer by layer what will be sparse, what stays dense and why; before or after enable().

    config: as for enable(); None means the one in use, or the default one. With num_inference_steps, the kind
    of every step too.
    """
    experts = transformers_of(target)
    attachment = experts[0][1].__dict__.get(_ATTRIBUTE)
    if config is None and attachment is not None:
        config = attachment.engine.config
    family = family_of(experts[0][1])
    notes = family.notes
    if isinstance(config, str) and config in family.presets:
        notes += (f"preset {config!r}: {family.presets[config].source}.",)
    return explanation(
        " and ".join(type(transformer).__name__ for _, transformer in experts),
        attachment is not None,
        config_of(config, family),
        [layer for name, expert in experts for layer in find_layers(expert, family_of(expert), name)],
        num_inference_steps,
        notes,
    )


def config_of(config: Config | str | None, family: Family) -> Config:
    """What a user may pass as a config, for a model of this family."""
    if config is None:
        return Config()
    if isinstance(config, str) and config in family.presets:
        return Config(**family.presets[config].settings)
    if isinstance(config, str):
        try:
            return Config.preset(config)
        except ValueError as error:
            known = ", ".join(family.presets) or "none"
            raise ValueError(f"{error}; this model's own presets: {known}") from None
    if not isinstance(config, Config):
        raise TypeError(
            f"config: expected a flashomni.Config or a preset's name, got {type(config).__name__}"
        )
    return config


def transformers_of(target: Any) -> list[tuple[str, nn.Module]]:
    """(name, transformer): of a pipeline with two experts (Wan 2.2) both. The first one's name is empty."""
    if isinstance(target, nn.Module):
        if hasattr(target, "_orig_mod"):
            raise NotImplementedError(
                "transformer: expected a model that is not compiled, got torch.compile's"
            )
        return [("", target)]
    found = [(name, getattr(target, name, None)) for name in ("transformer", "transformer_2")]
    found = [(name, module) for name, module in found if isinstance(module, nn.Module)]
    if not found:
        raise TypeError(
            f"target: expected a pipeline with a transformer, or one, got {type(target).__name__}"
        )
    for _, module in found:
        transformers_of(module)
    return [("" if i == 0 else name, module) for i, (name, module) in enumerate(found)]


def _engines(target: Any) -> list[Engine]:
    engines = []
    for _, transformer in transformers_of(target):
        attachment = transformer.__dict__.get(_ATTRIBUTE)
        if attachment is None:
            raise RuntimeError("flashomni: not enabled; call flashomni.enable() first")
        engines.append(attachment.engine)
    return engines
