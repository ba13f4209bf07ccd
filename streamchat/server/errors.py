"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamchat.base.sanitize import sentence


@dataclass(eq=False)
class ApiError(Exception):
    """A request that is refused, or that failed."""

    status: int
    """The HTTP status."""
    message: str
    """One sentence with the values and the next step."""
    param: str | None = None
    """The field that is wrong."""
    code: str | None = None
    """A word for programs."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # what a client sent and the sentence repeats may have control characters, or be no valid Unicode
        self.message = sentence(self.message)
        self.param = None if self.param is None else sentence(self.param)

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        """The type of error, in OpenAI's words."""
        known = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return known.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def wrong_value(param: str, message: str) -> ApiError:
    """Return the error for a field with a value that is not valid."""
    return ApiError(400, message, param, "invalid_value")
