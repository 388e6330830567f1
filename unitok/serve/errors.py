"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, whatever went wrong and wherever."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_LOGGER = logging.getLogger(__name__)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# The roles of messages and types of their parts, by which their forms are told apart.
FORMS = ("system", "developer", "user", "assistant", "text", "image_url")
_LONGEST = 300  # characters of a value or key of the client in a message


class ApiError(Exception):
    """A request that gets no answer: the HTTP status and what the client is told."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, " ".join(message.split()), param
        self.headers = dict(headers or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.status, self.code, self.message, self.param, self.headers)

    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad(code: str, message: str, param: str | None = None) -> ApiError:
    """A 400: understood, but cannot be asked."""
    return ApiError(400, code, message, param)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of `app` leaves in OpenAI's form."""

    async def own(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _validation_error(error.errors()).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI's, of a body in which json finds another mistake than one of form
            return bad("invalid_json", "the body is not JSON (UTF-8), is too deep or has too long a number").response()
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:_LONGEST]}: {error.detail}"
        return ApiError(error.status_code, code, message, headers=error.headers).response()

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        _LOGGER.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return internal_error().response()

    app.add_exception_handler(ApiError, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def internal_error() -> ApiError:
    """What a client hears of our own mistakes; the log has the rest."""
    return ApiError(500, "internal_error", "the server failed at this request; its log says why")


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """The complaint of pydantic's that got furthest: where a value may have several forms, that of the form it most
    likely meant; of equally far ones not that of another type. 400 for what is no JSON, else 422."""
    first = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    place = [
        str(part)[:_LONGEST]
        for before, part in zip((None, *first["loc"]), first["loc"], strict=False)
        if part != "body" and not _is_form(part, before)
    ]
    param = ".".join(place).encode("ascii", "backslashreplace").decode() or None
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "json_invalid":
        return bad("invalid_json", f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    code = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}.get(first["type"], "invalid_value")
    message = str(first["msg"]).encode("ascii", "backslashreplace").decode()[:_LONGEST]
    return ApiError(422, code, f"{param or 'body'}: {message}{more}", param)


def _is_form(part: str | int, before: str | int | None) -> bool:
    """Whether a part of a place is pydantic's name of one of several forms: of a value, or of an entry of a list."""
    if not isinstance(part, str):
        return False
    return part in ("str", "constrained-str") or part.startswith("list[") or (isinstance(before, int) and part in FORMS)
