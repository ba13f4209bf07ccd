"""`streamchat serve`: serve the model and its sessions through OpenAI's API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from streamchat.attach.address import DEFAULT_URL
from streamchat.base import paths
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.host_names import host_name
from streamchat.cli import flags
from streamchat.cli.loading import loading_line
from streamchat.cli.notices import say
from streamchat.cli.output import exit_now
from streamchat.config.settings import setting_fields, spec_of
from streamchat.server.access import token_path
from streamchat.server.limits import Limits
from streamchat.server.options import Options, has_attach, require_libraries

if TYPE_CHECKING:  # needs the optional libraries
    from streamchat.server.run import ApiServer

HELP = "serve endless chats through OpenAI's API"
DESCRIPTION = (
    "Serve one model through OpenAI's API at http://HOST:PORT/v1 (POST chat/completions and responses, GET models), "
    "with figures at /metrics. Every conversation is a saved session, whose cache never exceeds its budget and is not "
    "prefilled again. `streamchat attach` opens a session in a terminal. Needs the extra streamchat[server]. Ctrl+C or "
    "SIGTERM stops the replies, saves the sessions, and ends with exit code 0."
)
_DEFAULTS = Options()
MAX_SECONDS = 86_400
CLUSTER_FLAGS = ("--replicas", "--replica-cpus", "--replica-gpus", "--shared")
SECTIONS = ("model", "cache", "generation", "chat", "sessions")
"""Sections of the settings that have a flag: all but the interface."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    own = parser.add_argument_group("serve")
    limits = _DEFAULTS.limits
    own.add_argument(
        "--host",
        default=_DEFAULTS.host,
        metavar="HOST",
        help=f"address to listen on (default: {_DEFAULTS.host}, this machine only); with others, requests need a token",
    )
    own.add_argument(
        "--port", type=int, default=_DEFAULTS.port, metavar="PORT", help=f"port; 0 = any (default: {_DEFAULTS.port})"
    )
    own.add_argument(
        "--live",
        type=int,
        default=_DEFAULTS.live,
        metavar="N",
        help=f"maximum number of sessions with a cache in memory; others are on the disk (default: {_DEFAULTS.live})",
    )
    own.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that clients may use for this server; can be repeated",
    )
    own.add_argument(
        "--token-file",
        metavar="FILE",
        help="require the token in this file, also on this machine; a missing file is created with a new token",
    )
    own.add_argument(
        "--max-requests",
        type=int,
        default=limits.requests,
        metavar="N",
        help=f"maximum number of requests that run or wait; more get status 429 (default: {limits.requests})",
    )
    own.add_argument(
        "--max-seconds",
        type=float,
        default=limits.seconds,
        metavar="SECONDS",
        help=f"seconds after which the reply to a request is stopped (default: {limits.seconds:g})",
    )
    own.add_argument(
        "--max-body",
        type=int,
        default=limits.body_bytes,
        metavar="BYTES",
        help=f"maximum length of the body of a request, in bytes (default: {limits.body_bytes})",
    )
    own.add_argument(
        "--max-messages",
        type=int,
        default=limits.messages,
        metavar="N",
        help=f"maximum number of messages per request (default: {limits.messages})",
    )
    _add_cluster_flags(parser)
    flags.add_setting_flags(parser, [name for name in setting_fields() if spec_of(name).section in SECTIONS])


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    cluster = parser.add_argument_group("on a Ray cluster")
    cluster.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="serve on a Ray cluster, with one model per replica: 'auto' (the default) finds a running cluster, "
        "'local' starts one on this machine",
    )
    cluster.add_argument(
        "--replicas",
        metavar="N",
        help="number of replicas with --ray; 1-4 = scaled with the number of requests (default: 1)",
    )
    cluster.add_argument("--replica-cpus", type=float, metavar="N", help="CPUs per replica with --ray (default: 1)")
    cluster.add_argument("--replica-gpus", type=float, metavar="N", help="GPUs per replica with --ray (default: 0)")
    cluster.add_argument(
        "--shared",
        metavar="FOLDER",
        help="folder of the sessions with --ray, shared by all machines (default: a folder on this machine)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return the exit code.

    Raises:
        ConfigError: An argument is wrong, an optional package is missing, or the port cannot be opened.
        ModelError: The model cannot be loaded, or cannot stream.
        StoreError: The store cannot be opened.
    """
    options = _options(args)
    configuration = flags.configuration_of(args)
    if args.ray is None and (given := [flag for flag in CLUSTER_FLAGS if _value(args, flag) is not None]):
        raise ConfigError(f"{given[0]} applies to a Ray cluster; give --ray, too")
    require_libraries()
    if args.ray is not None:
        from streamchat.commands.serve_ray import serve_on_ray

        return serve_on_ray(args, configuration, options)
    from streamchat.server.run import ApiServer
    from streamchat.store.store import Store
    from streamchat.telemetry.log_file import start_logging

    start_logging()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with loading_line() as progress:
        server = ApiServer(
            configuration,
            options,
            open_store=None if configuration.settings.save == "never" else Store,
            progress=progress,
            tell=say,
        )
        try:
            server.load()
        except KeyboardInterrupt:
            if not server.close():
                exit_now(ExitCode.INTERRUPTED)
            raise
        except BaseException:
            server.close()
            raise
    _announce(server, options)
    return ExitCode.OK if server.run() else ExitCode.FAILURE


def _announce(server: ApiServer, options: Options) -> None:
    assert server.model.info is not None
    for note in server.model.notes:
        say(note)
    if server.new_token:
        say(f"the token, which clients give as their API key, shown only once: {server.token}")
    if server.token:
        say(f"every request needs the token in {options.token_file or token_path()}")
    say(f"serving {server.model.info.name} at {server.url}; press Ctrl+C to stop")
    if has_attach():
        say(f"chat with it in a terminal: {_attach_command(server, options)}")


def _attach_command(server: ApiServer, options: Options) -> str:
    url = server.url.removesuffix("/v1")
    parts = ["streamchat attach", *([] if url == DEFAULT_URL else [url])]
    if server.token:
        parts.append(f"--token-file {options.token_file or token_path()}")
    return " ".join(parts)


def _value(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def _options(args: argparse.Namespace) -> Options:
    """Return the checked options; raises ConfigError."""
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port} must be from 0 to 65535")
    for name in ("live", "max_requests", "max_body", "max_messages"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not 0 < args.max_seconds <= MAX_SECONDS:
        raise ConfigError(f"--max-seconds {args.max_seconds} must be above 0 and at most {MAX_SECONDS}")
    for name in args.allow_host:
        if host_name(name) is None or ":" in name:
            raise ConfigError(f"--allow-host {name!r} is not a host name; give it without http:// and port")
    return Options(
        args.host,
        args.port,
        args.live,
        tuple(name.lower().rstrip(".") for name in args.allow_host),
        None if args.token_file is None else paths.user_path(Path(args.token_file)),
        Limits(args.max_requests, args.max_seconds, args.max_body, args.max_messages),
    )
