"""The shapes of transformer block that attentions come in, one file each: its description and its code."""

from flashomni.diffusers.blocks.base import Blocks, Layer, Projections, part
from flashomni.diffusers.blocks.fused import FusedBlocks
from flashomni.diffusers.blocks.joint import JointBlocks
from flashomni.diffusers.blocks.parallel import ParallelBlocks
from flashomni.diffusers.blocks.plain import PlainBlocks

__all__ = [
    "Blocks",
    "FusedBlocks",
    "JointBlocks",
    "Layer",
    "ParallelBlocks",
    "PlainBlocks",
    "Projections",
    "part",
]
