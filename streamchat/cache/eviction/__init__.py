"""Eviction: the ledger of cached tokens, the policy that chooses the cuts, and a check at load."""
