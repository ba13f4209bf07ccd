"""The checks of `streamchat verify`: does the cache really shrink, and are the logits still correct?"""
