"""Records, rebuilds and fails what a process writes: parts that `tools.power_loss` and `tools.failing_calls` share."""
