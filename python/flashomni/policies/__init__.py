"""Policies: from this step's queries and keys to sparse symbols."""

from flashomni.policies.base import Choice, Layout, Policy, Segment, Stats, Step, protect
from flashomni.policies.drift import DriftPolicy
from flashomni.policies.paper import FlashOmniPolicy
from flashomni.policies.registry import check_policy, make_policy, policy_names, register_policy
from flashomni.policies.static import DensePolicy, RandomPolicy

__all__ = [
    "Choice",
    "DensePolicy",
    "DriftPolicy",
    "FlashOmniPolicy",
    "Layout",
    "Policy",
    "RandomPolicy",
    "Segment",
    "Stats",
    "Step",
    "check_policy",
    "make_policy",
    "policy_names",
    "protect",
    "register_policy",
]
