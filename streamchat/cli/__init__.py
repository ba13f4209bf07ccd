"""The command line: parser, flags, front ends and output. `--help` does not load torch."""
