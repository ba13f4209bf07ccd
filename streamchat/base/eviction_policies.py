"""The eviction policies by name. Needs no torch, so that settings, flags and help can list them.

Each is the module of the same name in `streamchat.cache.eviction.policies`, with underscores for hyphens.
"""

from __future__ import annotations

POLICIES: dict[str, str] = {
    "oldest-turns": "the oldest whole turns",
    "oldest-tokens": "the oldest tokens: the paper's rolling window",
    "keep-first-turn": "the oldest whole turns but the first",
    "key-diversity": "the turns whose keys are most like the others'",
}
"""Policy name -> what it evicts, in a few words."""
DEFAULT_POLICY = "oldest-turns"
RENAMED_POLICIES = {"turns": "oldest-turns", "tokens": "oldest-tokens"}
"""Names that earlier versions wrote into configuration files and sessions -> today's names."""


def describe_policies() -> str:
    """Return one line with all names and what they evict, for help texts."""
    return ", ".join(f"{name} ({evicts})" for name, evicts in POLICIES.items())
