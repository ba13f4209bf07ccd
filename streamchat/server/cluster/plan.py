"""What all parts of a server on a Ray cluster share. Needs none of the optional libraries."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from streamchat.base.errors import ConfigError
from streamchat.config.loader import Configuration
from streamchat.server.options import Options

APPLICATION = "streamchat"
"""Name of the application in Ray Serve."""
MAX_REPLICAS = 10_000


@dataclass(frozen=True)
class Replicas:
    """The number of replicas, and the resources of each."""

    least: int = 1
    most: int = 1
    """If larger than `least`, Ray Serve scales the replicas with the number of requests."""
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True)
class ClusterPlan:
    """What the gateway and the replicas share."""

    configuration: Configuration
    options: Options
    token: str
    """The token that every request needs; '' for none."""
    shared: Path
    """Folder of the sessions, the same one on all machines."""
    shared_id: str
    """Its identity, by which a replica checks that it uses the same folder."""
    replicas: Replicas


def parse_replicas(text: str, cpus: float, gpus: float) -> Replicas:
    """Return the replicas that flags ask for; `text` is a number or two with a hyphen, as in '1-4'.

    Raises:
        ConfigError: A value is wrong.
    """
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"--replicas {text!r} is neither a number nor a range such as 1-4")
    least, most = int(found[1]), int(found[2] or found[1])
    if least > most:
        raise ConfigError(f"--replicas {text} has the larger number first; write {most}-{least}")
    if not 1 <= least <= most <= MAX_REPLICAS:
        raise ConfigError(f"--replicas {text} must be from 1 to {MAX_REPLICAS}")
    for name, value in (("cpus", cpus), ("gpus", gpus)):
        if not 0 <= value <= 1024:
            raise ConfigError(f"--replica-{name} {value:g} must be from 0 to 1024")
    return Replicas(least, most, cpus, gpus)
