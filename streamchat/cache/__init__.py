"""The KV cache: layer buffers, ledger, eviction policy, rotation and the forward pre-hook.

Depends on torch and the cache API of transformers only, not on conversations or front ends.
"""
