"""Runs the server: opens the port, loads the model, serves until Ctrl+C or SIGTERM, and saves the sessions."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from streamchat.base.errors import ConfigError, reason_of
from streamchat.base.events import SavingChanged
from streamchat.base.host_names import AllowedHosts, bracketed, is_unspecified, new_socket, outer_address
from streamchat.base.progress import Progress, silent
from streamchat.base.signals import on_signals
from streamchat.config.loader import Configuration
from streamchat.conversation.assemble import Load, load_from_settings
from streamchat.server.access import Access, needs_token, read_token, token_path
from streamchat.server.limits import Admission
from streamchat.server.metrics import ServerMetrics
from streamchat.server.model_thread import ModelThread
from streamchat.server.options import Options, has_attach
from streamchat.server.requests import Served
from streamchat.sessions.archive import OpenStore
from streamchat.telemetry.log_file import log_path

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from streamchat.base.events import Event
    from streamchat.server.attached.sessions import SharedSessions
    from streamchat.server.known import KnownSession

GRACE_S = 5
"""How long open connections get to end after the replies were stopped."""
BACKLOG = 512
REFUSED = "ASGI callable returned without completing handshake."
"""What uvicorn logs as an error for each WebSocket that is refused with a status and a sentence, as ASGI allows."""


def _is_fault(record: logging.LogRecord) -> bool:
    """Keep refused WebSockets out of the log, which anyone who can reach the port could fill with them."""
    return record.msg != REFUSED


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket on this address; it does not listen yet.

    Raises:
        ConfigError: The address cannot be opened.
    """
    opened, address = new_socket(host, port)
    try:
        if sys.platform != "win32":  # there, it would share the port with another program
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise ConfigError(
            f"http://{bracketed(host)}:{port} cannot be opened ({reason_of(error)}); choose another --port"
        ) from error
    return opened


class ApiServer:
    """Serves the API. Opens its port when it is made, so that a port in use is reported before the model is loaded.

    Args:
        configuration: Settings and their origins, for messages.
        options: How to serve.
        open_store: Opens the store of saved sessions; None saves nothing.
        load: Loads the model; replaceable for tests.
        progress: Reports the progress of loading.
        tell: Called with a sentence for whoever runs the server, on the model's thread.

    Raises:
        ConfigError: The address cannot be opened, or the token file cannot be used.
    """

    def __init__(
        self,
        configuration: Configuration,
        options: Options,
        *,
        open_store: OpenStore | None,
        load: Load = load_from_settings,
        progress: Progress = silent,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._configuration, self._options, self._tell = configuration, options, tell
        self._is_saving = True
        self.token, self.new_token = "", False
        if options.token_file is not None or needs_token(options.host):
            self.token, self.new_token = read_token(options.token_file or token_path())
        self._socket = open_port(options.host, options.port)
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._is_stopping = False
        self._admission = Admission(options.limits.requests)
        self._metrics = ServerMetrics(self._admission)
        self._attached: SharedSessions | None = None
        self.model = ModelThread(
            configuration,
            options.live,
            load,
            open_store=open_store,
            observe=self._observe,
            observe_switch=self._metrics.switch.observe,
            progress=progress,
        )
        self.model.on_failure = self.stop

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = self._options.host
        if is_unspecified(host):
            host = outer_address()
        return f"http://{bracketed(host)}:{self.port}/v1"

    def load(self) -> None:
        """Load the model; from then on, clients can connect.

        Raises:
            StreamchatError: It cannot be loaded, or the store cannot be opened.
        """
        self.model.start()
        if has_attach():
            from streamchat.server.attached.sessions import SharedSessions

            self._attached = SharedSessions(self.model)
        self._socket.listen(BACKLOG)

    def run(self) -> bool:
        """Serve until SIGINT or SIGTERM, then stop the replies and save the sessions; return whether that succeeded.

        A second signal does not wait for open connections. Call in the main thread.
        """
        with on_signals((signal.SIGINT, signal.SIGTERM), lambda number: self.stop()):
            return self.serve()

    def serve(self) -> bool:
        """Serve until `stop`; as `run`, in any thread."""
        import uvicorn

        logging.getLogger("uvicorn.error").addFilter(_is_fault)

        class Server(uvicorn.Server):
            """Leaves the signals to us: uvicorn sends them to the process again when it has stopped."""

            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        self._server = Server(
            uvicorn.Config(
                self._app(),
                backlog=BACKLOG,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none" if self._attached is None else "websockets-sansio",
                ws_per_message_deflate=False,
                ws_max_size=self._options.limits.body_bytes,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._server.should_exit = self._is_stopping
        self._server.run(sockets=[self._socket])
        has_ended = self.model.close()
        if self.model.failure is not None:
            raise self.model.failure
        return has_ended

    def stop(self) -> None:
        """Stop all replies and let `serve` return; may be called from any thread."""
        if self._attached is not None:
            self._attached.stop()
        self.model.stop()
        if self._server is not None:
            self._server.force_exit = self._is_stopping
            self._server.should_exit = True
        self._is_stopping = True

    def _observe(self, session: KnownSession, event: Event) -> None:
        self._metrics.update(session, event)
        if isinstance(event, SavingChanged) and event.works != self._is_saving:
            self._is_saving = event.works
            if event.works:
                self._tell("sessions are saved again")
            else:
                self._tell(f"sessions are currently not saved; the reason is in {log_path()}")
        if self._attached is not None:
            self._attached.receive(session, event)

    def close(self) -> bool:
        """Free the port and end the model's thread, after a start that failed; return whether it ended in time."""
        self._socket.close()
        return self.model.close()

    def _app(self) -> ASGIApp:
        from streamchat.server.app import Parts, make_app

        attach = None
        access = Access(AllowedHosts(self._options.host, self._options.names), self.token)
        if self._attached is not None:
            from streamchat.server.attached.endpoint import AttachEndpoint

            attach = AttachEndpoint(self.model, self._attached, access, self._options.limits.body_bytes)
        info = self.model.info
        assert info is not None
        options, settings = self._options, self._configuration.settings
        names = tuple(dict.fromkeys((info.name, settings.model)))
        parts = Parts(
            self.model,
            Served(names, settings, options.limits.messages),
            options.limits,
            self._metrics.text,
            int(time.time()),
            attach,
        )
        return make_app(parts, self._admission, access)
