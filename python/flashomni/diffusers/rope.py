"""Forms of RoPE: what a model's blocks are given, as the engine takes it.

A form is form(rope, joint) -> (cos, sin), float32 [tokens, D] each with pairs (2i, 2i + 1), row by row of the
joint sequence that FlashOmni lays out (flashomni.diffusers.call.Joint). Where tables will not do it returns a
function of x [B, M, H, D] and x's first row, which rotates x in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashomni.diffusers.call import Joint

Tables = tuple[Tensor, Tensor]
Rotation = Callable[[Tensor, int], None]
Form = Callable[[Any, "Joint"], Tables | Rotation]


def joint_tables(rope: Tables, joint: Joint) -> Tables:
    """(cos, sin) of [text, image], as FLUX has them."""
    text = joint.text
    if text.start == 0:
        return rope
    of_text, of_image = (tuple(t[rows] for t in rope) for rows in _split(text.length))
    return _in_order(of_text, of_image, joint)


def image_tables(rope: Tables, joint: Joint) -> Tables:
    """(cos, sin) of the image alone: the text is not rotated."""
    cos, sin = (table.float() for table in rope)
    shape = (joint.text.length, cos.shape[-1])
    return _in_order((cos.new_ones(shape), sin.new_zeros(shape)), (cos, sin), joint)


def batched_tables(rope: Tables, joint: Joint) -> Tables:
    """(cos, sin) [1, tokens, 1, D] of a sequence without text, as Wan has them: of a pair it reads the first
    cosine and the second sine, which ChronoEdit's tables of odd widths make differ from the others."""
    cos, sin = (table.squeeze(2).squeeze(0).float() for table in rope)
    return cos[:, 0::2].repeat_interleave(2, -1), sin[:, 1::2].repeat_interleave(2, -1)


def channel_tables(rope: Tables, joint: Joint) -> Rotation:
    """(cos, sin) [B, tokens, H * D]: a rotation of each element and each head, as LTX has them."""

    def rotate(x: Tensor, start: int) -> None:
        rows = slice(start, start + x.shape[1])
        cos, sin = (table[:, rows].unflatten(-1, x.shape[2:]) for table in rope)
        wide = x.float()
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        x.copy_(wide * cos + turned * sin)

    return rotate


def head_tables(rope: Tables, joint: Joint) -> Rotation:
    """The same as LTX-2 has it: as LTX, or (cos, sin) [B, H, tokens, D / 2] of pairs (i, i + D / 2)."""
    if rope[0].ndim == 3:
        return channel_tables(rope, joint)

    def rotate(x: Tensor, start: int) -> None:
        cos, sin = (table[:, :, start : start + x.shape[1]].transpose(1, 2) for table in rope)
        first, second = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))

    return rotate


def pair_matrices(rope: Tensor, joint: Joint) -> Tables:
    """[B, tokens, 1, D / 2, 2, 2] of a sequence without text, as Kandinsky 5 has it: a rotation a pair, the
    same for all elements."""
    of_pairs = rope[0, :, 0].float()
    return tuple(of_pairs[..., row, 0].repeat_interleave(2, -1) for row in (0, 1))


def complex_streams(rope: tuple[Tensor, Tensor], joint: Joint) -> Tables:
    """Complex [tokens, D / 2] of the image and of the text."""
    of_image, of_text = map(_tables, rope)
    return _in_order(of_text, of_image, joint)


def complex_elements(rope: Tensor, joint: Joint) -> Tables | Rotation:
    """Complex [B, tokens, D / 2]; the elements are rotated alike unless their text differs in length."""
    if joint.valid is None:
        return _tables(rope[0])

    def rotate(x: Tensor, start: int) -> None:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * rope[:, start : start + x.shape[1]].unsqueeze(2)
        x.copy_(torch.view_as_real(turned).flatten(3))

    return rotate


def image_pairs_by_head(rope: Tables, joint: Joint) -> Rotation:
    """cos, sin [tokens, H, D / 2] of the image alone, another angle in each head."""

    def rotate(x: Tensor, start: int) -> None:
        rows, image = _image_rows(x, start, joint)
        c, s = (table[rows] for table in rope)
        even, odd = image[..., 0::2].float(), image[..., 1::2].float()
        image.copy_(torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2))

    return rotate


def image_halves(rope: Tables, joint: Joint) -> Rotation:
    """(cos, sin) [tokens, D] of the image alone, of pairs (i, i + D / 2); perhaps on the host."""
    tables: dict[torch.device, Tables] = {}

    def rotate(x: Tensor, start: int) -> None:
        rows, image = _image_rows(x, start, joint)
        if x.device not in tables:
            tables[x.device] = tuple(table.to(x.device, torch.float32) for table in rope)
        _rotate_halves(image, *(table[rows] for table in tables[x.device]))

    return rotate


def rounded(tables: Tables, dtype: torch.dtype) -> Rotation:
    """The same rotation, done in float32 and rounded to `dtype`, whatever type x is of."""

    def rotate(x: Tensor, start: int) -> None:
        cos, sin = (table[start : start + x.shape[1]].unsqueeze(1) for table in tables)
        wide = x.float()
        turned = torch.stack([-wide[..., 1::2], wide[..., 0::2]], dim=-1).flatten(-2)
        x.copy_((wide * cos + turned * sin).to(dtype))

    return rotate


def axis_halves(rope: tuple[tuple[Tables, ...], tuple[Tensor, ...]], joint: Joint) -> Rotation:
    """As Allegro has it, without text: of time, height and width (cos, sin) [positions, D / 3]; and every
    token's positions [1, tokens] along them. Pairs are of the two halves of a third of a head."""
    cos, sin = (
        torch.cat([table[where[0]] for table, where in zip(each, rope[1], strict=True)], dim=-1).float()
        for each in zip(*rope[0], strict=True)
    )

    def rotate(x: Tensor, start: int) -> None:
        rows = slice(start, start + x.shape[1])
        _rotate_halves(x, cos[rows], sin[rows], parts=len(rope[1]))

    return rotate


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, parts: int = 1) -> None:
    """x [B, M, H, D] in place, by tables [M, D]: pairs of the two halves of each of a head's `parts`."""
    wide = x.float()
    first, second = wide.unflatten(-1, (parts, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    x.copy_(wide * cos.unsqueeze(1) + turned * sin.unsqueeze(1))


def _image_rows(x: Tensor, start: int, joint: Joint) -> tuple[slice, Tensor]:
    """Of x, rows from `start` on of the joint sequence, those of the image: which they are there, and they.

    x may be of the image's rows or of the text's, which is not rotated: then there are none.
    """
    first, count = joint.image.start, joint.image.length
    begin = min(max(start, first), start + x.shape[1])
    end = max(begin, min(start + x.shape[1], first + count))
    return slice(begin - first, end - first), x[:, begin - start : end - start]


def _tables(freqs: Tensor) -> Tables:
    return tuple(part.float().repeat_interleave(2, -1) for part in (freqs.real, freqs.imag))


def _split(length: int) -> tuple[slice, slice]:
    return slice(None, length), slice(length, None)


def _in_order(of_text: Tables, of_image: Tables, joint: Joint) -> Tables:
    first, second = (of_text, of_image) if joint.text.start == 0 else (of_image, of_text)
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])
