"""A private log file for tracebacks and warnings of libraries, so that they never appear over the chat."""

from __future__ import annotations

import logging
import logging.handlers
import os
from io import TextIOWrapper
from pathlib import Path

from streamchat.base import paths

MAX_BYTES = 1_000_000


def is_debug() -> bool:
    """Whether to show tracebacks: `--debug`, or STREAMCHAT_DEBUG in the environment."""
    return os.environ.get("STREAMCHAT_DEBUG", "0") not in ("", "0")


def log_path() -> Path:
    """Return the log file. It may not exist."""
    return paths.state_dir() / "streamchat.log"


class PrivateLogHandler(logging.handlers.RotatingFileHandler):
    """Writes the log, readable only by the user. The file is created with the first record; write errors are silent."""

    def __init__(self) -> None:
        super().__init__(
            log_path(), maxBytes=MAX_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace", delay=True
        )
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
        self.failed = False

    def _open(self) -> TextIOWrapper:
        paths.private_dir(Path(self.baseFilename).parent)
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=paths.private_opener)

    def handleError(self, record: logging.LogRecord) -> None:
        """Only note the error: a full disk or a read-only home must not print over the chat."""
        self.failed = True


_handler: PrivateLogHandler | None = None


def start_logging() -> PrivateLogHandler:
    """Send all log records and Python warnings of this process to the log file. May be called again."""
    global _handler
    root = logging.getLogger()
    if _handler is None or Path(_handler.baseFilename) != log_path().absolute():
        if _handler is not None:
            root.removeHandler(_handler)
            _handler.close()
        _handler = PrivateLogHandler()
        root.addHandler(_handler)
        logging.captureWarnings(True)
    return _handler


def log_crash(details: str) -> Path | None:
    """Log a traceback and return the file, or None if it could not be written."""
    handler = start_logging()
    logging.getLogger("streamchat").error("%s", details.rstrip())
    return None if handler.failed else log_path()
