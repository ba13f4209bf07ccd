"""Small tools with no knowledge of models or screens: errors, events, text, paths, child processes. Needs no torch."""
