"""Eviction: the ledger of cached tokens, the policy that plans cuts, and a check when a model loads."""
