"""GPU backends on demand: the plugin's sources, the compiler, the build cache, the loading.

sources    what a plugin is made of, and its digest
toolkit    nvcc: where it is, which version
build      one compilation into the cache, shared by concurrent processes
plugin     which plugin a device needs, whether it is there, loading it
"""

from flashomni.jit.build import BuildError
from flashomni.jit.plugin import ensure, warmup

__all__ = ["BuildError", "ensure", "warmup"]
