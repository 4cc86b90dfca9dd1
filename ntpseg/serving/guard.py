"""What every request passes: who it is addressed to, who sends it, how long it is; and the headers of every answer."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused

# A page that may load nothing but its own files and talk to nobody but this server.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
UPLOAD_PATH = "/api/images"
# Of requests that carry a sentence, not an image.
SMALL_BODY = 2**16
# Boundaries and names of the parts of an upload.
MULTIPART_BYTES = 2**20

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware around the application.

    The Host header must name this server: a page of another site whose name was pointed at this address (DNS rebinding)
    would otherwise read what users upload. Requests that a browser says come from another site are refused too.
    """

    def __init__(self, app: Any, options: ServerOptions) -> None:
        self.app, self.options = app, options
        self.hosts = {"localhost", options.host.lower(), *(name.lower() for name in options.allowed_hosts)}
        if not options.loopback:
            self.hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: dict[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = {name.encode(): value.encode() for name, value in HEADERS.items()}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in own]
                message = {**message, "headers": [*kept, *own.items()]}
            await send(message)

        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self.check(scope["method"], headers)
            limited = self._limited(scope, headers, receive)
        except Refused as refused:
            await refuse(refused)(scope, receive, send_guarded)
            return
        await self.app(scope, limited, send_guarded)

    def check(self, method: str, headers: dict[str, str]) -> None:
        """Raise `Refused` unless a request is addressed to this server and comes from its own page, or no page."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refused(
                421, "the Host header does not name this server; start it with --allow-host NAME to serve that name"
            )
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
        if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            # A link on another page may lead here, but nothing else of it.
            if method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate":
                return
            raise Refused(403, "requests of another site's page are not served")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address cannot be rebound; on loopback no other than loopback's leads here.
        return address.is_loopback if self.options.loopback else True

    def _limited(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        upload = scope["path"].endswith(UPLOAD_PATH)
        limit = self.options.max_upload_bytes + MULTIPART_BYTES if upload else SMALL_BODY
        declared = headers.get("content-length", "0")
        if declared.isascii() and declared.isdigit() and int(declared) > limit:
            raise self._too_long(upload)
        taken = 0

        async def limited() -> dict[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise self._too_long(upload)
            return message

        return limited

    def _too_long(self, upload: bool) -> Refused:
        if upload:
            return Refused(413, f"an upload must have at most {megabytes(self.options.max_upload_bytes)}, got more")
        return Refused(413, f"a request must have at most {SMALL_BODY:,} bytes, got more")


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count:,} bytes"


def refuse(refused: Refused) -> Any:
    """The answer to a request that is not served: JSON with one line as ``detail``."""
    from starlette.responses import JSONResponse

    body: dict[str, Any] = {"detail": refused.message}
    if refused.series is not None:
        body["series"] = [{"name": name, "text": text} for name, text in refused.series]
    return JSONResponse(body, refused.status, headers=refused.headers)
