"""Policies: which tokens take part in which block. One file per method; importing this package registers them all."""

from sievit.policies.algm import ALGMConfig
from sievit.policies.ats import ATSConfig
from sievit.policies.attention import AttentionConfig
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
from sievit.policies.cropr import CroprConfig
from sievit.policies.dtop import DToPConfig
from sievit.policies.dynamicvit import DynamicViTConfig
from sievit.policies.evit import EViTConfig
from sievit.policies.evo_vit import EvoViTConfig
from sievit.policies.expedit import ExpeditConfig
from sievit.policies.keep_all import KeepAllConfig
from sievit.policies.options import PolicyOptions, chosen_policy
from sievit.policies.random import RandomConfig
from sievit.policies.selection import SharesConfig, SharesPolicy
from sievit.policies.spread import SpreadConfig
from sievit.policies.svit import SViT, SViTConfig
from sievit.policies.tome import ToMeConfig
from sievit.policies.top_norm import TopNormConfig
