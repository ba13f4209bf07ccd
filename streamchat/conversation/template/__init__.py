"""Chat templates: rendered with limits, split into a format, and compared with the ids that are fed."""
