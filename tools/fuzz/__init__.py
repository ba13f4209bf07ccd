"""Fuzzes everything that parses input; `python -m tools.fuzz --help` lists the targets."""
