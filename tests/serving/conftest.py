"""An application around the tiny segmenter, called in place, and the same behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_segmenter import TEXTS, shared

pytest.importorskip("fastapi", reason='needs the extra "serve"')
pytest.importorskip("httpx")


def make_app(method: str = "greedy", **options: Any) -> Any:
    from ntpseg.generation import DecodingOptions, Segmenter
    from ntpseg.serving import ServerOptions, create_app

    segmenter = Segmenter(shared()[1], DecodingOptions(method=method, dtype="float32"))
    return create_app(segmenter, ServerOptions(**options), name="tiny", examples=TEXTS[:2])


def make_client(**options: Any) -> Any:
    from fastapi.testclient import TestClient

    return TestClient(make_app(**options), base_url="http://127.0.0.1:8000")


@pytest.fixture
def client() -> Iterator[Any]:
    with make_client() as made:
        yield made


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that listens on a free port."""
    import uvicorn

    from ntpseg.serving.options import ServerOptions
    from ntpseg.serving.server import listen

    with listen(ServerOptions(port=0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(make_app(), log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(20)
