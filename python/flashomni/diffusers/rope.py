"""Forms of RoPE: what a model's blocks are given, as tables of the joint sequence.

A form is form(rope, text, image) -> (cos, sin), float32 [tokens, D] each with pairs (2i, 2i + 1), row by row
of the joint sequence that FlashOmni lays out: `text` and `image` are Segments of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashomni.policies import Segment

Tables = tuple[Tensor, Tensor]
Form = Callable[[Any, Segment, Segment], Tables]


def joint_tables(rope: Tables, text: Segment, image: Segment) -> Tables:
    """(cos, sin) of [text, image], as FLUX has them."""
    if text.start == 0:
        return rope
    return _in_order((rope[0][: text.length], rope[1][: text.length]), _rest(rope, text.length), text)


def image_tables(rope: Tables, text: Segment, image: Segment) -> Tables:
    """(cos, sin) of the image alone: the text is not rotated."""
    cos, sin = rope
    shape = (text.length, cos.shape[-1])
    still = (
        torch.ones(shape, dtype=torch.float32, device=cos.device),
        cos.new_zeros(shape, dtype=torch.float32),
    )
    return _in_order(still, (cos.float(), sin.float()), text)


def complex_streams(rope: tuple[Tensor, Tensor], text: Segment, image: Segment) -> Tables:
    """Complex [tokens, D / 2] of the image and of the text."""
    of_image, of_text = (
        tuple(part.float().repeat_interleave(2, -1) for part in (freqs.real, freqs.imag)) for freqs in rope
    )
    return _in_order(of_text, of_image, text)


def _rest(rope: Tables, start: int) -> Tables:
    return rope[0][start:], rope[1][start:]


def _in_order(of_text: Tables, of_image: Tables, text: Segment) -> Tables:
    first, second = (of_text, of_image) if text.start == 0 else (of_image, of_text)
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
