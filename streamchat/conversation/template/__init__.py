"""Chat templates: rendered with limits, taken apart into a format, and compared with what is fed."""
