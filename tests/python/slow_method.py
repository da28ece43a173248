"""The method once more, in float64: diffusers' own model with processors that mask and forecast O itself.

Written from the paper (arXiv 2509.25401) and TaylorSeer (arXiv 2503.06923): no operator and no engine of
ours. What is shared with the code under test is the symbols alone, which a RecordingPolicy writes down.
"""

from __future__ import annotations

import math

import torch

from flashomni.policies import Policy


class RecordingPolicy(Policy):
    """Another policy, whose masks it keeps by (step, context, layer)."""

    def __init__(self, policy: Policy):
        self.policy, self.needs = policy, policy.needs
        self.masks: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def select(self, step, layout, stats, state, choice) -> None:
        self.policy.select(step, layout, stats, state, choice)
        masks = choice.symbols.masks()
        self.masks[step.index, step.context, step.layer] = tuple(mask.clone() for mask in masks)


def step_kind(step: int, steps: int, interval: int, warmup: int, cooldown: int) -> tuple[str, int]:
    """(kind, steps since the Update). A window of one step is Full."""
    if step < warmup or step >= steps - cooldown:
        return "full", 0
    since = (step - warmup) % interval
    start = step - since
    if min(start + interval, steps - cooldown) - start == 1:
        return "full", 0
    return ("update", 0) if since == 0 else ("dispatch", since)


class History:
    """Differences of what one module gave at the recorded steps. `run` gives the step at hand."""

    def __init__(self, run: SlowRun):
        self.run = run
        self.differences: list[torch.Tensor] = []
        self.recorded_at: int | None = None

    def record(self, x: torch.Tensor) -> None:
        """If this step is one that is recorded."""
        run = self.run
        if run.kind[0] != "update" and not run.warmup - run.order <= run.step < run.warmup:
            return
        old, new = self.differences, [x]
        gap = None if self.recorded_at is None else run.step - self.recorded_at
        for i in range(min(len(old), run.order)):
            new.append((new[i] - old[i]) / gap)
        self.differences, self.recorded_at = new, run.step

    def forecast(self, cache: torch.Tensor) -> torch.Tensor:
        """Of order 0 where the layer is reused whole."""
        terms = self.differences if cache.any() else self.differences[:1]
        return sum(self.run.kind[1] ** i / math.factorial(i) * term for i, term in enumerate(terms))


class SlowProcessor:
    """One attention layer. `run` gives the step at hand."""

    def __init__(self, run: SlowRun, layer: int):
        self.run, self.layer = run, layer
        self.history, self.masks, self.tokens = History(run), None, 0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            streams.insert(0, (encoder_hidden_states, *added))
        q, k, v = [], [], []
        for x, to_q, to_k, to_v, norm_q, norm_k in streams:
            q.append(norm_q(to_q(x).unflatten(-1, (attn.heads, -1))))
            k.append(norm_k(to_k(x).unflatten(-1, (attn.heads, -1))))
            v.append(to_v(x).unflatten(-1, (attn.heads, -1)))
        q, k, v = (torch.cat(parts, 1) for parts in (q, k, v))
        cos, sin = (table.double() for table in image_rotary_emb)
        q, k = (_rotate(x, cos, sin) for x in (q, k))
        o = self._attend(q, k, v).flatten(2)
        if encoder_hidden_states is None:
            return o
        text = encoder_hidden_states.shape[1]
        return attn.to_out[0](o[:, text:]), attn.to_add_out(o[:, :text])

    def _attend(self, q, k, v):
        run, self.tokens = self.run, q.shape[1]
        if run.kind[0] == "dispatch":
            return self._dispatch(q, k, v)
        o = _softmax(q, k, None) @ v.transpose(1, 2)
        o = o.transpose(1, 2)
        self.history.record(o)
        if run.kind[0] == "update":
            self.masks = run.policy.masks[run.step, run.context, self.layer]
        return o

    def _dispatch(self, q, k, v):
        cache, skip = self.masks
        rows = torch.arange(q.shape[1]) // self.run.block_q
        columns = torch.arange(k.shape[1]) // self.run.block_kv
        o = _softmax(q, k, skip[:, :, rows][:, :, :, columns]) @ v.transpose(1, 2)
        active = cache[:, :, rows].transpose(1, 2).unsqueeze(-1)
        return torch.where(active, o.transpose(1, 2), self.history.forecast(cache))


class SlowRows:
    """A hook on a module whose rows, the last of the sequence, follow an attention's (Config.mlp)."""

    def __init__(self, attention: SlowProcessor):
        self.attention, self.history = attention, History(attention.run)

    def __call__(self, module, arguments, out):
        run = self.attention.run
        if run.kind[0] != "dispatch":
            return self.history.record(out)
        cache, _ = self.attention.masks
        rows = torch.arange(self.attention.tokens)[-out.shape[1] :] // run.block_q
        return torch.where(cache.any(1)[:, rows].unsqueeze(-1), out, self.history.forecast(cache))


class SlowRun:
    """The method on a float64 model: call model() as usual and step() after every step."""

    def __init__(self, model, policy: RecordingPolicy, config, steps: int, context=0):
        self.policy, self.steps, self.step, self.context = policy, steps, 0, context
        self.interval, self.warmup = config.cache_interval, config.disable_cache_before_step
        self.cooldown, self.order = config.cooldown_steps, config.max_order
        self.block_q, self.block_kv = config.block_q, config.block_kv
        blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        for layer, block in enumerate(blocks):
            processor = SlowProcessor(self, layer)
            block.attn.set_processor(processor)
            if config.mlp == "follow":
                after = block.ff if hasattr(block, "ff") else block.proj_out
                after.register_forward_hook(SlowRows(processor))

    @property
    def kind(self) -> tuple[str, int]:
        """Of the step at hand."""
        return step_kind(self.step, self.steps, self.interval, self.warmup, self.cooldown)

    def next(self) -> None:
        self.step += 1


def _softmax(q, k, mask):
    """[B, H, N, M] from q, k [B, N, H, D]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores, -1)


def _rotate(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 0::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
