"""Records, rebuilds and fails what a process writes: the parts that `tools.power_loss` and `tools.failing_calls` share."""
