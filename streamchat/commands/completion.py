"""`streamchat completion`: print the script that lets a shell complete commands, flags, sessions and models."""

from __future__ import annotations

import argparse

HELP = "print the completion script of a shell"
DESCRIPTION = (
    "Print the script that lets bash, zsh or fish complete commands, flags, choices, files, saved sessions and models. "
    'In ~/.bashrc or ~/.zshrc: eval "$(streamchat completion bash)" (or zsh); in ~/.config/fish/config.fish: '
    "streamchat completion fish | source."
)
SHELLS = ("bash", "zsh", "fish")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code."""
    from streamchat.cli.completion import script

    print(script(args.shell), end="")
    return 0
