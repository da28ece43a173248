"""What a prompt asks for: the grammar of the picture language, read back into a description.

prompt     := thing [relation thing ["and" thing]] ["on" "a" background "background"]
thing      := "a" ["small" | "large"] colour kind
relation   := "above" | "below" | "left of" | "right of"
"""

from __future__ import annotations

import dataclasses

from .vocabulary import BACKGROUNDS, COLOURS, KINDS, RELATIONS, SIZES, WORDS, tokenize


@dataclasses.dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str | None = None  # None: not said

    def __str__(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.kind)))


@dataclasses.dataclass(frozen=True)
class Description:
    things: tuple[Thing, ...]
    relation: str | None  # of the first thing to each of the others
    background: str | None  # None: not said


def parse(prompt: str) -> Description:
    """Reads a prompt; raises ValueError where it leaves the grammar."""
    words = [WORDS[i] for i in tokenize(prompt)]
    at = 0

    def peek() -> str:
        return words[at] if at < len(words) else "the end"

    def take(*allowed: str) -> str:
        nonlocal at
        if peek() not in allowed:
            raise ValueError(f"prompt {prompt!r}: expected {' or '.join(allowed)}, found {peek()!r}")
        at += 1
        return words[at - 1]

    def thing() -> Thing:
        take("a")
        size = take(*SIZES) if peek() in SIZES else None
        return Thing(take(*COLOURS), take(*KINDS), size)

    things, relation, background = [thing()], None, None
    if peek() in RELATIONS:
        relation = take(*RELATIONS)
        if relation in ("left", "right"):
            take("of")
        things.append(thing())
        if peek() == "and":
            take("and")
            things.append(thing())
    if peek() == "on":
        take("on")
        take("a")
        background = take(*BACKGROUNDS)
        take("background")
    take("the end") if at < len(words) else None
    return Description(tuple(things), relation, background)
