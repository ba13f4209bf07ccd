"""Line-based front ends: the prompt on a terminal, and the pipe."""
