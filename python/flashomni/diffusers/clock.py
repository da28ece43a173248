"""The engine's clock is the scheduler's own: set_timesteps() begins a run, step() ends a denoising step."""

from __future__ import annotations

import copy
import functools
from typing import Any

from flashomni.engine import Engine

_ATTRIBUTE = "_flashomni_clock"


class SchedulerClock:
    """Wraps one scheduler instance's set_timesteps() and step(), and tells the engines that listen."""

    def __init__(self, scheduler: Any):
        self.scheduler, self.engines = scheduler, []
        self._saved = {name: scheduler.__dict__.get(name) for name in ("set_timesteps", "step")}
        self._done: int | None = None  # the scheduler's index of the step that ended last
        set_timesteps, step = scheduler.set_timesteps, scheduler.step

        @functools.wraps(set_timesteps)
        def wrapped_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self._done = None
            for engine in self.engines:
                engine.begin_when_called(self._num_steps)
            return result

        @functools.wraps(step)
        def wrapped_step(*args: Any, **kwargs: Any) -> Any:
            # Cosmos calls step() twice a denoising step and sets its index back in between.
            again = self._done is not None and self._index() == self._done
            result = step(*args, **kwargs)
            index = self._index()
            self._done = index - 1 if index is not None else None
            for engine in self.engines if not again else ():
                engine.step()
            return result

        scheduler.set_timesteps, scheduler.step = wrapped_set_timesteps, wrapped_step
        scheduler.__dict__["__deepcopy__"] = self._plain_copy
        self._wrapped = {"set_timesteps": wrapped_set_timesteps, "step": wrapped_step}

    def _num_steps(self) -> int:
        # Image-to-image pipelines set the timesteps of a whole run and begin in its middle.
        return len(self.scheduler.timesteps) - (getattr(self.scheduler, "begin_index", None) or 0)

    def _index(self) -> int | None:
        """Of the step to come; None where the scheduler does not count, or not yet."""
        return getattr(self.scheduler, "step_index", None)

    def _plain_copy(self, memo: dict) -> Any:
        """A deep copy, as LTX-2's pipelines make one for their sound, drives nobody: ours stays behind."""
        ours = {_ATTRIBUTE, "__deepcopy__"}
        ours |= {name for name, wrapped in self._wrapped.items() if self.scheduler.__dict__[name] is wrapped}
        clone = memo[id(self.scheduler)] = object.__new__(type(self.scheduler))
        own = {name: value for name, value in self.scheduler.__dict__.items() if name not in ours}
        clone.__dict__.update(copy.deepcopy(own, memo))
        return clone

    def _unwrap(self) -> None:
        del self.scheduler.__dict__["__deepcopy__"]
        for name, original in self._saved.items():
            if self.scheduler.__dict__.get(name) is not self._wrapped[name]:
                continue  # wrapped again by somebody else: ours stays below it and has nobody left to tell
            if original is None:
                delattr(self.scheduler, name)
            else:
                setattr(self.scheduler, name, original)


def listen(engine: Engine, scheduler: Any) -> None:
    """Lets `scheduler` drive `engine`."""
    clock = scheduler.__dict__.get(_ATTRIBUTE)
    if clock is None:
        clock = SchedulerClock(scheduler)
        setattr(scheduler, _ATTRIBUTE, clock)
    clock.engines.append(engine)


def unlisten(engine: Engine, scheduler: Any) -> None:
    """The inverse of listen(); restores the scheduler after its last engine."""
    clock = scheduler.__dict__.get(_ATTRIBUTE)
    if clock is None or engine not in clock.engines:
        return
    clock.engines.remove(engine)
    if not clock.engines:
        clock._unwrap()
        delattr(scheduler, _ATTRIBUTE)
