"""Does a picture show what its prompt says? Judged from pixels alone, attribute by attribute."""

from __future__ import annotations

import dataclasses
import itertools

from .prompt import Description, Thing, parse
from .segment import Found, as_array, find_background, find_objects

LEAST_OVERLAP = 0.6  # IoU below which an object is no drawing of anything
LEAST_OFFSET = 0.08  # of the side, for "above" and the like
SMALL_BELOW, LARGE_ABOVE = 0.094, 0.146  # radii in units of the side


@dataclasses.dataclass(frozen=True)
class Score:
    """Verdict on a picture; each part is True where the prompt is obeyed or says nothing."""

    count: bool  # as many objects as the prompt names
    shapes: bool
    colours: bool
    sizes: bool
    relation: bool
    background: bool
    found: tuple[Found, ...]  # what was seen, in the order of the prompt's objects, extras last
    found_background: str | None

    @property
    def parts(self) -> dict[str, bool]:
        names = ("count", "shapes", "colours", "sizes", "relation", "background")
        return {name: getattr(self, name) for name in names}

    @property
    def ok(self) -> bool:
        return all(self.parts.values())

    def __str__(self) -> str:
        if self.ok:
            return "ok"
        wrong = ", ".join(name for name, good in self.parts.items() if not good)
        seen = ", ".join(f"{f.colour} {f.kind}" for f in self.found) or "nothing"
        return f"wrong: {wrong}; seen: {seen} on {self.found_background}"


def _shape_ok(found: Found, thing: Thing) -> bool:
    return found.kind == thing.kind and found.overlap >= LEAST_OVERLAP


def _size_ok(found: Found, thing: Thing) -> bool:
    # A digit or a diamond is drawn by its height, so half the longer side stands for the radius of all kinds.
    if thing.size == "small":
        return found.radius < SMALL_BELOW
    if thing.size == "large":
        return found.radius > LARGE_ABOVE
    return True


def _relation_ok(relation: str, first: Found, second: Found, alone: bool) -> bool:
    """Whether `first` is `relation` of `second`; with no third object its offset must also be the larger
    one."""
    dx, dy = second.x - first.x, second.y - first.y
    ahead, aside = (dy, dx) if relation in ("above", "below") else (dx, dy)
    if relation in ("below", "right"):
        ahead = -ahead
    return ahead > LEAST_OFFSET and (not alone or ahead > abs(aside))


def _judge(wanted: Description, seen: tuple[Found, ...]) -> tuple[bool, bool, bool, bool]:
    """(shapes, colours, sizes, relation) with seen[i] standing for wanted.things[i]; what is missing is
    wrong."""
    things = wanted.things
    pairs = list(zip(things, seen, strict=False))
    complete = len(seen) >= len(things)
    shapes = complete and all(_shape_ok(f, t) for t, f in pairs)
    colours = complete and all(f.colour == t.colour for t, f in pairs)
    sizes = all(_size_ok(f, t) for t, f in pairs) and (complete or not any(t.size for t in things))
    relation = True
    if wanted.relation:
        others = seen[1 : len(things)]
        alone = len(things) == 2
        relation = complete and all(_relation_ok(wanted.relation, seen[0], other, alone) for other in others)
    return shapes, colours, sizes, relation


def score(image, prompt: str) -> Score:
    """Scores a PIL image (or RGB array, or tensor [3, H, W] in [0, 1]) against a prompt of the vocabulary."""
    wanted = parse(prompt)
    picture = as_array(image)
    found, colourful = find_objects(picture)
    background, _ = find_background(picture, colourful)

    def merit(order: tuple[Found, ...]) -> tuple[int, ...]:
        matched = sum(
            2 * _shape_ok(f, t) + 2 * (f.colour == t.colour) + _size_ok(f, t)
            for t, f in zip(wanted.things, order, strict=False)
        )
        return matched, sum(_judge(wanted, order))

    # Only the largest few can stand for the objects; a crowd of specks fails by its count anyway.
    candidates, specks = found[:4], found[4:]
    best = max(itertools.permutations(candidates), key=merit)
    shapes, colours, sizes, relation = _judge(wanted, best)
    return Score(
        count=len(found) == len(wanted.things),
        shapes=shapes,
        colours=colours,
        sizes=sizes,
        relation=relation,
        background=wanted.background is None or background == wanted.background,
        found=best + tuple(specks),
        found_background=background,
    )
