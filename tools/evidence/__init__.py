"""Makes docs/evidence.md: see `python -m tests.evidence --help`."""
