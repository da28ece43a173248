"""Scenes: what is in a picture and where, sampled in bulk as tensors, and the prompt that describes each.

Lengths are in units of the picture's side; y points down. A scene has one, two or three objects; with three,
the prompt "A above B and C" puts A above both, B and C side by side (B left of C, or B above C).
"""

from __future__ import annotations

import dataclasses

import torch

from .shapes import digit_variants
from .vocabulary import BACKGROUNDS, COLOURS, KINDS, MAX_WORDS, RELATIONS, SIZES, WORD_ID, detokenize

MAX_OBJECTS = 3
MARGIN = 0.04  # free border, and the least gap between two objects
# Radius ranges: no size word, "small", "large".
RADIUS = ((0.118, 0.14), (0.076, 0.086), (0.18, 0.2))
HELD_OUT_ONE_IN = 10


@dataclasses.dataclass
class Scenes:
    """A batch of B scenes; objects beyond `count` hold arbitrary values."""

    count: torch.Tensor  # [B] 1..3
    kind: torch.Tensor  # [B, 3] index into KINDS
    colour: torch.Tensor  # [B, 3] index into COLOURS
    size: torch.Tensor  # [B, 3] 0 unsaid, 1 small, 2 large
    relation: torch.Tensor  # [B] index into RELATIONS: first object to the others
    background: torch.Tensor  # [B] 0 unsaid (drawn white), else 1 + index into BACKGROUNDS
    centre: torch.Tensor  # [B, 3, 2] x, y
    radius: torch.Tensor  # [B, 3]
    variant: torch.Tensor  # [B, 3] handwriting of a digit
    phase: torch.Tensor  # [B, 2] shift of a texture, in periods

    def __getitem__(self, rows) -> Scenes:
        return Scenes(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def __len__(self) -> int:
        return self.count.shape[0]


def sample_scenes(n: int, generator: torch.Generator, held_out: bool | None = False) -> Scenes:
    """Samples scenes on the generator's device.

    `held_out` False: the training distribution, fewer than n where the hash rule took some out; True: only
    held-out scenes, about n / 10; None: both.
    """
    device = generator.device

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # One, two, three objects with probability 0.2, 0.5, 0.3.
    draw = uniform(n)
    count = 1 + (draw > 0.2).long() + (draw > 0.7).long()
    size = (uniform(n, 3) < 0.4).long() * (1 + integers(2, n, 3))
    size = torch.where((count == 3)[:, None], 0, size)  # no room for size words, nor for large objects
    low, high = torch.tensor(RADIUS, device=device).unbind(1)
    radius = low[size] + (high - low)[size] * uniform(n, 3)
    relation = integers(4, n)
    scenes = Scenes(
        count=count,
        kind=integers(len(KINDS), n, 3),
        colour=integers(len(COLOURS), n, 3),
        size=size,
        relation=relation,
        background=(uniform(n) < 0.8).long() * (1 + integers(len(BACKGROUNDS), n)),
        centre=_place(count, relation, radius, uniform(n, 8)),
        radius=radius,
        variant=integers(digit_variants(), n, 3),
        phase=uniform(n, 2),
    )
    return scenes if held_out is None else scenes[is_held_out(scenes) == held_out]


def _place(
    count: torch.Tensor, relation: torch.Tensor, radius: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Centres [B, 3, 2] that obey the relation, keep MARGIN to the border and do not overlap; u [B, 8] in
    [0, 1)."""
    # Worked out for "A above B [and C]" as (across, along), then flipped and transposed.
    single = 0.3 + 0.4 * u[:, :2]
    r0, r1 = radius[:, 0], radius[:, 1]
    gap = MARGIN + 0.06 * u[:, 2]
    slack = 1 - 2 * MARGIN - 2 * (r0 + r1) - gap
    along0 = MARGIN + r0 + slack * u[:, 3]
    along1 = along0 + r0 + gap + r1
    across = 0.35 + 0.3 * u[:, 4]
    pair0 = torch.stack([across + 0.08 * (u[:, 5] - 0.5), along0], -1)
    pair1 = torch.stack([across + 0.08 * (u[:, 6] - 0.5), along1], -1)
    u = u - 0.5
    trio = torch.stack(
        [
            torch.stack([0.5 + 0.1 * u[:, 0], 0.27 + 0.06 * u[:, 1]], -1),
            torch.stack([0.27 + 0.08 * u[:, 2], 0.72 + 0.08 * u[:, 3]], -1),
            torch.stack([0.73 + 0.08 * u[:, 4], 0.72 + 0.08 * u[:, 5]], -1),
        ],
        dim=1,
    )
    pair = torch.stack([pair0, pair1, pair1], dim=1)
    centre = torch.where((count == 3)[:, None, None], trio, pair)
    flipped = torch.stack([centre[..., 0], 1 - centre[..., 1]], -1)
    centre = torch.where((relation % 2 == 1)[:, None, None], flipped, centre)
    centre = torch.where((relation >= 2)[:, None, None], centre.flip(-1), centre)
    return torch.where((count == 1)[:, None, None], single[:, None, :], centre)


def combination_hash(count: torch.Tensor, kind: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Hash [B] of the unordered set of (colour, kind) objects in each scene; integers only, so exact
    anywhere."""
    slot = torch.arange(MAX_OBJECTS, device=count.device)
    objects = torch.where(slot < count[:, None], 1 + colour * len(KINDS) + kind, 0).sort(dim=1).values
    h = torch.full_like(count, 0x2545F491)
    for i in range(MAX_OBJECTS):
        h = ((h ^ objects[:, i]) * 0x9E3779B1) & 0x7FFFFFFF
        h = h ^ (h >> 13)
    return (h * 0x85EBCA6B & 0x7FFFFFFF) >> 8


def is_held_out(scenes: Scenes) -> torch.Tensor:
    """Whether each scene's combination of objects is kept out of training: one combination in ten."""
    return combination_hash(scenes.count, scenes.kind, scenes.colour) % HELD_OUT_ONE_IN == 0


def scene_words(scenes: Scenes) -> torch.Tensor:
    """Word ids [B, 16] of each scene's prompt, 0 pads."""
    device = scenes.count.device

    def ids(words: tuple[str, ...], none: bool = False) -> torch.Tensor:
        return torch.tensor([0] * none + [WORD_ID[word] for word in words], device=device)

    zero = torch.zeros_like(scenes.count)
    a, of, conj, on, ground = (zero + WORD_ID[word] for word in ("a", "of", "and", "on", "background"))
    sizes, colours, kinds = ids(SIZES, none=True), ids(COLOURS), ids(KINDS)

    def thing(i: int) -> list[torch.Tensor]:
        return [a, sizes[scenes.size[:, i]], colours[scenes.colour[:, i]], kinds[scenes.kind[:, i]]]

    def only_if(condition: torch.Tensor, words: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.where(condition, word, 0) for word in words]

    relation = [ids(RELATIONS)[scenes.relation], torch.where(scenes.relation >= 2, of, 0)]
    background = [on, a, ids(BACKGROUNDS, none=True)[scenes.background], ground]
    slots = thing(0)
    slots += only_if(scenes.count >= 2, relation + thing(1))
    slots += only_if(scenes.count == 3, [conj] + thing(2))
    slots += only_if(scenes.background > 0, background)
    table = torch.stack(slots, dim=1)
    # A stable sort moves the empty slots behind the words and keeps the words' order.
    order = (table == 0).long().sort(dim=1, stable=True).indices
    return table.gather(1, order)[:, :MAX_WORDS]


def scene_prompts(scenes: Scenes) -> list[str]:
    """The prompt of each scene, in words."""
    return [detokenize(row) for row in scene_words(scenes).tolist()]


def sample_held_out_prompts(n: int, seed: int) -> list[str]:
    """n different prompts of held-out scenes."""
    scenes = sample_scenes(40 * n, torch.Generator().manual_seed(seed), held_out=True)
    return list(dict.fromkeys(scene_prompts(scenes)))[:n]
