"""An application around the tiny segmenter, called in place, and the same behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving_app import make_app, make_client


@pytest.fixture
def client() -> Iterator[Any]:
    with make_client() as made:
        yield made


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that listens on a free port."""
    uvicorn = pytest.importorskip("uvicorn", reason='needs the extra "serve"')

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
