"""What holds for all model families: the registry, presets, and what is read of a call's inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashomni import Config
from flashomni.diffusers.call import Call, Inputs, valid_lengths
from flashomni.diffusers.families import FAMILIES, Family, register_family
from flashomni.engine import Engine
from flashomni.policies import DensePolicy, Segment


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_presets_are_configurations_with_a_source(name: str) -> None:
    import diffusers

    assert isinstance(getattr(diffusers, name), type), "a class of diffusers"
    presets = FAMILIES[name].presets
    assert set(presets) == {"quality", "balanced", "fast"}
    for preset in presets.values():
        assert isinstance(Config(**preset.settings), Config) and preset.source


def test_a_class_belongs_to_one_family() -> None:
    with pytest.raises(ValueError, match="no family has yet, got 'FluxTransformer2DModel'"):
        register_family(Family(models=("FluxTransformer2DModel",), blocks=()))
    register_family(FAMILIES["FluxTransformer2DModel"])  # the same again is none


def call(text_first: bool, **settings) -> Call:
    return Call(Engine(Config(**settings), 1, DensePolicy()), text_first)


@pytest.mark.parametrize(
    ("mask", "lengths"),
    [([[1, 1, 0]], (2,)), ([[1, 1, 1], [0, 0, 0]], (3, 0)), ([[True, False], [True, True]], (1, 2))],
)
def test_lengths_of_masks(mask: list, lengths: tuple[int, ...]) -> None:
    assert valid_lengths(torch.tensor(mask)) == lengths


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[1, 1, 0], [0, 1, 0]]])
def test_masks_that_are_no_lengths(mask: list) -> None:
    with pytest.raises(ValueError, match="expected valid tokens first"):
        valid_lengths(torch.tensor(mask))


def test_what_is_read_once() -> None:
    where, mask, reads = call(True), torch.ones(1, 3), []

    def count(tensor: torch.Tensor) -> int:
        reads.append(1)
        return int(tensor.sum())

    where.engine.begin(4)
    where.begin()
    assert [where.read(mask, count) for _ in range(3)] == [3] * 3 and len(reads) == 1
    mask[0, 2] = 0  # written to: read again
    assert where.read(mask, count) == 2 and len(reads) == 2
    assert where.read(mask.clone(), count) == 2 and len(reads) == 3
    where.engine.start_pass()
    where.begin()
    assert where.read(mask, count) == 2 and len(reads) == 3
    where.engine.begin(4)
    where.begin()  # a new run trusts nothing
    assert where.read(mask, count) == 2 and len(reads) == 4


def test_joint_sequences() -> None:
    first, last = call(True), call(False)
    first.condition = last.condition = 5
    joint = first.lay_out(10, 20)
    assert (joint.text, joint.image) == (Segment("text", 0, 10), Segment("image", 10, 20))
    assert joint.condition == Segment("condition", 25, 5)
    joint = last.lay_out(10, 20)
    assert (joint.text, joint.image) == (Segment("text", 20, 10), Segment("image", 0, 20))
    assert joint.condition == Segment("condition", 15, 5)
    last.drawn = 12
    assert last.lay_out(10, 20).condition == Segment("condition", 0, 8)
    last.text_lengths = (10, 3)
    assert last.lay_out(10, 20).valid == (30, 23)
    last.text_tokens = 10
    assert last.lay_out_whole(30) == last.lay_out(10, 20)
    assert call(False, protect_conditions=False).lay_out(10, 20).condition is None
    first.text_lengths = (10, 3)
    with pytest.raises(NotImplementedError, match="text: expected as many tokens"):
        first.lay_out(10, 20)
    last.drawn = 30
    with pytest.raises(ValueError, match="condition: expected at most the 20 image tokens"):
        last.lay_out(10, 20)


def test_inputs_by_name() -> None:
    class Model(nn.Module):
        def forward(self, hidden_states, timestep=None, mask=None):
            return hidden_states

    given = Inputs(Model(), (1,), {"mask": 2})
    assert (given["hidden_states"], given["timestep"], given["mask"]) == (1, None, 2)
    given["mask"] = 3
    assert given.kwargs == {"hidden_states": 1, "mask": 3}
    with pytest.raises(TypeError, match="expected at most 3 arguments, got 4"):
        Inputs(Model(), (1, 2, 3, 4), {})
