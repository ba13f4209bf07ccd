"""Records, rebuilds, and fails what a process writes. Shared by `tools.power_loss` and `tools.failing_calls`."""
