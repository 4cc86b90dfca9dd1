"""Running the application: the socket, what is printed, and uvicorn."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from ntpseg.serving.options import ServerOptions
from ntpseg.volumes.extras import require

if TYPE_CHECKING:
    from ntpseg.generation import Segmenter

WARNING = (
    "warning: {host} can be reached by other machines. There is no login and no encryption: whoever reaches it can "
    "upload images and use this machine's processor; put a proxy with both in front of it (docs/serving.md)"
)


@contextlib.contextmanager
def listen(options: ServerOptions) -> Iterator[socket.socket]:
    """A socket that listens where the options say.

    Raises:
        ValueError: uvicorn is not installed, the address is not this machine's, or the port is taken.
    """
    require("uvicorn", "serve", "serving the page")
    require("fastapi", "serve", "serving the page")
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise ValueError(
            f"host and port must be free on this machine, got {options.host} port {options.port} "
            f"({error.strerror or error}); choose another with --port"
        ) from error
    with listener:
        yield listener


def run_server(
    segmenter: Segmenter, options: ServerOptions, listener: socket.socket, *, name: str, examples: Sequence[str]
) -> None:
    """Serve until Ctrl-C."""
    import uvicorn

    from ntpseg.serving.app import create_app

    app = create_app(segmenter, options, name=name, examples=examples)
    if not options.loopback:
        typer.secho(WARNING.format(host=options.host), fg="yellow", err=True)
    typer.echo(f"{name} is served on {address(options.host, listener.getsockname()[1])} (Ctrl-C ends it)")
    # Names of uploads are in no log, because there is none of requests.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])


def address(host: str, port: int) -> str:
    """The URL to open: an unspecified address is reached by this machine's own."""
    try:
        number = ipaddress.ip_address(host)
        if number.is_unspecified:
            host = "127.0.0.1"
        elif number.version == 6:
            host = f"[{host}]"
    except ValueError:
        pass
    return f"http://{host}:{port}/"
