"""Makes docs/evidence.md: see `python -m tools.evidence --help`."""
