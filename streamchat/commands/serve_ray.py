"""`streamchat serve --ray`: the server on a Ray cluster."""

from __future__ import annotations

import argparse
import signal
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from streamchat.base import paths
from streamchat.base.errors import ConfigError, ExitCode
from streamchat.base.formatting import plural
from streamchat.base.host_names import bracketed, is_unspecified, outer_address
from streamchat.base.ray_cluster import CHECK_S
from streamchat.base.signals import on_signals
from streamchat.cli.loading import loading_line
from streamchat.cli.notices import say
from streamchat.config.loader import Configuration
from streamchat.replay.workers.conversation import with_absolute_paths
from streamchat.server.access import needs_token, read_token, token_path
from streamchat.server.cluster.deploy import connected, deployed, require_ray
from streamchat.server.cluster.plan import ClusterPlan, Replicas, parse_replicas
from streamchat.server.options import Options
from streamchat.server.run import open_port
from streamchat.store.shared.folder import SharedFolder


def serve_on_ray(args: argparse.Namespace, configuration: Configuration, options: Options) -> int:
    """Serve on a Ray cluster until SIGINT or SIGTERM; return the exit code.

    Raises:
        ClusterLostError: The cluster no longer answers.
        ConfigError: An argument is wrong, Ray is missing, or the cluster cannot be reached.
        StoreError: The shared folder cannot be used.
        StreamchatError: The replicas cannot start.
    """
    replicas = parse_replicas(
        "1" if args.replicas is None else args.replicas,
        1.0 if args.replica_cpus is None else args.replica_cpus,
        0.0 if args.replica_gpus is None else args.replica_gpus,
    )
    if configuration.settings.save == "never":
        raise ConfigError("save = never cannot be used with --ray: replicas continue a session from its saved state")
    if options.port == 0:
        raise ConfigError("--port 0 cannot be used with --ray; choose a port")
    shared = _shared_folder(args.shared)
    require_ray()
    open_port(options.host, options.port).close()  # Ray would report it after half a minute
    token, is_new = "", False
    if options.token_file is not None or needs_token(options.host):
        token, is_new = read_token(options.token_file or token_path())
    identity = SharedFolder(shared).identity()
    if not configuration.is_explicit("auto_recall"):  # the archive stays with the replica that evicted the turns
        configuration = replace(configuration, settings=replace(configuration.settings, auto_recall="off"))
    plan = ClusterPlan(with_absolute_paths(configuration), options, token, shared, identity, replicas)
    stopped = threading.Event()
    with connected(args.ray) as cluster, ExitStack() as stack:
        with loading_line() as progress:
            progress(f"Starting {_described(replicas)}")
            stack.enter_context(deployed(cluster, plan))
        with on_signals((signal.SIGINT, signal.SIGTERM), lambda number: stopped.set()):
            _announce(plan, is_new)
            while not stopped.wait(CHECK_S):
                cluster.check()
            say("stopping the replies and saving the sessions")
    return ExitCode.OK


def _shared_folder(given: str | None) -> Path:
    if given is None:
        return paths.data_dir() / "shared"
    if not given.strip():  # as of a variable that is not set; it would be the current folder
        raise ConfigError("--shared is empty; give a folder")
    return paths.user_path(Path(given)).absolute()


def _described(replicas: Replicas) -> str:
    if replicas.most > replicas.least:
        return f"{replicas.least} to {plural(replicas.most, 'replica')}"
    return plural(replicas.least, "replica")


def _announce(plan: ClusterPlan, is_new_token: bool) -> None:
    options = plan.options
    if is_new_token:
        say(f"the token, which clients give as their API key, shown only once: {plan.token}")
    if plan.token:
        say(f"every request needs the token in {options.token_file or token_path()}")
    host = outer_address() if is_unspecified(options.host) else options.host
    model = plan.configuration.settings.model
    say(
        f"serving {model} on {_described(plan.replicas)} at http://{bracketed(host)}:{options.port}/v1, with the "
        f"sessions in {plan.shared}; press Ctrl+C to stop"
    )
