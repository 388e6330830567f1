"""What every request passes first: host, key, load, body. Plain ASGI, so that a client's going away is still seen."""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unitok.serve.errors import ApiError, bad
from unitok.serve.metrics import Metrics
from unitok.serve.scheduler import Scheduler
from unitok.serve.settings import ServeSettings

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _PAGE_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
}


class _NotReadError(Exception):
    """A client does not read what it is sent."""


def path_of(route: Any) -> str | None:
    """As /v1/models/{model}."""
    return getattr(route, "path_format", getattr(route, "path", None))


class Guard:
    """Middleware. Refusals are answers in OpenAI's form; `paths` are those that get figures of their own."""

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, scheduler: Scheduler, metrics: Metrics, paths: frozenset[str]
    ) -> None:
        self.app, self.settings, self.scheduler, self.metrics, self.paths = app, settings, scheduler, metrics, paths
        self.active = 0  # POSTs under /v1 that have passed the key, up to the end of their answer
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # as GET; the server, which has its own scope, leaves the body out
            scope = {**scope, "method": "GET"}
        start, status = time.monotonic(), 500

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS.items()]
            try:
                async with asyncio.timeout(self.settings.request_seconds):
                    await send(message)  # waits for clients that read slowly
            except TimeoutError:
                if not _hang_up(receive):  # else the application hears that the client has gone
                    raise _NotReadError from None

        try:
            await self._pass(scope, receive, send_with_headers)
        except _NotReadError:
            pass  # the server closes the connection, because the answer has no end
        finally:
            path = self._counted_as(scope)
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - start)

    def _counted_as(self, scope: Scope) -> str:
        """The path as the figures have it: never a text of the client's."""
        if scope["path"] in self.paths:
            return scope["path"]
        route = path_of(scope.get("route"))  # none where it was refused before
        return route if route in self.paths else "other"

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, of_api = Headers(scope=scope), scope["path"].startswith("/v1")
        try:
            self._check_host(headers)
            if of_api or scope["path"] == "/metrics":
                self._check_key(headers)
            if of_api and scope["method"] == "POST":
                self._check_load()
                self.active += 1
                try:
                    body = await self._json(headers, receive)
                    await self.app(scope, _replay(body, receive), send)
                finally:
                    self.active -= 1
            else:  # nothing else has a body that is read
                await self.app(scope, receive, send)
        except ApiError as error:  # ours: the application answers its own
            error.headers.setdefault("Connection", "close")
            await error.response()(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if self.settings.allowed_hosts is None:
            return
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self.settings.allowed_hosts:
            shown = host[:80].encode("ascii", "backslashreplace").decode()
            raise bad("unknown_host", f"Host {shown!r}: expected one of {', '.join(self.settings.allowed_hosts)}")

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # In constant time, so that nobody learns the key from how long a refusal takes.
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            raise ApiError(
                401,
                "invalid_api_key",
                "missing or wrong API key; send it as Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_load(self) -> None:
        """Before the body is read: many large bodies would fill the memory while the queue is still short."""
        if self.scheduler.draining:
            raise ApiError(503, "stopping", "the server is stopping; ask again later", headers={"Retry-After": "10"})
        if self.active >= self.settings.max_queue + 2 * self.settings.max_batch:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                "too_many_requests",
                f"{self.active} requests are being answered; ask again later",
                headers={"Retry-After": str(self.metrics.retry_after(self.active))},
            )

    async def _json(self, headers: Headers, receive: Receive) -> bytes:
        """The body, which must be said to be JSON as it is; ApiError 415, or of `_body`."""
        body = await self._body(headers, receive)
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ApiError(415, "unsupported_media_type", "Content-Encoding: send the body as it is, not packed")
        if body and not _is_json(headers):
            raise ApiError(415, "unsupported_media_type", "the body must be JSON, with Content-Type: application/json")
        return body

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body; ApiError 413 or 408. What is too large is read on for a while and thrown away: a client that
        is cut off while it writes never reads why."""
        limit, chunks, size = self.settings.max_body_bytes, list[bytes](), 0
        told = headers.get("content-length", "")
        too_large = told.isdecimal() and int(told[:20]) > 4 * limit
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while not too_large:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "incomplete_body", "the body ended before its end")
                    size += len(message.get("body", b""))
                    if size <= limit:
                        chunks.append(message.get("body", b""))
                    too_large = size > 4 * limit
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(
                408, "body_timeout", f"the body did not come within {self.settings.body_seconds:g} seconds"
            ) from None
        if size > limit or too_large:
            raise ApiError(413, "body_too_large", f"the body is too large: expected at most {limit} bytes")
        return b"".join(chunks)


def _hang_up(receive: Receive) -> bool:
    """End a connection of uvicorn's with what waits to be sent, for which its own close would wait; if it is one."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()
    return transport is not None


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body in one piece, then whatever the client does next, which is going away."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
