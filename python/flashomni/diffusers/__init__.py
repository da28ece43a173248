"""FlashOmni on diffusers' models: enable, disable, disabled, stats, explain, memory."""

from flashomni.diffusers.api import disable, disabled, enable, explain, stats
from flashomni.diffusers.explain import Explanation
from flashomni.diffusers.memory import memory

__all__ = ["Explanation", "disable", "disabled", "enable", "explain", "memory", "stats"]
