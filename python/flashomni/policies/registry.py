"""Policies by name: ours, those registered here, and those that installed packages offer as entry points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import entry_points

from flashomni.policies.base import Policy, Stats
from flashomni.policies.drift import DriftPolicy
from flashomni.policies.paper import FlashOmniPolicy
from flashomni.policies.static import DensePolicy, RandomPolicy

ENTRY_POINT_GROUP = "flashomni.policies"

Factory = Callable[..., Policy]


def _drift(config) -> DriftPolicy:
    if config.max_order == 0 and config.tau_q > 0:
        raise ValueError("policy 'drift': expected max_order >= 1, which keeps the output before; got 0")
    return DriftPolicy(config.tau_q, config.tau_kv, config.s_q, config.self_similarity)


_FACTORIES: dict[str, Factory] = {
    "flashomni": lambda config: FlashOmniPolicy(
        config.tau_q, config.tau_kv, config.s_q, config.self_similarity
    ),
    "drift": _drift,
    "dense": lambda config: DensePolicy(),
    "random": lambda config: RandomPolicy(),
}


def register_policy(name: str, factory: Factory) -> None:
    """Makes `Config(policy=name)` mean `factory(config)`. ValueError if another factory has the name."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a non-empty string, got {name!r}")
    if not callable(factory):
        raise TypeError(f"factory: expected a callable that takes a Config, got {type(factory).__name__}")
    if _FACTORIES.get(name, factory) is not factory:
        raise ValueError(f"name: expected one that is free, got {name!r}, which is registered")
    _FACTORIES[name] = factory


def policy_names() -> list[str]:
    """Every name that make_policy() knows."""
    return sorted({*_FACTORIES, *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))})


def make_policy(name: str, config) -> Policy:
    """The policy called `name`, set up from a Config. ValueError lists the known names."""
    factory = _FACTORIES.get(name)
    if factory is None:
        found = [e for e in entry_points(group=ENTRY_POINT_GROUP) if e.name == name]
        if not found:
            raise ValueError(f"policy: expected one of {', '.join(policy_names())}, got {name!r}")
        factory = found[0].load()
    return check_policy(factory(config))


def check_policy(policy) -> Policy:
    """`policy` itself, if it can serve as one; TypeError or ValueError otherwise."""
    if not callable(getattr(policy, "select", None)):
        raise TypeError(f"policy: expected an object with a select() method, got {type(policy).__name__}")
    known = [field.name for field in fields(Stats)]
    unknown = set(getattr(policy, "needs", ())) - set(known)
    if unknown:
        raise ValueError(f"policy.needs: expected names among {', '.join(known)}, got {sorted(unknown)}")
    return policy
