"""Who may send requests: those that name this server, that no other page sent, and, if needed, that have the token."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamchat.base import paths
from streamchat.base.atomic_files import advice_or, write_new
from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.host_names import AllowedHosts, is_loopback
from streamchat.server.errors import ApiError

TOKEN_FILE = "server-token"
MIN_TOKEN = 16
"""Minimum length of a token."""


@dataclass(frozen=True)
class Access:
    """Decides which requests are allowed."""

    hosts: AllowedHosts
    token: str = ""
    """The token that every request needs; '' for none."""

    def check(self, hosts: Sequence[str], origin: str | None, authorization: str) -> None:
        """Check the headers of a request.

        Raises:
            ApiError: The request is not allowed.
        """
        advice = "use the address that the server printed, or start it with --allow-host and the name that you use"
        if refusal := self.hosts.refusal(hosts, origin, advice):
            raise ApiError(403, refusal, code="forbidden")
        kind, _, given = authorization.partition(" ")
        is_token = hmac.compare_digest(given.strip().encode("utf-8", "surrogatepass"), self.token.encode())
        if self.token and not (kind.lower() == "bearer" and is_token):
            raise ApiError(
                401,
                "this server needs its token as the API key; it is in the file that the server named at its start",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def token_path() -> Path:
    """Return the default file of the token."""
    return paths.data_dir() / TOKEN_FILE


def needs_token(host: str) -> bool:
    """Return whether a server on this address needs a token: other machines can reach it."""
    return not is_loopback(host)


def read_token(path: Path) -> tuple[str, bool]:
    """Return the token in a file, and whether it is new: a missing file is created, readable only by its owner.

    Raises:
        ConfigError: The file cannot be read or written, others may read it, or the token is too short.
    """
    try:
        try:
            with open(path, encoding="ascii") as file:
                _require_private(path, file.fileno())
                token = file.read(4096).strip()
        except FileNotFoundError:
            try:
                return _new_token(path), True
            except FileExistsError:  # another server has just made it
                return read_token(path)
    except (OSError, UnicodeDecodeError) as error:
        advice = advice_or(getattr(error, "errno", None), "give another --token-file")
        raise ConfigError(f"the token file {path} cannot be used ({reason_of(error)}); {advice}") from error
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise ConfigError(
            f"the token file {path} has no valid token: it needs one line of at least {MIN_TOKEN} characters without "
            "spaces; delete the file to get a new token"
        )
    return token, False


def _new_token(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    paths.private_dir(path.parent)
    write_new(path, token + "\n", durable=True)
    return token


def _require_private(path: Path, descriptor: int) -> None:
    if os.name == "nt":
        return
    found = os.fstat(descriptor)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"the token file {path} can be read by others; run: chmod 600 {path}")
