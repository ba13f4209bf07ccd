"""Random keys, pastes and resizes through a pseudo-terminal; `python -m tools.terminal_walk --help` describes it."""
