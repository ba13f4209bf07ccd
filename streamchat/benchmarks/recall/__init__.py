"""What recalling evicted turns is worth, and what it costs."""
