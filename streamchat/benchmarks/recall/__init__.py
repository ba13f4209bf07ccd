"""The benefit and the cost of recalling evicted turns."""
