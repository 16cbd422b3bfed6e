"""Policies: which tokens take part in which block. One file per method; importing this package registers them all."""

from sievit.policies.attention import Attention, AttentionConfig
from sievit.policies.base import (
    Notes,
    Policy,
    PolicyConfig,
    Projections,
    build_policy,
    policies,
    policy_config,
    register,
)
from sievit.policies.dtop import DToP, DToPConfig
from sievit.policies.keep_all import KeepAll, KeepAllConfig
from sievit.policies.options import PolicyOptions, chosen_policy
from sievit.policies.random import Random, RandomConfig
from sievit.policies.svit import SViT, SViTConfig
from sievit.policies.top_norm import TopNorm, TopNormConfig

__all__ = [
    "Attention",
    "AttentionConfig",
    "DToP",
    "DToPConfig",
    "KeepAll",
    "KeepAllConfig",
    "Notes",
    "Policy",
    "PolicyConfig",
    "PolicyOptions",
    "Projections",
    "Random",
    "RandomConfig",
    "SViT",
    "SViTConfig",
    "TopNorm",
    "TopNormConfig",
    "build_policy",
    "chosen_policy",
    "policies",
    "policy_config",
    "register",
]
