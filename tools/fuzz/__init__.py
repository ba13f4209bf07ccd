"""Fuzzing of everything that parses; `python -m tools.fuzz --help` lists the targets."""
