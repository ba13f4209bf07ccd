"""Does the cache really shrink, and is the text still right: the checks behind `streamchat verify`."""
