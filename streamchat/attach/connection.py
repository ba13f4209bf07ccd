"""One connection to a server, with the library `websockets`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from streamchat.attach.address import Address
from streamchat.attach.frames import VERSION, FromServer, Hello, Refusal, read_from_server
from streamchat.base.errors import ConfigError, ExitCode, StreamchatError, WireError, first_line, reason_of, short

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

CONNECT_S = 10.0
"""How long a server may take to accept a connection."""
ALIVE_S = 20.0
"""Interval of the checks that the other side is still connected."""
MAX_MESSAGE = 2**28
"""Maximum length of a server's message, in bytes; the state of a very long session is the longest one."""


class AttachError(StreamchatError):
    """A server cannot be reached, or does not accept the front end."""

    title = "Not attached"

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILURE, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.is_final = is_final
        """Whether trying again cannot help."""


def require_library() -> None:
    """Check that the optional library is installed.

    Raises:
        ConfigError: It is missing.
    """
    try:
        import websockets.sync.client  # noqa: F401
    except ImportError:
        raise ConfigError("`streamchat attach` needs websockets; run: pip install 'streamchat[attach]'") from None


class Connection:
    """An open connection. `send` and `close` may be called from any thread, `read` from one.

    Args:
        address: The server.
        query: The front end's id, the session that it wants, and the last event that it has.

    Raises:
        AttachError: The server cannot be reached, or refuses the connection.
    """

    def __init__(self, address: Address, query: dict[str, str]) -> None:
        self._socket = _open(address, query)
        self._out: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._send_all, name="streamchat-attach-send", daemon=True).start()

    def send(self, text: str) -> None:
        """Queue a message; it is lost if the connection is lost first."""
        self._out.put(text)

    def read(self) -> Iterator[FromServer]:
        """Yield the server's messages, until the connection ends.

        Raises:
            AttachError: The server refuses the front end, or is of another version.
        """
        for text in self._messages():
            try:
                message = read_from_server(text)
            except WireError as error:
                raise AttachError(
                    f"the server sent what this version of streamchat cannot read ({short(error)}); use the same "
                    "version on both sides",
                    is_final=True,
                ) from None
            if isinstance(message, Refusal):
                raise AttachError(message.message, _exit_code(message.exit_code), is_final=message.is_final)
            if isinstance(message, Hello) and message.version != VERSION:
                raise AttachError(
                    f"the server ({short(message.server)}) speaks version {message.version} of the protocol, and this "
                    f"program version {VERSION}; use the same version of streamchat on both sides",
                    is_final=True,
                )
            yield message

    def close(self) -> None:
        """End the connection."""
        self._out.put(None)

    def _messages(self) -> Iterator[str | bytes]:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            while True:
                yield self._socket.recv()

    def _send_all(self) -> None:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            while (text := self._out.get()) is not None:
                self._socket.send(text)
        self._socket.close()


def _open(address: Address, query: dict[str, str]) -> ClientConnection:
    import ssl

    from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
    from websockets.sync.client import connect

    headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
    try:
        opened = connect(
            address.socket_url(**query),
            additional_headers=headers,
            open_timeout=CONNECT_S,
            ping_interval=ALIVE_S,
            ping_timeout=ALIVE_S,
            close_timeout=1,
            max_size=MAX_MESSAGE,
            compression=None,  # it would cost the thread of the model processor time
            proxy=None,
        )
        return opened.__enter__()  # `_send_all` closes it
    except InvalidStatus as error:
        raise _refused(address, error.response) from None
    except (InvalidHandshake, InvalidURI, EOFError) as error:
        what = "is not a server that a front end can attach to"
        raise AttachError(
            f"{address.url} {what} ({short(first_line(error))}); give the address that it printed"
        ) from None
    except ssl.SSLError as error:
        raise AttachError(
            f"no secure connection to {address.url} ({short(reason_of(error))}); use http:// if the server is not "
            "behind a proxy with TLS, else check the certificate of the proxy"
        ) from None
    except TimeoutError:
        raise AttachError(f"{address.url} does not answer; check the address, or start `streamchat serve`") from None
    except OSError as error:
        raise AttachError(
            f"no server at {address.url} ({short(reason_of(error))}); start `streamchat serve`, or give its address"
        ) from None


def _refused(address: Address, response: Any) -> AttachError:
    status, body = int(response.status_code), bytes(response.body or b"").decode("utf-8", "replace")
    if status == 404:
        text = f"{address.url} serves no front ends; it may be an older version, or another program"
    elif status == 401:
        text = f"{address.url} needs its token; give --token-file FILE with the file that the server named at its start"
    else:
        text = f"{address.url} refuses the connection: {short(body.strip() or f'status {status}')}"
    return AttachError(text, is_final=status in (401, 403, 404))


def _exit_code(number: int) -> ExitCode:
    try:
        return ExitCode(number)
    except ValueError:
        return ExitCode.FAILURE
