"""Errors in OpenAI's shape: which status an error is, and what is said of it."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from onebase.errors import OnebaseError, StoreError, UnknownNameError
from onebase.serve.asked import Late
from onebase.serve.scheduler import Overloaded

log = logging.getLogger("onebase.serve")
CLOSE = re.compile(r".*Did you mean ('.*?')\? Known: ", re.DOTALL)  # as errors.nearest says it, the last time
JSON = re.compile(r"application/([\w.-]+\+)?json")
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 422: "unusable_adapter_error",
    429: "rate_limit_error", 500: "internal_error", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip


def refusal(status: int, message: str, param: str | None = None, code: str | None = None, **more: Any) -> JSONResponse:
    """Return an error.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        param: the field.
        code: for programs.
        more: further fields; `after` becomes the header Retry-After, in seconds.
    """
    after = more.pop("after", None)
    message = message.encode(errors="replace").decode()  # it may repeat what a request had, halves of characters too
    headers = {"Retry-After": str(max(1, round(after)))} if after is not None else None
    body = {
        "message": message,
        "type": TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code,
        **more,
    }
    return JSONResponse({"error": body}, status, headers)


def told_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return status and fields of an error."""
    message = str(error)
    if isinstance(error, HTTPException):
        return error.status_code, {"message": str(error.detail)}
    if isinstance(error, Overloaded):
        closing = "shutting down" in message
        return (503 if closing else 429), {"message": message, "after": error.after}
    if isinstance(error, Late):
        return 504, {"message": message}
    if isinstance(error, UnknownNameError):
        return 404, {"message": message, "param": "model", "code": "model_not_found"}
    if isinstance(error, StoreError):
        return 422, {"message": message}
    if isinstance(error, OnebaseError):
        return 400, {"message": message}
    log.error("a request failed", exc_info=error)
    return 500, {"message": "the server failed to answer; its log says why"}


def add_handlers(app: FastAPI) -> None:
    """Answer every error of a route in this shape."""

    async def ours(request: Request, error: Exception) -> JSONResponse:
        status, fields = told_of(error)
        if status == 404:
            said = CLOSE.search(fields["message"])
            fields["nearest"] = re.findall(r"'([^']*)'", said.group(1)) if said else []
        return refusal(status, **fields)

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return refusal(error.status_code, str(error.detail))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"][1:])
        if first["type"] == "json_invalid":  # its place is a character
            why = (first.get("ctx") or {}).get("error", first["msg"])
            return refusal(400, f"body: not JSON: {why}, at character {place}")
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not place and isinstance(error.body, bytes) and not JSON.fullmatch(sent):
            had = f"the header Content-Type is {sent!r}" if sent else "there is no header Content-Type"
            return refusal(400, f"body: {had}: send Content-Type: application/json")
        return refusal(400, f"{place or 'body'}: {first['msg']}", param=place or None)

    app.add_exception_handler(OnebaseError, ours)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, ours)
