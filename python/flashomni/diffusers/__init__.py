"""FlashOmni on diffusers' models: enable, disable, disabled, stats, explain."""

from flashomni.diffusers.api import disable, disabled, enable, explain, stats
from flashomni.diffusers.explain import Explanation

__all__ = ["Explanation", "disable", "disabled", "enable", "explain", "stats"]
