"""The call of a model at hand: what its inputs say of the joint sequence, worked out once for all layers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from flashomni.engine import Engine
from flashomni.policies import Segment

T = TypeVar("T")
_REMEMBERED = 16  # tensors whose contents were read


class Inputs:
    """Arguments of a model's forward by name. What is set here is what the model gets."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict):
        self.model = model
        names = _parameters(type(model))
        if len(args) > len(names):
            raise TypeError(
                f"{type(model).__name__}: expected at most {len(names)} arguments, got {len(args)}"
            )
        self.kwargs = {**dict(zip(names, args, strict=False)), **kwargs}

    def __getitem__(self, name: str) -> Any:
        """The argument; None where it was not given."""
        return self.kwargs.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.kwargs[name] = value

    def refuse_options(self, name: str, known: tuple[str, ...] = ("scale",)) -> None:
        """NotImplementedError for entries of the dict `name` that processors would have to understand."""
        unknown = sorted(set(self[name] or ()) - set(known))
        if unknown:
            raise NotImplementedError(
                f"{name}: expected nothing but {', '.join(known)}, got {', '.join(unknown)}; call the model "
                "inside `with flashomni.disabled(...)`"
            )


@functools.cache
def _parameters(model: type) -> tuple[str, ...]:
    return tuple(inspect.signature(model.forward).parameters)[1:]


@dataclass(frozen=True)
class Joint:
    """The joint sequence of an attention: where text and image lie, what of the image is given."""

    text: Segment
    image: Segment
    condition: Segment | None
    valid: tuple[int, ...] | None  # tokens a batch element, where padding ends the sequence

    @property
    def tokens(self) -> int:
        return self.text.length + self.image.length


class Call:
    """What prepare() of a family found in the inputs of the call at hand.

    image: where the image stream of the attention at hand lies.

    text_lengths: valid text tokens of each batch element, where they differ. condition: how many tokens at
    the end of the image stream are given and not drawn (pictures to edit); drawn: or how many at its end are
    drawn, where those before are given (earlier frames). text_tokens: how many tokens of a
    sequence that holds both are text; for blocks that do not tell them apart.
    """

    def __init__(self, engine: Engine, text_first: bool):
        self.engine, self.text_first = engine, text_first
        self.text_lengths: tuple[int, ...] | None = None
        self.condition = 0
        self.image = Segment("image", 0, 0)
        self.drawn: int | None = None
        self.text_tokens = 0
        self._read: list[tuple[Tensor, tuple, Any]] = []

    def begin(self) -> None:
        """Forgets the call before; at the start of a run also what tensors held that were read."""
        if self.engine.is_new:
            self._read = []
        self.text_lengths, self.condition, self.drawn, self.text_tokens = None, 0, None, 0

    def key(self) -> Hashable:
        """All of it that the layers' work depends on."""
        return self.text_lengths, self.condition, self.drawn, self.text_tokens

    def read(self, tensor: Tensor, function: Callable[..., T], *options: Hashable) -> T:
        """function(tensor, *options), which may read it on the host: once a tensor, as pipelines pass the
        same one at every step."""
        version = None if tensor.is_inference() else tensor._version  # written to since?
        asked = (function, version, *options)
        for known, of, result in self._read:
            if known is tensor and of == asked:
                return result
        result = function(tensor, *options)
        self._read = [*self._read[1 - _REMEMBERED :], (tensor, asked, result)]
        return result

    def trim_text(
        self, inputs: Inputs, mask: str, texts: tuple[str, ...], *, drop_mask: bool = False
    ) -> None:
        """Cuts the padding off the inputs `texts` [B, T, ..] and `mask` [B, T]; notes lengths that differ.

        drop_mask: without padding left, the model takes no mask.
        """
        given = inputs[mask]
        if given is None:
            return
        lengths = self.read(given, valid_lengths)
        longest = max(1, *lengths)
        padded = any(length != longest for length in lengths)
        for name in texts:
            inputs[name] = inputs[name][:, :longest]
        inputs[mask] = None if drop_mask and not padded else given[:, :longest]
        self.text_lengths = lengths if padded else None

    def lay_out_whole(self, tokens: int) -> Joint:
        """The joint sequence of a block that is given it whole."""
        if self.text_tokens > tokens:
            raise ValueError(f"text: expected at most all of {tokens} tokens, got {self.text_tokens}")
        return self.lay_out(self.text_tokens, tokens - self.text_tokens)

    def lay_out(self, text: int, image: int) -> Joint:
        """The joint sequence of `text` and `image` tokens."""
        start = text if self.text_first else 0
        condition = self._condition(start, image)
        valid = None
        if self.text_lengths is not None:
            if self.text_first:
                raise NotImplementedError("text: expected as many tokens in every element, got padding")
            valid = tuple(image + length for length in self.text_lengths)
        of_text = Segment("text", 0 if self.text_first else image, text)
        return Joint(of_text, Segment("image", start, image), condition, valid)

    def _condition(self, start: int, image: int) -> Segment | None:
        """What of the image tokens, start .. start + image, is given and protected."""
        given = self.condition if self.drawn is None else image - self.drawn
        if not 0 <= given <= image:
            raise ValueError(f"condition: expected at most the {image} image tokens, got {given}")
        if given == 0 or not self.engine.config.protect_conditions:
            return None
        return Segment("condition", start if self.drawn is not None else start + image - given, given)


def valid_lengths(mask: Tensor) -> tuple[int, ...]:
    """Valid tokens of each row of a mask [B, T]. ValueError unless they come first."""
    valid = mask.bool().cpu()
    lengths = valid.sum(1)
    ends = valid.flip(1).int().argmax(1)
    last = (mask.shape[1] - ends) * valid.any(1)
    if not bool((last == lengths).all()):
        raise ValueError(
            "attention mask: expected valid tokens first and padding after them, got padding in between; "
            "call the model inside `with flashomni.disabled(...)`"
        )
    return tuple(int(length) for length in lengths)
