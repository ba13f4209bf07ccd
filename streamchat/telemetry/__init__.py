"""Logs, metrics, memory figures and trace events of a run."""
