"""The application of ``ntpseg serve``: its page and its API."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ntpseg.serving.decoding_queue import DecodingQueue, log_failure
from ntpseg.serving.guard import Guard, refuse
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused, user_line
from ntpseg.serving.segmenting import Decodes
from ntpseg.serving.store import ImageStore
from ntpseg.volumes.extras import require

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ntpseg.generation import Segmenter

# How often images that nobody asks for are looked for.
SWEEP_SECONDS = 30.0


def create_app(
    segmenter: Segmenter, options: ServerOptions | None = None, *, name: str = "", examples: Sequence[str] = ()
) -> FastAPI:
    """The web application around a segmenter; run it with uvicorn, or mount it.

    Args:
        segmenter: the model; nothing else may decode with it meanwhile.
        options: limits and names, see `ServerOptions`.
        name: of the model, shown on the page.
        examples: sentences that the page offers.

    Raises:
        ValueError: FastAPI is not installed.
    """
    fastapi = require("fastapi", "serve", "serving the page")
    require("python_multipart", "serve", "serving the page")
    from ntpseg.serving.image_routes import add_image_routes
    from ntpseg.serving.page_routes import add_page_routes
    from ntpseg.serving.segment_routes import add_segment_routes

    settings = options or ServerOptions()
    store, queue = ImageStore(settings), DecodingQueue(settings.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(SWEEP_SECONDS)
                store.expire()

        sweeper = asyncio.create_task(sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            queue.close()
            store.clear()

    app: FastAPI = fastapi.FastAPI(
        title="ntpseg",
        summary="Referring segmentation of medical images. Research software, no medical device.",
        openapi_url="/api/openapi.json",
        # FastAPI's pages of documentation load their scripts from another server.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.store, app.state.queue = store, queue
    decodes = Decodes(segmenter, store)
    add_page_routes(app, decodes, settings, name, examples)
    add_image_routes(app, store, settings)
    add_segment_routes(app, store, decodes, queue, settings)
    _add_error_handlers(app)
    app.add_middleware(Guard, options=settings)  # type: ignore[arg-type]
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Every error is one line of JSON."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refused(_: Any, error: Exception) -> Any:
        assert isinstance(error, Refused)
        return refuse(error)

    async def invalid(_: Any, error: Exception) -> Any:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        return refuse(Refused(422, f"{place[:100]}: {first['msg'][:200]}"))

    async def http(_: Any, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        return refuse(Refused(error.status_code, user_line(Exception(error.detail)), dict(error.headers or {})))

    async def user(_: Any, error: Exception) -> Any:
        return refuse(Refused(400, user_line(error)))

    async def failed(_: Any, error: Exception) -> Any:
        log_failure(error)
        return refuse(Refused(500, "the server failed; its log says where"))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ValueError, user)
    app.add_exception_handler(Exception, failed)
