"""The KV cache: layer buffer, ledger, eviction policy, rotation and the forward pre-hook.

Needs torch and the cache API of transformers, and knows nothing of chats or screens.
"""
