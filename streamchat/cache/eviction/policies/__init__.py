"""The eviction policies, one per module; each has a `POLICY`. `streamchat.base.eviction_policies` names them."""

from __future__ import annotations

from importlib import import_module

from streamchat.base.errors import ConfigError
from streamchat.base.eviction_policies import POLICIES
from streamchat.cache.eviction.policy import EvictionPolicy


def load_policy(name: str) -> EvictionPolicy:
    """Return the policy of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in POLICIES:
        raise ConfigError(f"{name} is not an eviction policy; choose from {', '.join(POLICIES)}")
    policy: EvictionPolicy = import_module(f"{__name__}.{name.replace('-', '_')}").POLICY
    return policy
