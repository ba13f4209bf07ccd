"""`streamchat acp`: an agent for editors that speak the Agent Client Protocol, over stdin and stdout."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from streamchat.base.errors import ConfigError, ExitCode
from streamchat.cli import flags
from streamchat.config.settings import setting_fields, spec_of

HELP = "serve an editor over stdin and stdout (Agent Client Protocol)"
DESCRIPTION = (
    "Speaks the Agent Client Protocol over stdin and stdout, so that an editor can hold a chat that never ends. "
    "Sessions are saved, and evictions are reported. Started by the editor; needs the extra streamchat[acp]."
)

SECTIONS = ("model", "cache", "generation", "chat")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    names = [name for name in setting_fields() if spec_of(name).section in SECTIONS]
    flags.add_setting_flags(parser, names)


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: The SDK is not installed, or stdin is a terminal.
    """
    if find_spec("acp") is None:
        raise ConfigError("`streamchat acp` needs agent-client-protocol; run: pip install 'streamchat[acp]'")
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("`streamchat acp` speaks a protocol on stdin; let an editor start it")
    configuration = flags.configuration_of(args)
    from streamchat.telemetry.log_file import start_logging

    start_logging()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from streamchat.acp.server import serve  # deferred: imports the SDK

    serve(configuration)
    return ExitCode.OK
