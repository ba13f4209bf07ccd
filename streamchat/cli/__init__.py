"""The command line: parser, flags, front ends, output. `--help` loads no torch."""
