"""Helpers that know neither models nor screens: errors, events, text, paths, child processes. Needs no torch."""
