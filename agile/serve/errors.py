"""Errors of the API, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """What a client of the API is told.

    Args:
        param: Which part of the request is meant.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}
